//! Counters of a disk, one set per device, shared by its queues.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::device::Counters;

/// Initial value of latencies, before the first request: `u64::MAX`, as in upstream.
const NO_LATENCY_YET: u64 = u64::MAX;

/// One direction of transfer.
#[derive(Debug)]
struct Transfer {
    bytes: AtomicU64,
    ops: AtomicU64,
    latency_sum_us: AtomicU64,
    latency_min_us: AtomicU64,
    latency_max_us: AtomicU64,
}

impl Transfer {
    fn new() -> Self {
        Self {
            bytes: AtomicU64::new(0),
            ops: AtomicU64::new(0),
            latency_sum_us: AtomicU64::new(0),
            latency_min_us: AtomicU64::new(NO_LATENCY_YET),
            latency_max_us: AtomicU64::new(0),
        }
    }

    fn add(&self, bytes: u64, latency: Duration) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.bytes.fetch_add(bytes, Relaxed);
        self.ops.fetch_add(1, Relaxed);
        self.latency_sum_us.fetch_add(us, Relaxed);
        self.latency_min_us.fetch_min(us, Relaxed);
        self.latency_max_us.fetch_max(us, Relaxed);
    }

    fn latency_max(&self) -> u64 {
        if self.ops.load(Relaxed) == 0 {
            return NO_LATENCY_YET;
        }
        self.latency_max_us.load(Relaxed)
    }

    fn latency_avg(&self) -> u64 {
        self.latency_sum_us
            .load(Relaxed)
            .checked_div(self.ops.load(Relaxed))
            .unwrap_or(NO_LATENCY_YET)
    }
}

/// Counters of a disk. They are relaxed atomics, so a snapshot is not from one instant.
#[derive(Debug)]
pub(super) struct BlockCounters {
    read: Transfer,
    write: Transfer,
    flush_ops: AtomicU64,
    discard_bytes: AtomicU64,
    write_zeroes_bytes: AtomicU64,
    /// Requests at fault: malformed, unknown, out of range, or rejected.
    bad_requests: AtomicU64,
    /// Writes of signatures to an image whose format was guessed.
    refused_signatures: AtomicU64,
    /// Host errors: the image could not be read or written.
    io_errors: AtomicU64,
    /// Number of times a queue waited for its rate limit.
    throttled: AtomicU64,
}

impl BlockCounters {
    pub(super) fn new() -> Self {
        Self {
            read: Transfer::new(),
            write: Transfer::new(),
            flush_ops: AtomicU64::new(0),
            discard_bytes: AtomicU64::new(0),
            write_zeroes_bytes: AtomicU64::new(0),
            bad_requests: AtomicU64::new(0),
            refused_signatures: AtomicU64::new(0),
            io_errors: AtomicU64::new(0),
            throttled: AtomicU64::new(0),
        }
    }

    pub(super) fn add_read(&self, bytes: u64, latency: Duration) {
        self.read.add(bytes, latency);
    }

    pub(super) fn add_write(&self, bytes: u64, latency: Duration) {
        self.write.add(bytes, latency);
    }

    pub(super) fn add_flush(&self) {
        self.flush_ops.fetch_add(1, Relaxed);
    }

    pub(super) fn add_discard(&self, bytes: u64) {
        self.discard_bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn add_write_zeroes(&self, bytes: u64) {
        self.write_zeroes_bytes.fetch_add(bytes, Relaxed);
    }

    /// Counts a request that is the guest's fault and returns the previous count.
    pub(super) fn add_bad_request(&self) -> u64 {
        self.bad_requests.fetch_add(1, Relaxed)
    }

    /// Counts a write that was refused for its signature and returns the number before it.
    pub(super) fn add_refused_signature(&self) -> u64 {
        self.refused_signatures.fetch_add(1, Relaxed)
    }

    /// Counts a host error and returns the previous count.
    pub(super) fn add_io_error(&self) -> u64 {
        self.io_errors.fetch_add(1, Relaxed)
    }

    pub(super) fn add_throttled(&self) {
        self.throttled.fetch_add(1, Relaxed);
    }

    pub(super) fn snapshot(&self) -> Counters {
        Counters::from([
            ("read_bytes", self.read.bytes.load(Relaxed)),
            ("read_ops", self.read.ops.load(Relaxed)),
            ("read_latency_min", self.read.latency_min_us.load(Relaxed)),
            ("read_latency_max", self.read.latency_max()),
            ("read_latency_avg", self.read.latency_avg()),
            ("write_bytes", self.write.bytes.load(Relaxed)),
            ("write_ops", self.write.ops.load(Relaxed)),
            ("write_latency_min", self.write.latency_min_us.load(Relaxed)),
            ("write_latency_max", self.write.latency_max()),
            ("write_latency_avg", self.write.latency_avg()),
            ("flush_ops", self.flush_ops.load(Relaxed)),
            ("discard_bytes", self.discard_bytes.load(Relaxed)),
            ("write_zeroes_bytes", self.write_zeroes_bytes.load(Relaxed)),
            ("bad_requests", self.bad_requests.load(Relaxed)),
            ("refused_signatures", self.refused_signatures.load(Relaxed)),
            ("io_errors", self.io_errors.load(Relaxed)),
            ("throttled", self.throttled.load(Relaxed)),
        ])
    }
}
