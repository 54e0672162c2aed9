//! Counters of a disk, one set per device, shared by its queues.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::counters::{Count, counters};
use crate::device::Counters;

/// Initial value of latencies, before the first request: `u64::MAX`, as in upstream.
const NO_LATENCY_YET: u64 = u64::MAX;

/// One direction of transfer.
#[derive(Debug)]
pub(super) struct Transfer {
    bytes: Count,
    ops: Count,
    latency_sum_us: Count,
    latency_min_us: AtomicU64,
    latency_max_us: AtomicU64,
}

impl Default for Transfer {
    fn default() -> Self {
        Self {
            bytes: Count::default(),
            ops: Count::default(),
            latency_sum_us: Count::default(),
            latency_min_us: AtomicU64::new(NO_LATENCY_YET),
            latency_max_us: AtomicU64::new(0),
        }
    }
}

impl Transfer {
    pub(super) fn add(&self, bytes: u64, latency: Duration) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.bytes.add(bytes);
        self.ops.count();
        self.latency_sum_us.add(us);
        self.latency_min_us.fetch_min(us, Relaxed);
        self.latency_max_us.fetch_max(us, Relaxed);
    }

    fn latency_max(&self) -> u64 {
        if self.ops.get() == 0 {
            return NO_LATENCY_YET;
        }
        self.latency_max_us.load(Relaxed)
    }

    fn latency_avg(&self) -> u64 {
        self.latency_sum_us
            .get()
            .checked_div(self.ops.get())
            .unwrap_or(NO_LATENCY_YET)
    }
}

counters! {
    /// Counters of a disk, besides those of its transfers.
    DiskCounts {
        flush_ops,
        discard_bytes,
        write_zeroes_bytes,
        /// Requests at fault: malformed, unknown, out of range, or rejected.
        bad_requests,
        /// Writes of signatures to an image whose format was guessed.
        refused_signatures,
        /// Host errors: the image could not be read or written.
        io_errors,
        /// Number of times a queue waited for its rate limit.
        throttled,
    }
}

/// All counters of a disk.
#[derive(Debug, Default)]
pub(super) struct BlockCounters {
    pub(super) read: Transfer,
    pub(super) write: Transfer,
    pub(super) counts: DiskCounts,
}

impl BlockCounters {
    pub(super) fn snapshot(&self) -> Counters {
        let mut counters = self.counts.read();
        counters.extend([
            ("read_bytes", self.read.bytes.get()),
            ("read_ops", self.read.ops.get()),
            ("read_latency_min", self.read.latency_min_us.load(Relaxed)),
            ("read_latency_max", self.read.latency_max()),
            ("read_latency_avg", self.read.latency_avg()),
            ("write_bytes", self.write.bytes.get()),
            ("write_ops", self.write.ops.get()),
            ("write_latency_min", self.write.latency_min_us.load(Relaxed)),
            ("write_latency_max", self.write.latency_max()),
            ("write_latency_avg", self.write.latency_avg()),
        ]);
        counters
    }
}
