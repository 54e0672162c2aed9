//! Counts driver errors, activations and resets.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::Counters;

/// Declares each counter once: a field and its name in [`Counters`].
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// Counters of one function; relaxed, they order nothing.
        #[derive(Debug, Default)]
        pub(super) struct TransportCounters {
            $($(#[$doc])* pub(super) $name: Count,)+
        }

        impl TransportCounters {
            /// All of them by name.
            pub(super) fn read(&self) -> Counters {
                Counters::from([$((stringify!($name), self.$name.get()),)+])
            }
        }
    };
}

counters! {
    /// DRIVER_OK led to an active device.
    activations,
    /// Resets by the driver or the VM.
    resets,
    /// The driver accepted features that were not offered, or not VERSION_1.
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

/// One counter.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
