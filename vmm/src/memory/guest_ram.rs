//! Guest RAM: mapped in this process, and given to KVM as memory slots.
#![allow(unsafe_code)]
// UNSAFETY: memory slots hand address ranges of this process to the kernel.

use std::sync::Arc;

use ::api::config::MemoryConfig;
use hypervisor::{MemorySlot, Vm};
use virtio_devices::GuestRam;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use super::backing::Backing;
use super::layout::AddressMap;
use super::{E820Entry, MemoryError, e820_map};

/// The RAM of one machine and the map it lies in.
#[derive(Debug, Clone)]
pub struct GuestMemory {
    ram: GuestRam,
    map: AddressMap,
}

impl GuestMemory {
    /// Checks the configuration, then maps RAM as it says. `phys_bits` is the width of the
    /// guest's physical addresses ([`crate::cpu::guest_phys_bits`]).
    ///
    /// # Errors
    /// A size that cannot be, found before anything is made; or the host has not got the memory.
    pub fn new(config: &MemoryConfig, phys_bits: u8) -> Result<Self, MemoryError> {
        let (map, backing) = Self::plan(config, phys_bits)?;
        let regions = map
            .ram
            .iter()
            .map(|range| {
                let mapping = backing.map(range.end - range.start)?;
                GuestRegionMmap::new(mapping, GuestAddress(range.start))
                    .ok_or(MemoryError::SizeOverflow)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mmap = GuestMemoryMmap::from_regions(regions)
            .expect("the address map has at least one range, in order and without overlap");
        Ok(Self {
            ram: GuestRam::new(mmap),
            map,
        })
    }

    /// Checks the configuration and makes nothing.
    ///
    /// # Errors
    /// As [`GuestMemory::new`], but for what only the host can refuse.
    pub fn validate(config: &MemoryConfig, phys_bits: u8) -> Result<(), MemoryError> {
        Self::plan(config, phys_bits).map(|_plan| ())
    }

    fn plan(config: &MemoryConfig, phys_bits: u8) -> Result<(AddressMap, Backing), MemoryError> {
        let unsupported = [
            (config.zones.iter().flatten().next().is_some(), "zones"),
            (
                config.hotplug_size.is_some_and(|bytes| bytes > 0),
                "hotplug",
            ),
            (
                config.hotplugged_size.is_some_and(|bytes| bytes > 0),
                "hotplug",
            ),
        ];
        if let Some((_, what)) = unsupported.into_iter().find(|(asked, _)| *asked) {
            return Err(MemoryError::NotSupported { what });
        }
        let backing = Backing::new(config)?;
        let map = AddressMap::new(config.size, phys_bits)?;
        let page_bytes = backing.page_bytes();
        if !config.size.is_multiple_of(page_bytes) {
            return Err(MemoryError::NotPageMultiple {
                bytes: config.size,
                page_bytes,
            });
        }
        Ok((map, backing))
    }

    /// RAM as devices and loaders use it.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Where everything lies.
    pub fn map(&self) -> &AddressMap {
        &self.map
    }

    /// What the guest is told of it.
    pub fn e820(&self) -> Vec<E820Entry> {
        e820_map(&self.map)
    }

    /// Makes RAM visible to the guest. KVM's view ends when the result is dropped.
    ///
    /// # Errors
    /// KVM refused a slot; the ones already made are removed.
    pub fn attach(&self, vm: &Arc<Vm>) -> Result<RamSlots, MemoryError> {
        let mut slots = RamSlots {
            vm: Arc::clone(vm),
            ram: self.ram.memory().into_inner(),
            count: 0,
        };
        let regions = Arc::clone(&slots.ram);
        for region in regions.iter() {
            let guest_address = region.start_addr().0;
            let slot = MemorySlot {
                slot: slots.count,
                guest_address,
                bytes: region.len(),
                host_address: region.as_ptr() as u64,
                flags: 0,
            };
            // SAFETY: the region maps that range readable and writable for the guest alone, and
            // `slots` keeps it mapped until it has removed the slot again.
            unsafe { vm.set_memory_slot(slot) }.map_err(|source| MemoryError::Slot {
                guest_address,
                source,
            })?;
            slots.count += 1;
        }
        Ok(slots)
    }
}

/// The memory slots of a machine's RAM. Keeps the RAM mapped, and takes it away from KVM on drop,
/// so the guest cannot reach memory that has become something else.
#[derive(Debug)]
pub struct RamSlots {
    vm: Arc<Vm>,
    ram: Arc<GuestMemoryMmap<()>>,
    /// Slots 0 to `count` exist.
    count: u32,
}

impl Drop for RamSlots {
    fn drop(&mut self) {
        for slot in 0..self.count {
            if let Err(error) = self.vm.remove_memory_slot(slot) {
                // KVM would go on using the range: keep it mapped for good, for then the
                // guest can still reach nothing but its own RAM.
                log::error!("Memory slot {slot} stays: {error}");
                std::mem::forget(Arc::clone(&self.ram));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::{GIB, MIB};
    use vm_memory::Bytes;

    fn config(bytes: u64) -> MemoryConfig {
        MemoryConfig {
            size: bytes,
            ..MemoryConfig::default()
        }
    }

    #[test]
    fn ram_large_is_two_regions_around_the_hole() {
        let memory = GuestMemory::new(&config(5 * GIB), 46).unwrap();
        let ram = memory.ram().memory();
        assert_eq!(ram.num_regions(), 2);
        ram.write_obj(7u32, GuestAddress(6 * GIB - 4)).unwrap();
        assert!(ram.write_obj(7u32, GuestAddress(3 * GIB)).is_err());
    }

    #[test]
    fn ram_not_a_multiple_of_huge_pages_is_refused() {
        let config = MemoryConfig {
            hugepages: true,
            hugepage_size: Some(2 * MIB),
            ..config(63 * MIB)
        };
        assert!(matches!(
            GuestMemory::validate(&config, 46),
            Err(MemoryError::NotPageMultiple { page_bytes, .. }) if page_bytes == 2 * MIB
        ));
    }

    #[test]
    fn ram_of_unsupported_kind_is_refused() {
        let config = MemoryConfig {
            hotplug_size: Some(GIB),
            ..config(GIB)
        };
        assert!(matches!(
            GuestMemory::validate(&config, 46),
            Err(MemoryError::NotSupported { what: "hotplug" })
        ));
    }

    #[test]
    fn ram_more_than_the_host_can_map_is_an_error() {
        // A process has 47 bits of address, all of which the guest would fill.
        assert!(matches!(
            GuestMemory::new(&config(1 << 47), 52),
            Err(MemoryError::Map { .. })
        ));
    }

    #[test]
    fn slots_attach_and_go_with_the_guard() {
        let Ok(kvm) = hypervisor::Kvm::open() else {
            println!("skipped: no KVM");
            return;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let memory = GuestMemory::new(&config(4 * GIB), 46).unwrap();
        let slots = memory.attach(&vm).unwrap();
        let elsewhere = GuestMemory::new(&config(4 * GIB), 46).unwrap();
        assert!(
            elsewhere.attach(&vm).is_err(),
            "other memory under a slot in use"
        );
        drop(slots);
        elsewhere.attach(&vm).unwrap();
    }
}
