//! Counts vCPU exits by reason.

use std::sync::atomic::{AtomicU64, Ordering};

/// Defines the fields once, so that live counters and their copy cannot differ.
macro_rules! exit_counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Exits of one vCPU, counted by its thread and readable by any thread.
        #[derive(Debug, Default)]
        pub struct ExitCounters {
            $(pub(super) $name: AtomicU64,)*
        }

        /// A copy of [`ExitCounters`].
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub struct ExitCounts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl ExitCounters {
            /// The current counts. Each is exact, but they are not from the same instant.
            pub fn counts(&self) -> ExitCounts {
                ExitCounts {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                }
            }
        }
    };
}

exit_counters! {
    /// Port reads.
    pio_in,
    /// Port writes.
    pio_out,
    /// Loads from device memory.
    mmio_read,
    /// Stores to device memory, except those that KVM turned into doorbells.
    mmio_write,
    /// Acknowledged level-triggered interrupts.
    ioapic_eoi,
    /// Exits caused by a signal.
    interrupted,
}

/// Counts one exit. Only the vCPU's own thread writes, so no read-modify-write is needed.
pub(super) fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}
