//! Counts driver errors, activations and resets.

use crate::counters::counters;

counters! {
    /// Counters of one function.
    TransportCounters {
        /// DRIVER_OK led to an active device.
        activations,
        /// Resets by the driver or the VM.
        resets,
        /// The driver accepted features that were not offered, or did not accept VERSION_1.
        bad_features,
        /// A status write that clears bits, skips a step or has unknown bits.
        bad_status_writes,
        /// A queue register written at the wrong time or with an invalid value.
        bad_queue_writes,
        /// A queue enabled with rings outside of RAM or misaligned.
        bad_queue_rings,
        /// A write to a read-only, reserved or missing register.
        bad_register_writes,
        /// A doorbell of a queue that does not exist.
        bad_notifications,
        /// A PCI_CFG window with an invalid target.
        bad_window_accesses,
    }
}
