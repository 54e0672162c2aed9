//! Counters of a network device, one set per device, shared by its queues.

use crate::counters::counters;

counters! {
    /// Bytes and frames exclude the virtio header, as upstream counts them.
    NetCounters {
        rx_bytes,
        rx_frames,
        /// Frames too long for the buffers that the guest had provided.
        rx_drops,
        tx_bytes,
        tx_frames,
        /// Frames that the tap rejected: malformed offloads, link down.
        tx_drops,
        /// Tap errors caused by the host.
        tap_errors,
        /// Number of times a direction of a pair waited for its rate limit.
        throttled,
        /// Invalid chains, commands and register writes.
        bad_requests,
    }
}

impl NetCounters {
    pub(super) fn received(&self, bytes: usize) {
        self.rx_bytes.add(bytes as u64);
        self.rx_frames.count();
    }

    pub(super) fn transmitted(&self, bytes: usize) {
        self.tx_bytes.add(bytes as u64);
        self.tx_frames.count();
    }
}
