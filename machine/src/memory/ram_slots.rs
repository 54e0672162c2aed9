//! Guest RAM, registered with KVM as memory slots.
#![allow(unsafe_code)]
// UNSAFETY: memory slots hand address ranges of this process to the kernel.

use std::sync::Arc;

use hypervisor::{MemorySlot, Vm};
use vm_memory::{
    GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use super::dimms::{DIMMS_MAX, Dimm};
use super::error::MemoryError;
use super::guest_ram::GuestMemory;
use super::plugged::HotplugRam;
use super::write_tracker::WriteTracker;

impl GuestMemory {
    /// Makes RAM visible to the guest. KVM's view ends when the result is dropped.
    ///
    /// # Errors
    /// KVM rejected a slot; existing ones are removed.
    pub fn attach(&self, vm: &Arc<Vm>) -> Result<RamSlots, MemoryError> {
        let mut slots = RamSlots {
            vm: Arc::clone(vm),
            ram: self.ram().memory().into_inner(),
            set: Vec::new(),
            hotplug: Vec::new(),
            end: 0,
        };
        let regions = Arc::clone(&slots.ram);
        let in_blocks = |region: &&GuestRegionMmap| self.is_in_blocks(region.start_addr());
        for region in regions.iter().filter(|region| !in_blocks(region)) {
            slots.set(region)?;
        }
        slots.end = match self.hotplug_ram() {
            [] => slots.next() + DIMMS_MAX as u32,
            _ => slots.next(),
        };
        for hotplug in self.hotplug_ram() {
            slots.end = hotplug.attach(vm, slots.end)?;
            slots.hotplug.push(Arc::clone(hotplug));
        }
        Ok(slots)
    }
}

/// The memory slots of a machine's RAM. Keeps the RAM mapped and removes it from KVM on drop, so the guest cannot
/// access memory that has been reused.
#[derive(Debug)]
pub struct RamSlots {
    vm: Arc<Vm>,
    ram: Arc<GuestMemoryMmap<()>>,
    /// Slots 0 to their number, for RAM that the guest has as a whole.
    set: Vec<MemorySlot>,
    /// Have the slots behind them, up to `end`.
    hotplug: Vec<Arc<HotplugRam>>,
    end: u32,
}

impl RamSlots {
    /// The number of the next slot.
    fn next(&self) -> u32 {
        self.set.len() as u32
    }

    /// Starts to record the pages that the guest and this process write. Until the result is dropped, no block of
    /// memory hot-plug is opened or closed. `memory` is the RAM of these slots.
    ///
    /// # Errors
    /// KVM cannot record writes.
    pub fn track_writes(&self, memory: &GuestMemory) -> Result<WriteTracker, MemoryError> {
        let mut slots = self.set.clone();
        for hotplug in &self.hotplug {
            slots.extend(hotplug.freeze());
        }
        WriteTracker::start(&self.vm, slots, memory)
    }

    /// The number of the first slot behind them and behind those of all memory devices that can be added.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// Makes a memory device visible to the guest.
    ///
    /// # Errors
    /// KVM rejected the slot.
    pub fn add(&mut self, dimm: &Dimm) -> Result<(), MemoryError> {
        let regions = self.ram.insert_region(Arc::clone(dimm.region()));
        let regions = regions.expect("a memory device lies behind all RAM");
        self.set(dimm.region())?;
        self.ram = Arc::new(regions);
        Ok(())
    }

    /// `region` is in `ram`, or will be.
    fn set(&mut self, region: &GuestRegionMmap<()>) -> Result<(), MemoryError> {
        let guest_address = region.start_addr().0;
        let slot = MemorySlot {
            slot: self.next(),
            guest_address,
            bytes: region.len(),
            host_address: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region maps that range readable and writable for the guest alone, and
        // `self.ram` keeps it mapped until the slot has been removed again.
        unsafe { self.vm.set_memory_slot(slot) }.map_err(|source| MemoryError::Slot {
            guest_address,
            source,
        })?;
        self.set.push(slot);
        Ok(())
    }
}

impl Drop for RamSlots {
    fn drop(&mut self) {
        for hotplug in &self.hotplug {
            hotplug.detach();
        }
        for MemorySlot { slot, .. } in self.set.drain(..) {
            if let Err(error) = self.vm.remove_memory_slot(slot) {
                // KVM would continue to use the range. Keep it mapped forever, so that the guest still accesses nothing
                // but its own RAM.
                log::error!("Cannot remove memory slot {slot}: {error}");
                std::mem::forget(Arc::clone(&self.ram));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use api::config::MemoryConfig;

    use super::*;
    use crate::memory::layout::GIB;

    #[test]
    fn slots_attach_and_go_with_the_guard() {
        let Ok(kvm) = hypervisor::Kvm::open().map_err(test_skip::skip) else {
            return;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let config = MemoryConfig {
            size: 4 * GIB,
            ..MemoryConfig::default()
        };
        let memory = GuestMemory::new(&config, 46).unwrap();
        let slots = memory.attach(&vm).unwrap();
        let elsewhere = GuestMemory::new(&config, 46).unwrap();
        assert!(
            elsewhere.attach(&vm).is_err(),
            "other memory under a slot in use"
        );
        drop(slots);
        elsewhere.attach(&vm).unwrap();
    }
}
