//! What assigned devices can access: all of guest RAM, at its guest addresses; or for a device behind the virtual IOMMU,
//! what the guest maps ([`super::dma`]).
#![allow(unsafe_code)]
// UNSAFETY: gives guest RAM to devices.

use std::path::Path;
use std::sync::{Arc, Mutex};

use vfio_ioctls::{VfioContainer, VfioDeviceFd};
use virtio_devices::Unpoisoned;
use vm_memory::GuestMemoryMmap;

use super::claims::{Claim, Claims};
use super::error::AssignError;

/// A container. It exists as long as one of its devices.
pub(crate) struct Container {
    vfio: Arc<VfioContainer>,
    claims: Arc<Claims>,
    has_ram: Mutex<bool>,
}

virtio_devices::debug_fields!(Container { has_ram });

impl Container {
    /// An empty container, known to KVM.
    ///
    /// # Errors
    /// The host has no VFIO.
    pub(super) fn new(
        kvm: Arc<VfioDeviceFd>,
        claims: Arc<Claims>,
    ) -> Result<Arc<Self>, AssignError> {
        let vfio = VfioContainer::new(Some(kvm));
        Ok(Arc::new(Self {
            vfio: Arc::new(vfio.map_err(AssignError::Container)?),
            claims,
            has_ram: Mutex::new(false),
        }))
    }

    pub(super) fn vfio(&self) -> Arc<VfioContainer> {
        Arc::clone(&self.vfio)
    }

    /// Before a device is opened; kept until it is closed.
    ///
    /// # Errors
    /// As for [`Claims::claim`].
    pub(super) fn claim(&self, path: &Path) -> Result<Claim, AssignError> {
        self.claims.claim(path)
    }

    /// Maps guest RAM, and so pins every page of it, unless it is mapped already. The first device is in the container
    /// by now: without one it has no IOMMU.
    ///
    /// # Errors
    /// The IOMMU rejects it, or a limit of locked memory does. The caller drops its device, and with it the mappings.
    pub(crate) fn map_ram(&self, ram: &GuestMemoryMmap<()>) -> Result<(), AssignError> {
        let mut has_ram = self.has_ram.lock().unpoisoned();
        if !*has_ram {
            // SAFETY: guest RAM is accessed through raw pointers and volatile accesses only, because vCPUs change it at
            // any time, too. The machine drops its devices before RAM.
            unsafe { self.vfio.vfio_map_guest_memory(ram) }.map_err(AssignError::MapRam)?;
            *has_ram = true;
        }
        Ok(())
    }
}
