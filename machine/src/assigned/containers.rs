//! State that the assigned devices of a machine share.

use std::path::Path;
use std::sync::{Arc, Weak};

use vfio_ioctls::VfioDeviceFd;

use super::claims::Claims;
use super::container::Container;
use super::error::AssignError;
use super::host::VfioFunction;

/// The containers of a machine: one for all devices that access all of RAM, and one for each device behind the virtual
/// IOMMU.
#[derive(Debug, Default)]
pub(crate) struct Containers {
    /// KVM's side. It exists until the machine ends, because some kernels do not create another one.
    kvm: Option<Arc<VfioDeviceFd>>,
    claims: Arc<Claims>,
    shared: Weak<Container>,
}

impl Containers {
    /// Whether devices have all of RAM pinned.
    pub(crate) fn have_pinned_all(&self) -> bool {
        self.shared.strong_count() > 0
    }

    /// The container that maps all of RAM, if it has a device.
    pub(crate) fn of_all(&self) -> Option<Arc<Container>> {
        self.shared.upgrade()
    }

    /// Opens the device whose folder in sysfs is `path`, in the container that maps all of RAM, or in a new one.
    ///
    /// # Errors
    /// The host has no VFIO, or as [`VfioFunction::open`].
    pub(crate) fn open_shared(
        &mut self,
        vm: &hypervisor::Vm,
        path: &Path,
    ) -> Result<(Arc<Container>, VfioFunction), AssignError> {
        let mut open = || {
            let container = self.shared(vm)?;
            Ok((Arc::clone(&container), VfioFunction::open(path, container)?))
        };
        match open() {
            // A vCPU has removed the last device meanwhile. Only this thread adds devices, so the next one is new.
            Err(AssignError::ContainerEmptied { .. }) => open(),
            opened => opened,
        }
    }

    /// The container that maps all of RAM, or a new one.
    ///
    /// # Errors
    /// The host has no VFIO.
    pub(super) fn shared(&mut self, vm: &hypervisor::Vm) -> Result<Arc<Container>, AssignError> {
        let known = self.shared.upgrade();
        if let Some(container) = known.filter(|it| !it.occupancy().is_emptied()) {
            return Ok(container);
        }
        let container = self.own(vm)?;
        self.shared = Arc::downgrade(&container);
        Ok(container)
    }

    /// A container for one device.
    ///
    /// # Errors
    /// The host has no VFIO.
    pub(crate) fn own(&mut self, vm: &hypervisor::Vm) -> Result<Arc<Container>, AssignError> {
        let kvm = match &self.kvm {
            Some(kvm) => Arc::clone(kvm),
            None => {
                let in_kvm = vm.create_vfio_device().map_err(AssignError::Kvm)?;
                let kvm = Arc::new(VfioDeviceFd::new_from_kvm(in_kvm));
                Arc::clone(self.kvm.insert(kvm))
            }
        };
        Container::new(kvm, Arc::clone(&self.claims))
    }
}
