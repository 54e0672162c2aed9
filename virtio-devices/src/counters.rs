//! Counters of a device, shared by its halves.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Named `u64` counters of one device, as `vm.counters` shows them.
pub type Counters = BTreeMap<&'static str, u64>;

/// Of so many events of a kind, one is logged.
const LOGGED_EVERY: u64 = 1 << 20;

/// A counter or a gauge. Relaxed: it imposes no order, and several values read together are not from one instant.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Counts one.
    pub fn count(&self) {
        self.add(1);
    }

    /// Counts `more`.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// Counts an event that a guest or the host can repeat at will. Returns whether to log it: the first is logged, and
    /// then one of each [`LOGGED_EVERY`].
    pub fn count_loudly(&self) -> bool {
        let before = self.0.fetch_add(1, Ordering::Relaxed);
        before.is_multiple_of(LOGGED_EVERY)
    }

    /// Replaces the value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The present value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Declares the counters of a device: the fields' names are also the names in `vm.counters`.
#[macro_export]
macro_rules! counters {
    ($(#[$about:meta])* $table:ident { $($(#[$doc:meta])* $name:ident,)+ }) => {
        $(#[$about])*
        #[derive(Debug, Default)]
        pub(crate) struct $table {
            $($(#[$doc])* pub(crate) $name: $crate::counters::Count,)+
        }

        impl $table {
            /// All counters by name.
            pub(crate) fn read(&self) -> $crate::Counters {
                $crate::Counters::from([$((stringify!($name), self.$name.get()),)+])
            }
        }
    };
}
pub use counters;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_that_repeats_an_event_fills_no_log() {
        let count = Count::default();
        assert!(count.count_loudly());
        assert!(!count.count_loudly());
        count.set(LOGGED_EVERY - 1);
        assert!(!count.count_loudly());
        assert!(count.count_loudly());
        assert_eq!(count.get(), LOGGED_EVERY + 1);
    }
}
