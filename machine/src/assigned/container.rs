//! Memory that assigned devices can access: all of guest RAM at its guest addresses. A device behind the virtual IOMMU
//! can access only what the guest maps ([`super::dma`]).

use std::any::Any;
use std::io;
use std::sync::{Arc, Mutex};

use vfio_ioctls::{VfioContainer, VfioDeviceFd};
use virtio_devices::{Unpoisoned, file_system};
use vm_memory::{
    GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, Permissions, VolatileSlice,
};

use super::claims::{Claims, Occupancy};
use super::error::AssignError;
use super::iommu_calls::{PAGE_BYTES, map, unmap};
use crate::memory::{GuestMemory, PinnedBlocks};

/// A container. It exists while any of its devices exists.
pub(crate) struct Container {
    vfio: Arc<VfioContainer>,
    occupancy: Arc<Occupancy>,
    claims: Arc<Claims>,
    has_ram: Mutex<bool>,
    /// Dropped after `vfio`, whose end ends all mappings.
    kept: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
}

virtio_devices::debug_fields!(Container { occupancy, has_ram });

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
            occupancy: Arc::default(),
            claims,
            has_ram: Mutex::new(false),
            kept: Mutex::default(),
        }))
    }

    pub(super) fn vfio(&self) -> Arc<VfioContainer> {
        Arc::clone(&self.vfio)
    }

    /// Keeps `value` until the kernel has ended all mappings.
    pub(super) fn keep(&self, value: Arc<dyn Any + Send + Sync>) {
        self.kept.lock().unpoisoned().push(value);
    }

    pub(super) fn occupancy(&self) -> &Arc<Occupancy> {
        &self.occupancy
    }

    /// What failed because the kernel has ended all mappings has not failed: no device has access any more.
    fn unless_emptied(&self, result: io::Result<()>) -> io::Result<()> {
        result.or_else(|error| match self.occupancy.is_emptied() {
            true => Ok(()),
            false => Err(error),
        })
    }

    pub(super) fn claims(&self) -> &Arc<Claims> {
        &self.claims
    }

    /// Maps guest RAM, and so pins every page of it, unless it is mapped already. The first device is in the container
    /// by now: without one it has no IOMMU. Of memory for hot-plug, only plugged blocks are mapped, now and later.
    ///
    /// # Errors
    /// The IOMMU rejects it, or a limit of locked memory does. The caller drops its device, and with it the mappings.
    pub(crate) fn map_ram(self: &Arc<Self>, memory: &GuestMemory) -> Result<(), AssignError> {
        let mut has_ram = self.has_ram.lock().unpoisoned();
        if *has_ram {
            return Ok(());
        }
        let ram = memory.ram().memory();
        for region in ram.iter() {
            if !memory.is_in_blocks(region.start_addr()) {
                self.map_region(region)?;
            }
        }
        for hotplug in memory.hotplug_ram() {
            let blocks = Arc::clone(self) as Arc<dyn PinnedBlocks>;
            hotplug.pin_with(&blocks).map_err(AssignError::MapRam)?;
        }
        *has_ram = true;
        Ok(())
    }

    /// Maps a region of guest RAM.
    ///
    /// # Errors
    /// As for [`Container::map_ram`].
    pub(crate) fn map_region(&self, region: &GuestRegionMmap<()>) -> Result<(), AssignError> {
        let whole = region.as_volatile_slice().map_err(io::Error::other);
        let mapped = whole.and_then(|whole| self.pin(region.start_addr().0, &whole));
        mapped.map_err(|error| refused(region, error))
    }

    /// Checks that the kernel pins pages of all RAM, while the container is empty. `input` is an address that can be
    /// mapped.
    ///
    /// # Errors
    /// It does not.
    pub(super) fn check_ram(
        &self,
        ram: &GuestMemoryMmap<()>,
        input: u64,
    ) -> Result<(), AssignError> {
        for region in ram.iter().filter(|it| is_in_ordinary_file(it)) {
            let page = region.get_slice(MemoryRegionAddress(0), PAGE_BYTES as usize);
            let page = page.map_err(io::Error::other);
            let mapped = page.and_then(|page| self.pin(input, &page));
            mapped.map_err(|error| refused(region, error))?;
            self.unpin(input, PAGE_BYTES).map_err(AssignError::Host)?;
        }
        Ok(())
    }

    /// Undoes that, before the region is unmapped.
    pub(crate) fn unmap_region(&self, region: &GuestRegionMmap<()>) {
        let (start, bytes) = (region.start_addr().0, region.len());
        if let Err(error) = self.unpin(start, bytes) {
            // Devices that know no address in it do no harm.
            log::error!("RAM at {start:#x} stays pinned: {error}");
        }
    }
}

