//! The MSI-X vectors of one PCI function, each a GSI with an irqfd.
//!
//! A vector costs nothing until the driver enables it. Only then are its GSI and eventfd created; they are kept until
//! the function is removed. Masking removes only the irqfd, because drivers mask and unmask with the same message, and
//! rebuilding the routing table is the expensive step.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_devices::Unpoisoned;
use virtio_devices::pci::{MsiMessage, MsiVectors};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::GsiRouter;

struct Vector {
    gsi: u32,
    event: EventFd,
    /// The irqfd is registered: a write to `event` reaches the guest.
    armed: bool,
}

/// Vectors of one function; dropping them frees the GSIs.
pub struct FunctionVectors {
    router: Arc<GsiRouter>,
    vectors: Vec<Mutex<Option<Vector>>>,
    /// The events of the vectors, if others signal them.
    events: Vec<EventFd>,
}

virtio_devices::debug_fields!(FunctionVectors(it) { count: it.vectors.len() });

impl FunctionVectors {
    /// `count` disabled vectors.
    #[must_use]
    pub fn new(router: Arc<GsiRouter>, count: u16) -> Self {
        Self {
            router,
            vectors: (0..count).map(|_| Mutex::new(None)).collect(),
            events: Vec::new(),
        }
    }

    /// One disabled vector for each event, which others signal. What they signal while the vector is disabled is
    /// delivered when it is enabled.
    #[must_use]
    pub fn of_events(router: Arc<GsiRouter>, events: Vec<EventFd>) -> Self {
        Self {
            router,
            vectors: events.iter().map(|_| Mutex::new(None)).collect(),
            events,
        }
    }

    fn slot(&self, vector: u16) -> io::Result<MutexGuard<'_, Option<Vector>>> {
        self.vectors
            .get(usize::from(vector))
            .map(|slot| slot.lock().unpoisoned())
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }

    fn create(&self, vector: u16) -> io::Result<Vector> {
        let event = match self.events.get(usize::from(vector)) {
            Some(event) => event.try_clone()?,
            None => EventFd::new(EFD_NONBLOCK)?,
        };
        let gsi = self.router.allocate()?;
        Ok(Vector {
            gsi,
            event,
            armed: false,
        })
    }

    fn disarm(&self, vector: &mut Vector) -> io::Result<()> {
        if vector.armed {
            self.router
                .backend()
                .unregister_irqfd(&vector.event, vector.gsi)?;
            vector.armed = false;
        }
        Ok(())
    }
}

impl MsiVectors for FunctionVectors {
    fn enable(&self, vector: u16, message: MsiMessage) -> io::Result<()> {
        let mut slot = self.slot(vector)?;
        let vector = match &mut *slot {
            Some(vector) => vector,
            None => slot.insert(self.create(vector)?),
        };
        if let Err(refused) = self.router.set_route(vector.gsi, Some(message)) {
            // An interrupt must not be delivered to an address that the driver has replaced.
            self.disarm(vector)?;
            return Err(refused);
        }
        if !vector.armed {
            self.router
                .backend()
                .register_irqfd(&vector.event, vector.gsi)?;
            vector.armed = true;
        }
        Ok(())
    }

    fn disable(&self, vector: u16) -> io::Result<()> {
        match &mut *self.slot(vector)? {
            Some(vector) => self.disarm(vector),
            None => Ok(()),
        }
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        match &*self.slot(vector)? {
            Some(vector) if vector.armed => match vector.event.write(1) {
                // A full counter means that interrupts are pending already.
                Err(full) if full.kind() == io::ErrorKind::WouldBlock => Ok(()),
                result => result,
            },
            _ => Err(io::Error::from_raw_os_error(libc::ENOTCONN)),
        }
    }
}

impl Drop for FunctionVectors {
    fn drop(&mut self) {
        for slot in &self.vectors {
            let vector = slot.lock().unpoisoned().take();
            let Some(mut vector) = vector else {
                continue;
            };
            if let Err(error) = self.disarm(&mut vector) {
                log::warn!("Cannot unregister the irqfd of GSI {}: {error}", vector.gsi);
                continue;
            }
            if let Err(error) = self.router.release(vector.gsi) {
                log::warn!("Cannot remove the route of GSI {}: {error}", vector.gsi);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeBackend;
    use super::*;

    fn message(data: u32) -> MsiMessage {
        MsiMessage {
            address: 0xfee0_0000,
            data,
        }
    }

    #[test]
    fn vector_is_routed_before_it_is_armed_and_triggers_its_event() {
        let backend = Arc::new(FakeBackend::default());
        let router = Arc::new(GsiRouter::new(backend.clone()));
        let vectors = FunctionVectors::new(router, 2);
        assert!(vectors.trigger(1).is_err());
        vectors.enable(1, message(0x41)).unwrap();
        assert_eq!(backend.notes().tables.len(), 1);
        assert_eq!(backend.notes().irqfds.len(), 1);
        vectors.trigger(1).unwrap();
        let slot = vectors.slot(1).unwrap();
        assert_eq!(slot.as_ref().unwrap().event.read().unwrap(), 1);
    }

    #[test]
    fn masking_takes_the_irqfd_and_keeps_the_route() {
        let backend = Arc::new(FakeBackend::default());
        let router = Arc::new(GsiRouter::new(backend.clone()));
        let vectors = FunctionVectors::new(router, 1);
        vectors.enable(0, message(1)).unwrap();
        vectors.disable(0).unwrap();
        vectors.disable(0).unwrap();
        assert!(vectors.trigger(0).is_err());
        assert!(backend.notes().irqfds.is_empty());
        vectors.enable(0, message(1)).unwrap();
        assert_eq!(backend.notes().tables.len(), 1);
        vectors.enable(0, message(2)).unwrap();
        assert_eq!(backend.notes().tables.len(), 2);
        assert_eq!(backend.notes().irqfds.len(), 1);
    }

    #[test]
    fn dropped_function_leaves_nothing() {
        let backend = Arc::new(FakeBackend::default());
        let router = Arc::new(GsiRouter::new(backend.clone()));
        let vectors = FunctionVectors::new(router.clone(), 3);
        vectors.enable(0, message(1)).unwrap();
        vectors.enable(2, message(2)).unwrap();
        drop(vectors);
        assert!(backend.notes().irqfds.is_empty());
        assert!(backend.notes().tables.last().unwrap().is_empty());
        assert_eq!(router.allocate().unwrap(), 24);
    }

    #[test]
    fn refused_route_disables_the_vector() {
        let backend = Arc::new(FakeBackend::default());
        let router = Arc::new(GsiRouter::new(backend.clone()));
        let vectors = FunctionVectors::new(router, 1);
        vectors.enable(0, message(1)).unwrap();
        backend.notes().refuse = true;
        assert!(vectors.enable(0, message(2)).is_err());
        assert!(backend.notes().irqfds.is_empty());
        assert!(vectors.trigger(0).is_err());
    }

    #[test]
    fn vector_out_of_range_is_an_error() {
        let router = Arc::new(GsiRouter::new(Arc::new(FakeBackend::default())));
        let vectors = FunctionVectors::new(router, 1);
        assert!(vectors.enable(1, message(1)).is_err());
        assert!(vectors.disable(1).is_err());
        assert!(vectors.trigger(u16::MAX).is_err());
    }
}
