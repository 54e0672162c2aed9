//! Registers the doorbells of a restored machine after its vCPUs have started.
//!
//! For each doorbell, KVM waits until no vCPU uses the old table. Without registration, the guest's write leaves the
//! kernel and signals the same doorbell (`bar_write`), only more slowly. The restored guest therefore need not wait.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_devices::Unpoisoned;
use vmm_sys_util::eventfd::EventFd;

use super::DoorbellBackend;

#[derive(Debug, Default)]
struct State {
    is_collecting: bool,
    /// Not known to the back end yet. Bounded by the doorbells of all functions on the bus.
    collected: Vec<(u64, EventFd)>,
}

/// A back end that can be asked to wait.
pub struct LateDoorbells {
    backend: Arc<dyn DoorbellBackend>,
    state: Mutex<State>,
}

impl fmt::Debug for LateDoorbells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state().fmt(f)
    }
}

impl LateDoorbells {
    /// Passes doorbells on at once until [`LateDoorbells::collect`] is called.
    #[must_use]
    pub fn new(backend: Arc<dyn DoorbellBackend>) -> Self {
        Self {
            backend,
            state: Mutex::default(),
        }
    }

    /// Registers no doorbell until [`LateDoorbells::register_collected`].
    pub fn collect(&self) {
        self.state().is_collecting = true;
    }

    /// Registers all doorbells since [`LateDoorbells::collect`], if that was called. The guest may run, and move BARs.
    pub fn register_collected(&self) {
        self.state().is_collecting = false;
        loop {
            // One at a time, so that a vCPU that moves a BAR hardly waits.
            let mut state = self.state();
            let Some((address, event)) = state.collected.pop() else {
                return;
            };
            if let Err(error) = self.backend.register_doorbell(address, &event) {
                log::warn!(
                    "Cannot register the doorbell at {address:#x} with KVM, notifications remain slow: {error}"
                );
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unpoisoned()
    }
}

impl DoorbellBackend for LateDoorbells {
    fn register_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let mut state = self.state();
        if !state.is_collecting {
            return self.backend.register_doorbell(address, event);
        }
        state.collected.push((address, event.try_clone()?));
        Ok(())
    }

    fn unregister_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let mut state = self.state();
        let waiting = state.collected.iter().position(|it| it.0 == address);
        match waiting {
            Some(at) => drop(state.collected.swap_remove(at)),
            None => return self.backend.unregister_doorbell(address, event),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::super::fake::FakeDoorbells;
    use super::*;

    #[test]
    fn collected_doorbells_are_registered_later_unless_they_are_gone() {
        let backend = Arc::new(FakeDoorbells::default());
        let registered = || -> Vec<u64> {
            let addresses = backend.addresses.lock().unpoisoned();
            addresses.iter().copied().collect()
        };
        let doorbells = LateDoorbells::new(backend.clone());
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        doorbells.register_doorbell(1, &event).unwrap();
        doorbells.register_collected();
        doorbells.collect();
        for address in [2, 3, 4] {
            doorbells.register_doorbell(address, &event).unwrap();
        }
        doorbells.unregister_doorbell(3, &event).unwrap();
        assert_eq!(registered(), [1]);
        doorbells.register_collected();
        assert_eq!(registered(), [1, 2, 4]);
        doorbells.unregister_doorbell(1, &event).unwrap();
        doorbells.unregister_doorbell(4, &event).unwrap();
        doorbells.register_doorbell(5, &event).unwrap();
        assert_eq!(registered(), [2, 5]);
    }
}