impl PinnedBlocks for Container {
    fn pin(&self, guest_address: u64, block: &VolatileSlice<'_>) -> io::Result<()> {
        let mapped = map(&self.vfio, guest_address, block, Permissions::ReadWrite);
        self.unless_emptied(mapped)
    }

    fn unpin(&self, guest_address: u64, bytes: u64) -> io::Result<()> {
        self.unless_emptied(unmap(&self.vfio, guest_address, bytes))
    }
}

/// Whether guest writes go to a file that is not memory alone.
fn is_in_ordinary_file(region: &GuestRegionMmap<()>) -> bool {
    let file = region
        .file_offset()
        .filter(|_| region.flags() & libc::MAP_SHARED != 0);
    file.is_some_and(|file| !file_system::is_in_memory(file.file()))
}

/// Why a region was not mapped.
fn refused(region: &GuestRegionMmap<()>, error: io::Error) -> AssignError {
    match error.raw_os_error() {
        Some(libc::EFAULT | libc::EOPNOTSUPP) if is_in_ordinary_file(region) => {
            AssignError::OrdinaryFile {
                start: region.start_addr().0,
            }
        }
        _ => AssignError::MapRam(error),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use api::config::MemoryConfig;
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{FileOffset, GuestAddress};

    use super::*;

    #[test]
    fn ram_in_an_ordinary_file_is_named_if_it_cannot_be_pinned() {
        let region = |file: Option<File>, sharing| {
            let mut builder = MmapRegionBuilder::new(PAGE_BYTES as usize)
                .with_mmap_prot(libc::PROT_READ)
                .with_mmap_flags(sharing);
            if let Some(file) = file {
                builder = builder.with_file_offset(FileOffset::new(file, 0));
            }
            GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0x7000)).unwrap()
        };
        // The program that runs: on a disk, if this is not a folder in memory.
        let program = || File::open("/proc/self/exe").unwrap();
        if file_system::is_in_memory(&program()) {
            test_skip::skip("the programs are in memory");
            return;
        }
        let config = MemoryConfig {
            size: 64 << 20,
            shared: true,
            ..MemoryConfig::default()
        };
        let memory = GuestMemory::new(&config, 46).unwrap();
        let ram = memory.ram().memory();
        let memfd = ram.iter().next().unwrap().file_offset().unwrap().file();
        let (shared, private) = (libc::MAP_SHARED, libc::MAP_PRIVATE);
        let anonymous = private | libc::MAP_ANONYMOUS;
        for (file, sharing, is_ordinary) in [
            (Some(program()), shared, true),
            (Some(program()), private, false),
            (Some(memfd.try_clone().unwrap()), shared, false),
            (None, anonymous, false),
        ] {
            let region = region(file, sharing);
            for (number, is_of_files) in [(libc::EFAULT, true), (libc::ENOMEM, false)] {
                let error = refused(&region, io::Error::from_raw_os_error(number)).to_string();
                let names_file = error.contains("RAM at 0x7000") && error.contains("tmpfs");
                assert_eq!(names_file, is_ordinary && is_of_files, "{error}");
            }
        }
    }
}
