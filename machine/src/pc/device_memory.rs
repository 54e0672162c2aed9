//! Memory of devices that the guest maps, such as persistent memory: a KVM slot outside guest RAM, in the 64-bit window.
#![allow(unsafe_code)]
// UNSAFETY: memory slots hand address ranges of this process to the kernel.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use hypervisor::{MemorySlot, Vm as KvmVm};
use state::{StateError, parts};
use virtio_devices::Unpoisoned;
use virtio_devices::device::DeviceMemory;
use vm_allocator::RangeInclusive;
use vm_memory::MmapRegion;

use super::PcError;
use crate::assigned::{BarSlots, HostMapping};
use crate::memory::{DeviceCover, MemoryFaults};
use crate::pci::PciBus;

/// Assigns the slots after those of guest RAM.
#[derive(Debug)]
pub(super) struct DeviceSlots {
    vm: Arc<KvmVm>,
    first: u32,
    used: Mutex<BTreeSet<u32>>,
}

impl DeviceSlots {
    /// Slots below `first` are guest RAM's.
    pub(super) fn new(vm: Arc<KvmVm>, first: u32) -> Arc<Self> {
        Arc::new(Self {
            vm,
            first,
            used: Mutex::default(),
        })
    }

    /// Maps the memory of device `id` for the guest, at a free address or at that of a saved device. The mapping exists
    /// until the result is dropped.
    ///
    /// # Errors
    /// No address space is free, or KVM rejects the slot.
    pub(super) fn map(
        self: &Arc<Self>,
        pci: &Arc<PciBus>,
        id: &str,
        memory: DeviceMemory,
    ) -> Result<MappedMemory, PcError> {
        let bytes = memory.mapping.size() as u64;
        let range = match memory.start {
            Some(start) => pci.take_memory(start, bytes).ok_or_else(|| {
                let reason = format!("has memory of {id} at {start:#x}, which is not free");
                PcError::State(StateError::invalid(parts::PCI_BUS, "memory", reason))
            })?,
            None => pci
                .allocate_memory(id, bytes, memory.align_bytes)
                .map_err(|source| PcError::Device {
                    id: id.to_owned(),
                    source: source.into(),
                })?,
        };
        let number = self.take_number();
        let slot = MemorySlot {
            slot: number,
            guest_address: range.start(),
            bytes,
            host_address: memory.mapping.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the mapping is readable and writable and for the guest alone; the result keeps it mapped until the
        // slot is removed.
        if let Err(source) = unsafe { self.vm.set_memory_slot(slot) } {
            self.release_number(number);
            pci.free_memory(&range);
            return Err(PcError::Device {
                id: id.to_owned(),
                source: source.into(),
            });
        }
        Ok(MappedMemory {
            slots: Arc::clone(self),
            pci: Arc::clone(pci),
            number,
            range,
            mapping: memory.mapping,
            cover: None,
        })
    }

    pub(super) fn vm(&self) -> &KvmVm {
        &self.vm
    }

    fn take_number(&self) -> u32 {
        let mut used = self.used.lock().unpoisoned();
        let free = (self.first..).find(|slot| !used.contains(slot));
        let free = free.expect("a bus has fewer devices than there are numbers");
        used.insert(free);
        free
    }

    fn release_number(&self, number: u32) {
        self.used.lock().unpoisoned().remove(&number);
    }
}

impl BarSlots for DeviceSlots {
    fn add(&self, guest_address: u64, mapping: &HostMapping) -> io::Result<u32> {
        let number = self.take_number();
        let slot = MemorySlot {
            slot: number,
            guest_address,
            bytes: mapping.bytes(),
            host_address: mapping.address(),
            flags: 0,
        };
        // SAFETY: registers of a device, readable and writable and for the guest alone; the caller keeps them mapped
        // until the slot is removed.
        if let Err(error) = unsafe { self.vm.set_memory_slot(slot) } {
            self.release_number(number);
            return Err(io::Error::other(error));
        }
        Ok(number)
    }

