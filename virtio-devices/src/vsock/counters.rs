//! The counters of a vsock device.

use crate::counters::counters;

counters! {
    /// The counters of both halves.
    Shared {
        /// Gauge: number of current connections.
        connections,
        connections_opened,
        connections_refused,
        rx_bytes,
        tx_bytes,
        rx_packets,
        tx_packets,
        bad_packets,
        resets_dropped,
    }
}

impl Shared {
    pub(super) fn bad_packet(&self, reason: &str) {
        if self.bad_packets.count_loudly() {
            log::warn!("vsock: bad packet from the guest: {reason}");
        }
    }
}
