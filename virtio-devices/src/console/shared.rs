//! Data that both halves of a console and the VMM's handle share.

use std::sync::atomic::AtomicU32;

use crate::counters::counters;

#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Columns in the lower half, rows in the upper half, so that both are accessed atomically.
    pub(super) window: AtomicU32,
    pub(super) counters: ConsoleCounters,
}

counters! {
    ConsoleCounters {
        rx_bytes,
        tx_bytes,
        tx_dropped_bytes,
        bad_chains,
    }
}
