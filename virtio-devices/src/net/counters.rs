//! Counters of a network device, one set per device, shared by its queues.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::device::Counters;

/// Bytes and frames are without the virtio header, as upstream counts them.
#[derive(Debug, Default)]
pub(super) struct NetCounters {
    pub(super) rx_bytes: AtomicU64,
    pub(super) rx_frames: AtomicU64,
    /// Frames too long for the buffers the guest had ready.
    pub(super) rx_drops: AtomicU64,
    pub(super) tx_bytes: AtomicU64,
    pub(super) tx_frames: AtomicU64,
    /// Frames that the tap rejected: malformed offloads, link down.
    pub(super) tx_drops: AtomicU64,
    /// The tap failed because of the host.
    pub(super) tap_errors: AtomicU64,
    /// Invalid chains, commands and register writes.
    pub(super) bad_requests: AtomicU64,
}

impl NetCounters {
    /// Adds one.
    pub(super) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Relaxed);
    }

    /// Adds one, and returns whether to log this occurrence: the first is logged, then ever fewer are.
    pub(super) fn count_loudly(counter: &AtomicU64) -> bool {
        let before = counter.fetch_add(1, Relaxed);
        before == 0 || before.is_multiple_of(1 << 20)
    }

    pub(super) fn received(&self, bytes: usize) {
        self.rx_bytes.fetch_add(bytes as u64, Relaxed);
        self.rx_frames.fetch_add(1, Relaxed);
    }

    pub(super) fn transmitted(&self, bytes: usize) {
        self.tx_bytes.fetch_add(bytes as u64, Relaxed);
        self.tx_frames.fetch_add(1, Relaxed);
    }

    pub(super) fn snapshot(&self) -> Counters {
        Counters::from([
            ("rx_bytes", self.rx_bytes.load(Relaxed)),
            ("rx_frames", self.rx_frames.load(Relaxed)),
            ("rx_drops", self.rx_drops.load(Relaxed)),
            ("tx_bytes", self.tx_bytes.load(Relaxed)),
            ("tx_frames", self.tx_frames.load(Relaxed)),
            ("tx_drops", self.tx_drops.load(Relaxed)),
            ("tap_errors", self.tap_errors.load(Relaxed)),
            ("bad_requests", self.bad_requests.load(Relaxed)),
        ])
    }
}
