//! The owner of KVM's interrupt routing table and of the GSI numbers in it.
//!
//! KVM accepts only whole tables and, on each change, waits until no vCPU uses the old one. A table is therefore set
//! only if it differs from the current one. While a machine is restored, all routes are collected and set once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_devices::Unpoisoned;
use virtio_devices::pci::MsiMessage;

use super::{IOAPIC_PIN_COUNT, InterruptBackend, Route};

/// Maximum number of GSIs, pins included: `KVM_MAX_IRQ_ROUTES` on x86 (include/linux/kvm_host.h), which limits both the
/// numbers and the table.
pub const GSI_COUNT_MAX: u32 = 4096;

#[derive(Default)]
struct State {
    routes: BTreeMap<u32, MsiMessage>,
    /// Allocated GSIs, routed or not.
    allocated: BTreeSet<u32>,
    /// The back end does not have the current routes.
    is_collecting: bool,
}

impl State {
    fn table(&self) -> Vec<Route> {
        let routes = self.routes.iter();
        routes
            .map(|(&gsi, &message)| Route { gsi, message })
            .collect()
    }
}

/// Allocates GSIs and keeps their routes.
pub struct GsiRouter {
    backend: Arc<dyn InterruptBackend>,
    state: Mutex<State>,
}

impl fmt::Debug for GsiRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.state().routes.iter()).finish()
    }
}

impl GsiRouter {
    /// An empty table over the pins of the I/O APIC and all MSI numbers.
    #[must_use]
    pub fn new(backend: Arc<dyn InterruptBackend>) -> Self {
        Self {
            backend,
            state: Mutex::new(State::default()),
        }
    }

    /// Allocates a GSI for a message-signalled interrupt.
    ///
    /// # Errors
    /// All [`GSI_COUNT_MAX`] are in use.
    pub fn allocate(&self) -> io::Result<u32> {
        let mut state = self.state();
        let first = u32::from(IOAPIC_PIN_COUNT);
        let free = (first..GSI_COUNT_MAX)
            .find(|gsi| !state.allocated.contains(gsi))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        state.allocated.insert(free);
        Ok(free)
    }

    /// Every GSI up to [`GSI_COUNT_MAX`] is in use.
    ///
    /// # Errors
    /// The host rejected the smaller table.
    pub fn release(&self, gsi: u32) -> io::Result<()> {
        let mut state = self.state();
        state.allocated.remove(&gsi);
        self.update(&mut state, gsi, None)
    }

    /// Routes `gsi` to `message`, or removes its route.
    ///
    /// # Errors
    /// The host rejected the table; the old route stays.
    pub fn set_route(&self, gsi: u32, message: Option<MsiMessage>) -> io::Result<()> {
        let mut state = self.state();
        self.update(&mut state, gsi, message)
    }

    /// Sets no table until [`GsiRouter::set_collected`]: the vCPUs of a machine that is being restored do not run.
    pub fn collect(&self) {
        self.state().is_collecting = true;
    }

    /// Sets the table with all routes since [`GsiRouter::collect`], if that was called.
    ///
    /// # Errors
    /// The host rejected the table. No interrupt reaches the guest.
    pub fn set_collected(&self) -> io::Result<()> {
        let mut state = self.state();
        match std::mem::take(&mut state.is_collecting) {
            true => self.backend.set_routes(&state.table()),
            false => Ok(()),
        }
    }

    /// The back end that holds the routes.
    pub fn backend(&self) -> &dyn InterruptBackend {
        self.backend.as_ref()
    }

    fn update(&self, state: &mut State, gsi: u32, message: Option<MsiMessage>) -> io::Result<()> {
        let before = match message {
            Some(message) => state.routes.insert(gsi, message),
            None => state.routes.remove(&gsi),
        };
        if before == message || state.is_collecting {
            return Ok(());
        }
        self.backend
            .set_routes(&state.table())
            .inspect_err(|_refused| {
                match before {
                    Some(before) => state.routes.insert(gsi, before),
                    None => state.routes.remove(&gsi),
                };
            })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unpoisoned()
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeBackend;
    use super::*;

    fn message(data: u32) -> Option<MsiMessage> {
        Some(MsiMessage {
            address: 0xfee0_0000,
            data,
        })
    }

    #[test]
    fn gsi_numbers_start_after_the_pins_and_are_reused() {
        let router = GsiRouter::new(Arc::new(FakeBackend::default()));
        assert_eq!(router.allocate().unwrap(), 24);
        assert_eq!(router.allocate().unwrap(), 25);
        router.release(24).unwrap();
        assert_eq!(router.allocate().unwrap(), 24);
        assert_eq!(router.allocate().unwrap(), 26);
    }

    #[test]
    fn gsi_numbers_end_with_the_table() {
        let router = GsiRouter::new(Arc::new(FakeBackend::default()));
        for _ in 24..GSI_COUNT_MAX {
            router.allocate().unwrap();
        }
        assert!(router.allocate().is_err());
    }

    #[test]
    fn table_is_set_whole_and_only_when_it_changed() {
        let backend = Arc::new(FakeBackend::default());
        let router = GsiRouter::new(backend.clone());
        router.set_route(30, message(1)).unwrap();
        router.set_route(30, message(1)).unwrap();
        router.set_route(31, message(2)).unwrap();
        router.set_route(30, None).unwrap();
        router.set_route(30, None).unwrap();
        let lengths: Vec<usize> = backend.notes().tables.iter().map(Vec::len).collect();
        assert_eq!(lengths, [1, 2, 1]);
        assert_eq!(backend.notes().tables[2][0].gsi, 31);
    }

    #[test]
    fn collected_routes_are_set_as_one_table() {
        let backend = Arc::new(FakeBackend::default());
        let router = GsiRouter::new(backend.clone());
        router.collect();
        router.set_route(30, message(1)).unwrap();
        router.set_route(31, message(2)).unwrap();
        assert!(backend.notes().tables.is_empty());
        router.set_collected().unwrap();
        router.set_collected().unwrap();
        router.set_route(32, message(3)).unwrap();
        let lengths: Vec<usize> = backend.notes().tables.iter().map(Vec::len).collect();
        assert_eq!(lengths, [2, 3]);
    }

    #[test]
    fn refused_route_leaves_the_old_one() {
        let backend = Arc::new(FakeBackend::default());
        let router = GsiRouter::new(backend.clone());
        router.set_route(30, message(1)).unwrap();
        backend.notes().refuse = true;
        assert!(router.set_route(30, message(2)).is_err());
        assert!(router.set_route(31, message(3)).is_err());
        backend.notes().refuse = false;
        router.set_route(32, message(4)).unwrap();
        let table = backend.notes().tables.last().cloned().unwrap();
        assert_eq!(table.len(), 2);
        assert_eq!(table[0].message.data, 1);
    }
}
