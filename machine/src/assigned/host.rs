//! The device of the host behind an assigned function.
#![allow(unsafe_code)]
// UNSAFETY: maps registers of the device into this process, and duplicates and closes a descriptor of a crate.

use std::any::Any;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError, VfioOps, VfioRegionInfoCap};
use virtio_devices::counters::Count;
use vmm_sys_util::eventfd::EventFd;

use super::claims::Claim;
use super::container::Container;
use super::error::AssignError;

/// Number of BAR registers.
pub(super) const BARS: u8 = 6;

/// How a device interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InterruptKind {
    Msi,
    Msix,
}

/// The device, as the function uses it. Called by vCPU threads and by the thread that owns the machine.
pub(crate) trait HostDevice: Send + Sync {
    /// Reads configuration space: 1, 2 or 4 bytes, naturally aligned. All ones if the device does not answer.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// The size of a BAR; 0 if there is none.
    fn bar_bytes(&self, index: u8) -> u64;
    /// The parts of a BAR that the host lets this process map, page by page.
    fn bar_areas(&self, index: u8) -> Vec<Range<u64>>;
    /// Maps such a part, or a part of it.
    ///
    /// # Errors
    /// The host refuses.
    fn map(&self, index: u8, area: &Range<u64>) -> io::Result<HostMapping>;
    /// Reads from a BAR. All ones if the device does not answer.
    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]);
    /// Writes to a BAR.
    fn bar_write(&self, index: u8, offset: u64, data: &[u8]);
    /// Makes the device signal these events, one for each vector; none switches interrupts of this kind off.
    ///
    /// # Errors
    /// The host refuses.
    fn set_interrupts(&self, kind: InterruptKind, events: &[EventFd]) -> Result<(), VfioError>;
    /// Resets the device, if it can be reset.
    fn reset(&self);
    /// Number of accesses that the device did not answer.
    fn unanswered_accesses(&self) -> u64;
}

/// Registers of a device, mapped into this process.
#[derive(Debug)]
pub(crate) struct HostMapping {
    address: *mut libc::c_void,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, and nothing is read or written through it here.
unsafe impl Send for HostMapping {}
// SAFETY: as above.
unsafe impl Sync for HostMapping {}

impl HostMapping {
    /// Maps `bytes` bytes of `file` from `offset` on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn new(file: &File, offset: u64, bytes: u64) -> io::Result<Self> {
        let too_large = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
        let length = usize::try_from(bytes).map_err(too_large)?;
        let offset = libc::off_t::try_from(offset).map_err(too_large)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses the address, so no other mapping is replaced.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                access,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            address,
            bytes: length,
        })
    }

    pub(crate) fn address(&self) -> u64 {
        self.address as u64
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes as u64
    }
}