    fn remove(&self, number: u32) -> io::Result<()> {
        self.vm
            .remove_memory_slot(number)
            .map_err(io::Error::other)?;
        self.release_number(number);
        Ok(())
    }
}

/// Memory that the guest sees.
#[derive(Debug)]
pub(super) struct MappedMemory {
    slots: Arc<DeviceSlots>,
    pci: Arc<PciBus>,
    number: u32,
    range: RangeInclusive,
    mapping: Arc<MmapRegion<()>>,
    /// Held for the effect of its drop.
    cover: Option<Arc<DeviceCover>>,
}

impl MappedMemory {
    /// Its guest physical address.
    pub(super) fn start(&self) -> u64 {
        self.range.start()
    }

    /// Survives missing pages, and names device `id`, from now on.
    pub(super) fn covered(mut self, faults: &MemoryFaults, id: &str) -> Self {
        let cover = faults.cover_device(id, Arc::clone(&self.mapping), self.start());
        self.cover = cover.map_or_else(
            |error| {
                log::warn!("A missing page of device {id} could end the process: {error}");
                None
            },
            Some,
        );
        self
    }
}

impl Drop for MappedMemory {
    fn drop(&mut self) {
        // Without a slot, an access of the guest leaves KVM, and with a cover it would count as a missing page.
        self.cover = None;
        if let Err(error) = self.slots.vm.remove_memory_slot(self.number) {
            // KVM would continue to use the range. Keep it mapped forever, so that the guest still accesses nothing
            // else.
            log::error!("Cannot remove memory slot {}: {error}", self.number);
            std::mem::forget(Arc::clone(&self.mapping));
            return;
        }
        self.slots.release_number(self.number);
        self.pci.free_memory(&self.range);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use hypervisor::Kvm;

    use super::*;
    use crate::bus::Bus;
    use crate::pci::{DoorbellBackend, MemoryWindows};

    const BYTES: usize = 2 << 20;

    #[test]
    fn memory_has_slots_and_addresses_of_its_own_until_it_is_dropped() {
        let Ok(kvm) = Kvm::open().map_err(test_skip::skip) else {
            return;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let windows =
            MemoryWindows::new(0xc000_0000..0xe800_0000, 0x1_0000_0000..0x2_0000_0000).unwrap();
        let doorbells = Arc::clone(&vm) as Arc<dyn DoorbellBackend>;
        let pci = Arc::new(PciBus::new(0, &Arc::new(Bus::new()), windows, doorbells));
        let slots = DeviceSlots::new(vm, 2);
        let memory = |start| DeviceMemory {
            mapping: Arc::new(MmapRegion::new(BYTES).unwrap()),
            start,
            align_bytes: BYTES as u64,
        };
        let first = slots.map(&pci, "_a", memory(None)).unwrap();
        let second = slots.map(&pci, "_b", memory(None)).unwrap();
        assert_eq!((first.number, second.number), (2, 3));
        assert_eq!(first.start(), 0x2_0000_0000 - BYTES as u64);
        assert_eq!(second.start(), first.start() - BYTES as u64);
        // A restored device cannot use the memory of another device, or RAM.
        for start in [first.start(), 0x1000, 0x2_0000_0000] {
            let error = slots.map(&pci, "_c", memory(Some(start))).unwrap_err();
            assert!(matches!(error, PcError::State(_)), "{error}");
        }
        let (number, start) = (first.number, first.start());
        drop(first);
        let restored = slots.map(&pci, "_a", memory(Some(start))).unwrap();
        assert_eq!((restored.number, restored.start()), (number, start));
        // A device cannot have more memory than the window.
        let large = DeviceMemory {
            align_bytes: 1 << 40,
            ..memory(None)
        };
        let error = slots.map(&pci, "_d", large).unwrap_err();
        assert!(matches!(error, PcError::Device { .. }), "{error}");
        assert_eq!(
            slots.used.lock().unwrap().len(),
            2,
            "nothing is left behind"
        );
    }
}
