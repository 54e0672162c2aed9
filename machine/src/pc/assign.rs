//! Assigned devices on the bus. Everything else is as for virtio devices.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use virtio_devices::pci::PciFunction;
use vm_memory::GuestAddressSpace;

use super::Pc;
use super::error::PcError;
use super::plugged::Plugged;
use crate::assigned::{AssignError, AssignedFunction, BarSlots, Container, VfioFunction};
use crate::interrupt::FunctionVectors;
use crate::pci::Place;
use crate::threads::DeviceKind;

/// A device of the host for the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// Its identifier.
    pub id: String,
    /// Its place on the bus.
    pub place: Place,
    /// Its folder in sysfs.
    pub path: PathBuf,
}

impl Assignment {
    /// Checks what needs neither KVM nor VFIO.
    ///
    /// # Errors
    /// The folder is not that of a PCI device.
    pub fn check(&self) -> Result<(), PcError> {
        let vendor = std::fs::metadata(self.path.join("vendor"));
        vendor.map(drop).map_err(|source| PcError::Assign {
            id: self.id.clone(),
            source: AssignError::NotPci {
                path: self.path.clone(),
                source,
            },
        })
    }
}

impl Pc {
    /// Adds a device of the host to the bus of a machine that has not booted. The caller has stopped discarding: until
    /// [`Pc::has_pinned_memory`] returns false, no page of RAM may be replaced.
    ///
    /// # Errors
    /// The host does not give the device away, or there is no free slot.
    pub fn plug_assigned(&mut self, assignment: Assignment) -> Result<&Plugged, PcError> {
        let plugged = self.put_assigned(assignment)?;
        Ok(self.keep(plugged))
    }

    /// The same for a running or paused machine, whose guest is notified. On an error nothing is left behind.
    ///
    /// # Errors
    /// As [`Pc::plug_assigned`], or the guest cannot be notified.
    pub fn add_assigned(&mut self, assignment: Assignment) -> Result<&Plugged, PcError> {
        let plugged = self.put_assigned(assignment)?;
        self.announce(plugged)
    }

    /// Whether devices have RAM pinned.
    pub fn has_pinned_memory(&self) -> bool {
        self.container.strong_count() > 0
    }

    /// An assigned device, if there is one.
    pub(super) fn assigned_device(&self) -> Option<&Plugged> {
        self.plugged
            .iter()
            .find(|it| it.kind == DeviceKind::Assigned)
    }

    /// Such a machine cannot be copied: nobody knows the state of the device, or what it writes.
    pub(super) fn check_copyable(&self) -> Result<(), PcError> {
        match self.assigned_device() {
            Some(plugged) => Err(PcError::IsAssigned {
                id: plugged.id.clone(),
            }),
            None => Ok(()),
        }
    }

    fn put_assigned(&mut self, assignment: Assignment) -> Result<Plugged, PcError> {
        assignment.check()?;
        let Assignment { id, place, path } = assignment;
        let assigned = self.assign(&id, &path);
        let function = assigned.map_err(|source| PcError::Assign {
            id: id.clone(),
            source,
        })?;
        match self.chassis.pci.add(function.clone(), place) {
            Ok(bdf) => Ok(Plugged::assigned(id, bdf, function)),
            Err(source) => Err(PcError::Device {
                id,
                source: source.into(),
            }),
        }
    }

    fn assign(&mut self, id: &str, path: &Path) -> Result<Arc<dyn PciFunction>, AssignError> {
        let container = match self.container.upgrade() {
            Some(container) => container,
            None => Container::new(self.device_slots.vm())?,
        };
        let device = VfioFunction::open(path, Arc::clone(&container))?;
        container.map_ram(&self.memory.ram().memory())?;
        let slots = Arc::clone(&self.device_slots) as Arc<dyn BarSlots>;
        let router = Arc::clone(&self.chassis.router);
        let vectors = |events| FunctionVectors::of_events(router, events);
        let function = AssignedFunction::new(id, Arc::new(device), slots, vectors)?;
        self.container = Arc::downgrade(&container);
        Ok(function)
    }
}