impl Drop for HostMapping {
    fn drop(&mut self) {
        // SAFETY: this value created the mapping; KVM's slots over it were removed before.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}

/// The container as the crate sees it. The crate releases a group with each of its devices, even if others are open. It
/// therefore finds the container only while it may release the group.
struct GroupOwner {
    container: Arc<VfioContainer>,
    keeps_group: AtomicBool,
}

impl VfioOps for GroupOwner {
    fn as_any(&self) -> &dyn Any {
        match self.keeps_group.load(Ordering::Relaxed) {
            true => &(),
            false => &*self.container,
        }
    }
}

/// An open device of the crate.
struct OpenDevice {
    owner: Arc<GroupOwner>,
    device: ManuallyDrop<VfioDevice>,
}

impl OpenDevice {
    /// Until [`OpenDevice::may_release_group`], the group outlives the device.
    fn new(path: &Path, container: Arc<VfioContainer>) -> Result<Self, VfioError> {
        let owner = Arc::new(GroupOwner {
            container,
            keeps_group: AtomicBool::new(false),
        });
        let device = VfioDevice::new(path, Arc::clone(&owner) as Arc<dyn VfioOps>, false)?;
        owner.keeps_group.store(true, Ordering::Relaxed);
        Ok(Self {
            owner,
            device: ManuallyDrop::new(device),
        })
    }

    /// The end of the device releases its group.
    fn may_release_group(&self) {
        self.owner.keeps_group.store(false, Ordering::Relaxed);
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        let descriptor = self.device.as_raw_fd();
        // SAFETY: it is not used or dropped again.
        unsafe { ManuallyDrop::drop(&mut self.device) };
        if self.owner.keeps_group.load(Ordering::Relaxed) {
            // SAFETY: the crate closes the descriptor only if it finds the container, and nothing else has it.
            drop(unsafe { OwnedFd::from_raw_fd(descriptor) });
        }
    }
}

/// A device behind vfio-pci.
pub(crate) struct VfioFunction {
    path: PathBuf,
    /// The device's own descriptor, closed before `device`.
    file: ManuallyDrop<File>,
    device: ManuallyDrop<OpenDevice>,
    claim: Claim,
    /// The mappings of guest RAM, while the device can access it.
    container: ManuallyDrop<Arc<Container>>,
    /// Accesses that the device did not answer.
    unanswered: Count,
}

virtio_devices::debug_fields!(VfioFunction { path, unanswered });

impl VfioFunction {
    /// Opens the device whose folder in sysfs is `path`.
    ///
    /// # Errors
    /// It or its group is not bound to vfio-pci, or is assigned already.
    pub(crate) fn open(path: &Path, container: Arc<Container>) -> Result<Self, AssignError> {
        let claims = container.claims();
        let ((device, file), claim) = claims.open(path, container.occupancy(), |is_first| {
            let opened = OpenDevice::new(path, container.vfio());
            let device = opened.map_err(|source| AssignError::of_open(path, source))?;
            // SAFETY: the descriptor is open as long as `device`, which outlives this statement.
            let lent = unsafe { BorrowedFd::borrow_raw(device.device.as_raw_fd()) };
            match lent.try_clone_to_owned() {
                Ok(file) => Ok((device, file)),
                Err(error) => {
                    if is_first {
                        device.may_release_group();
                    }
                    Err(AssignError::Host(error))
                }
            }
        })?;
        Ok(Self {
            path: path.to_owned(),
            file: ManuallyDrop::new(file.into()),
            device: ManuallyDrop::new(device),
            claim,
            container: ManuallyDrop::new(container),
            unanswered: Count::default(),
        })
    }

    fn device(&self) -> &VfioDevice {
        &self.device.device
    }

    /// The place of `bytes` bytes at `offset` of a region in the device's file.
    fn place(&self, region: u32, offset: u64, bytes: usize) -> Option<u64> {
        let end = offset.checked_add(bytes as u64)?;
        let start = self.device().get_region_offset(region);
        (end <= self.device().get_region_size(region)).then_some(start + offset)
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) {
        let place = self.place(region, offset, data.len());
        let read = place.is_some_and(|place| self.file.read_exact_at(data, place).is_ok());
        if !read {
            data.fill(0xff);
            self.count_failure();
        }
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) {
        let place = self.place(region, offset, data.len());
        let written = place.is_some_and(|place| self.file.write_all_at(data, place).is_ok());
        if !written {
            self.count_failure();
        }
    }

    fn count_failure(&self) {
        if self.unanswered.count_loudly() {
            log::warn!("{} does not answer", self.path.display());
        }
    }
}

impl Drop for VfioFunction {
    fn drop(&mut self) {
        // The crate finds the group by this link, and panics if it is gone. KVM then keeps the group of a device that has
        // vanished, and what the group can access stays pinned.
        let is_present = std::fs::read_link(self.path.join("iommu_group")).is_ok();
        let (file, device) = (&mut self.file, &mut self.device);
        self.claim.close(is_present, |is_last| {
            if is_last && is_present {
                device.may_release_group();
            }
            // SAFETY: neither is used or dropped again.
            unsafe {
                ManuallyDrop::drop(file);
                ManuallyDrop::drop(device);
            }
        });
        if is_present {
            // SAFETY: it is not used or dropped again.
            unsafe { ManuallyDrop::drop(&mut self.container) };
        }
    }
}

impl HostDevice for VfioFunction {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.read(VFIO_PCI_CONFIG_REGION_INDEX, u64::from(offset), data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.write(VFIO_PCI_CONFIG_REGION_INDEX, u64::from(offset), data);
    }

    fn bar_bytes(&self, index: u8) -> u64 {
        match index < BARS {
            true => self.device().get_region_size(u32::from(index)),
            false => 0,
        }
    }

    fn bar_areas(&self, index: u8) -> Vec<Range<u64>> {
        let region = u32::from(index);
        if self.device().get_region_flags(region) & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            return Vec::new();
        }
        let mut sparse = self.device().get_region_caps(region).into_iter();
        let sparse = sparse.find_map(|capability| match capability {
            VfioRegionInfoCap::SparseMmap(sparse) => Some(sparse.areas),
            _ => None,
        });
        match sparse {
            Some(areas) => areas
                .iter()
                .map(|area| area.offset..area.offset.saturating_add(area.size))
                .collect(),
            None => std::iter::once(0..self.device().get_region_size(region)).collect(),
        }
    }

    fn map(&self, index: u8, area: &Range<u64>) -> io::Result<HostMapping> {
        let offset = self.device().get_region_offset(u32::from(index)) + area.start;
        HostMapping::new(&self.file, offset, area.end - area.start)
    }

    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) {
        self.read(u32::from(index), offset, data);
    }

    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) {
        self.write(u32::from(index), offset, data);
    }

    fn set_interrupts(&self, kind: InterruptKind, events: &[EventFd]) -> Result<(), VfioError> {
        let index = match kind {
            InterruptKind::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            InterruptKind::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
        };
        match events {
            [] => self.device().disable_irq(index),
            events => self.device().enable_irq(index, events.iter().collect()),
        }
    }

    fn reset(&self) {
        self.device().reset();
    }

    fn unanswered_accesses(&self) -> u64 {
        self.unanswered.get()
    }
}
