//! The figures of an outgoing migration.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use api::MigrationProgress;

/// Shared by the thread of the migration and readers of `vm.info`.
#[derive(Debug, Default)]
pub struct SendProgress {
    passes: AtomicU32,
    wire_bytes: AtomicU64,
    left_bytes: AtomicU64,
    throttle_percent: AtomicU8,
}

impl SendProgress {
    /// The current figures.
    pub fn now(&self) -> MigrationProgress {
        MigrationProgress {
            passes: self.passes.load(Ordering::Relaxed),
            wire_bytes: self.wire_bytes.load(Ordering::Relaxed),
            left_bytes: self.left_bytes.load(Ordering::Relaxed),
            throttle_percent: self.throttle_percent.load(Ordering::Relaxed),
        }
    }

    pub(super) fn set_wire_bytes(&self, bytes: u64) {
        self.wire_bytes.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn set_throttle(&self, percent: u8) {
        self.throttle_percent.store(percent, Ordering::Relaxed);
    }

    pub(super) fn begin_pass(&self, left_bytes: u64) {
        self.left_bytes.store(left_bytes, Ordering::Relaxed);
    }

    pub(super) fn end_pass(&self) {
        self.passes.fetch_add(1, Ordering::Relaxed);
    }
}

/// The figures of a completed migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SendReport {
    /// Passes over RAM, the last one with the machine paused.
    pub passes: u32,
    /// Bytes sent.
    pub wire_bytes: u64,
    /// Bytes of pages with data among them.
    pub data_bytes: u64,
    /// From the pause to the target's answer that the machine continues there.
    pub downtime_ms: u64,
    /// A part of RAM followed the machine.
    pub was_postponed: bool,
}
