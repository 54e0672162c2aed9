//! The host's IOMMU in front of one device: a container with only the guest's mappings.

use std::any::Any;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use virtio_devices::iommu::HostIommu;
use vm_memory::{GuestAddressSpace, Permissions, VolatileSlice};

use super::container::Container;
use super::error::AssignError;
use super::iommu_calls::{PAGE_BYTES, map, read_info, unmap};
use crate::memory::GuestMemory;

/// The container of a device that is behind the virtual IOMMU.
#[derive(Debug)]
pub(crate) struct DeviceIommu {
    container: Arc<Container>,
    usable: Vec<RangeInclusive<u64>>,
}

impl DeviceIommu {
    /// Reads the properties of the container's IOMMU. The container has a device, and no mappings.
    ///
    /// # Errors
    /// The kernel does not answer, the IOMMU has larger pages than the guest, or RAM cannot be pinned.
    pub(crate) fn new(
        container: Arc<Container>,
        memory: &GuestMemory,
    ) -> Result<Self, AssignError> {
        let info = read_info(&container.vfio()).map_err(AssignError::Host)?;
        if info.page_sizes & PAGE_BYTES == 0 {
            return Err(AssignError::IommuPages {
                page_sizes: info.page_sizes,
            });
        }
        let first = info.usable.first().map_or(0, |range| *range.start());
        container.check_ram(&memory.ram().memory(), first)?;
        Ok(Self {
            container,
            usable: info.usable,
        })
    }
}

impl HostIommu for DeviceIommu {
    fn usable(&self) -> &[RangeInclusive<u64>] {
        &self.usable
    }

    fn map(&self, input: u64, memory: &VolatileSlice<'_>, allows: Permissions) -> io::Result<()> {
        map(&self.container.vfio(), input, memory, allows)
    }

    fn unmap(&self, input: u64, bytes: u64) -> io::Result<()> {
        unmap(&self.container.vfio(), input, bytes)
    }

    fn keep(&self, value: Arc<dyn Any + Send + Sync>) {
        self.container.keep(value);
    }
}
