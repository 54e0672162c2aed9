//! Guest RAM, or the memory of a device, that the host fails to provide while the machine runs. Causes are an empty
//! pool of huge pages, a full file system, a truncated file, and defective memory.
//!
//! | Access | Detected by | Can be repeated |
//! | --- | --- | --- |
//! | by a vCPU | `KVM_RUN` fails | yes |
//! | by a vCPU, and KVM tries again endlessly | page faults without result (`cpu/stall.rs`) | yes |
//! | by KVM's emulator for a vCPU | an exit with an address in RAM | no |
//! | by KVM, of page tables, handlers or code | a triple fault or a failed emulation, and then by the vCPU's thread (`cpu/exception_path.rs`) | no |
//! | by a thread of ours | SIGBUS ([`super::bus_error`]) | no |

use std::io;
use std::sync::{Arc, Mutex, Weak};

use virtio_devices::{Unpoisoned, file_system};
use vm_memory::{GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::bus_error::Cover;
use super::layout::PAGE_BYTES;
use super::zones::Zone;
use crate::signals::VmSignals;

/// An access to RAM that the host could not provide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryFault {
    /// A vCPU waits for it.
    Vcpu {
        /// Its index.
        vcpu: u32,
    },
    /// KVM's emulator read ones, or dropped a write.
    Emulated {
        /// Guest address.
        address: u64,
    },
    /// A thread of the VMM found zeros.
    Vmm {
        /// Guest address.
        address: u64,
    },
}

/// The description of such an access for the machine's owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryFailure {
    /// The kind of fault.
    pub reason: String,
    /// The guest can continue once the host has memory again.
    pub can_continue: bool,
}

/// Collects the faults of one machine and notifies its owner.
#[derive(Debug)]
pub struct MemoryFaults {
    signals: Arc<VmSignals>,
    first: Mutex<Option<MemoryFault>>,
    covers: Mutex<Covers>,
}

/// While it exists, missing pages of a device's memory are survived and named.
#[derive(Debug)]
pub(crate) struct DeviceCover {
    id: String,
    cover: Cover,
}

#[derive(Debug, Default)]
struct Covers {
    ram: Vec<Cover>,
    devices: Vec<Weak<DeviceCover>>,
    /// A page was replaced by zeros.
    lost: bool,
}

impl Covers {
    fn each(&self, mut look: impl FnMut(&Cover)) {
        self.ram.iter().for_each(&mut look);
        let devices = self.devices.iter().filter_map(Weak::upgrade);
        devices.for_each(|device| look(&device.cover));
    }

    fn device_at(&self, address: u64) -> Option<Arc<DeviceCover>> {
        let mut devices = self.devices.iter().filter_map(Weak::upgrade);
        devices.find(|device| device.cover.holds(address))
    }
}

impl MemoryFaults {
    pub(super) fn new(signals: &Arc<VmSignals>) -> Self {
        Self {
            signals: Arc::clone(signals),
            first: Mutex::new(None),
            covers: Mutex::default(),
        }
    }

    /// Survives SIGBUS in `region`, which has pages of `page_bytes`.
    pub(super) fn cover(&self, region: &GuestRegionMmap<()>, page_bytes: u64) -> io::Result<()> {
        let event = Arc::clone(&self.signals.memory);
        let guest_address = region.start_addr().0;
        let cover = Cover::new(region.get_mmap(), guest_address, page_bytes, event)?;
        self.covers.lock().unpoisoned().ram.push(cover);
        Ok(())
    }

    /// Survives SIGBUS in the memory of device `id`, which the guest has at `guest_address`, as long as the result exists.
    ///
    /// # Errors
    /// There are too many regions.
    pub(crate) fn cover_device(
        &self,
        id: &str,
        mapping: Arc<MmapRegion<()>>,
        guest_address: u64,
    ) -> io::Result<Arc<DeviceCover>> {
        let event = Arc::clone(&self.signals.memory);
        let file = mapping.file_offset();
        let huge_page_bytes = file.and_then(|file| file_system::huge_page_bytes(file.file()));
        let page_bytes = huge_page_bytes.unwrap_or(PAGE_BYTES);
        let cover = Cover::new(mapping, guest_address, page_bytes, event)?;
        let device = Arc::new(DeviceCover {
            id: id.to_owned(),
            cover,
        });
        let mut covers = self.covers.lock().unpoisoned();
        covers.devices.retain(|device| device.strong_count() > 0);
        covers.devices.push(Arc::downgrade(&device));
        Ok(device)
    }

    /// Whether a device has memory.
    pub(crate) fn covers_devices(&self) -> bool {
        let covers = self.covers.lock().unpoisoned();
        covers.devices.iter().any(|it| it.strong_count() > 0)
    }

    /// Whether the memory of a device is at this guest address.
    pub(crate) fn is_of_device(&self, address: u64) -> bool {
        self.covers.lock().unpoisoned().device_at(address).is_some()
    }

    /// Reads a word of a device's memory.
    pub(crate) fn read_of_device(&self, address: u64) -> Option<u64> {
        let device = self.covers.lock().unpoisoned().device_at(address)?;
        device.cover.read(address)
    }

    /// Keeps the first fault and notifies the owner.
    pub(crate) fn add(&self, fault: MemoryFault) {
        self.first.lock().unpoisoned().get_or_insert(fault);
        if let Err(error) = self.signals.memory.write(1) {
            log::error!("Cannot notify the control thread of missing RAM: {error}");
        }
    }

    /// The first fault since the last call. A fault after which the guest cannot continue comes first.
    pub(crate) fn take(&self) -> Option<MemoryFault> {
        let noted = self.first.lock().unpoisoned().take();
        let mut covers = self.covers.lock().unpoisoned();
        // Takes those of all covers.
        let mut ours = None;
        covers.each(|cover| ours = ours.or(cover.take_fault()));
        covers.lost |= ours.is_some();
        ours.map(|address| MemoryFault::Vmm { address }).or(noted)
    }

    /// Whether a thread of the VMM has found zeros in place of a page. The machine cannot continue.
    pub(crate) fn has_lost(&self) -> bool {
        let covers = self.covers.lock().unpoisoned();
        let mut lost = covers.lost;
        covers.each(|cover| lost |= cover.has_fault());
        lost
    }

    /// Explains the fault of a machine with `zones`.
    pub(crate) fn explain(&self, fault: MemoryFault, zones: &[Zone]) -> MemoryFailure {
        let (reason, can_continue) = match fault {
            MemoryFault::Vcpu { vcpu } => (
                format!("{} that vCPU {vcpu} touched", self.that_may_run_out(zones)),
                true,
            ),
            MemoryFault::Emulated { address } => (self.place("a vCPU", address, zones), false),
            MemoryFault::Vmm { address } => (self.place("the VMM", address, zones), false),
        };
        MemoryFailure {
            reason: format!(
                "the host cannot provide {reason}: no huge pages are left, a file system is full, a memory file is too \
                 short, or memory is defective"
            ),
            can_continue,
        }
    }

    /// The memory that a vCPU may wait for; KVM does not report its address.
    fn that_may_run_out(&self, zones: &[Zone]) -> String {
        let zones = zones.iter().filter(|zone| zone.may_run_out());
        let zones = zones.map(|zone| format!("RAM of memory zone {} ({})", zone.id, zone.backing));
        let covers = self.covers.lock().unpoisoned();
        let devices = covers.devices.iter().filter_map(Weak::upgrade);
        let devices = devices.map(|device| format!("memory of device {}", device.id));
        match zones.chain(devices).collect::<Vec<_>>().join(" or ") {
            none if none.is_empty() => "RAM".to_owned(),
            names => names,
        }
    }

    fn place(&self, who: &str, address: u64, zones: &[Zone]) -> String {
        if let Some(device) = self.covers.lock().unpoisoned().device_at(address) {
            let id = &device.id;
            return format!(
                "memory of device {id} that {who} accessed at guest address {address:#x}"
            );
        }
        let zone = zones.iter().find(|zone| zone.holds(address));
        let zone = zone.map_or_else(String::new, |zone| {
            format!(" in memory zone {} ({})", zone.id, zone.backing)
        });
        format!("RAM that {who} accessed at guest address {address:#x}{zone}")
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use api::config::{MemoryConfig, MemoryZoneConfig};
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

    use super::*;
    use crate::memory::GuestMemory;
    use crate::memory::bus_error::SLOTS_MAX;
    use crate::memory::layout::MIB;

    /// Memory in a file that becomes 1 MiB shorter than RAM. On a full file system, access fails in the same way.
    fn short() -> (GuestMemory, Arc<MemoryFaults>, Arc<VmSignals>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        let file = File::create_new(&path).unwrap();
        file.set_len(8 * MIB).unwrap();
        let zone = MemoryZoneConfig {
            id: "a".to_owned(),
            size: 8 * MIB,
            file: Some(path),
            shared: true,
            ..MemoryZoneConfig::default()
        };
        let config = MemoryConfig {
            size: 0,
            zones: Some(vec![zone]),
            ..MemoryConfig::default()
        };
        let mut memory = GuestMemory::new(&config, 46).unwrap();
        let signals = Arc::new(VmSignals::new().unwrap());
        let faults = memory.watch(&signals);
        file.set_len(7 * MIB).unwrap();
        (memory, faults, signals)
    }

    #[test]
    fn missing_page_that_the_vmm_touches_is_named_and_the_process_lives() {
        let (memory, faults, signals) = short();
        let ram = memory.ram().memory();
        ram.write_obj(1_u32, GuestAddress(MIB)).unwrap();
        assert!(signals.memory.read().is_err());
        assert!(!faults.has_lost());
        let address = 7 * MIB + 0x1008;
        ram.write_obj(7_u32, GuestAddress(address)).unwrap();
        assert_eq!(ram.read_obj::<u32>(GuestAddress(address)).unwrap(), 7);
        // Another page, before the owner has looked: one signal suffices, and the first is named.
        let _: u64 = ram.read_obj(GuestAddress(8 * MIB - 8)).unwrap();
        assert_eq!(signals.memory.read().unwrap(), 1);
        assert!(faults.has_lost());
        let fault = faults.take().unwrap();
        assert_eq!(fault, MemoryFault::Vmm { address });
        assert_eq!(faults.take(), None);
        assert!(faults.has_lost(), "the guest has seen zeros");
        let failure = faults.explain(fault, memory.zones());
        assert!(!failure.can_continue);
        let place = "guest address 0x701008 in memory zone a (file-shared)";
        assert!(failure.reason.contains(place), "{failure:?}");
    }

    #[test]
    fn fault_of_a_vcpu_names_the_zones_that_may_run_out() {
        let (memory, faults, signals) = short();
        faults.add(MemoryFault::Vcpu { vcpu: 3 });
        assert_eq!(signals.memory.read().unwrap(), 1);
        let failure = faults.explain(faults.take().unwrap(), memory.zones());
        assert!(failure.can_continue);
        let part = "memory zone a (file-shared) that vCPU 3 touched";
        assert!(failure.reason.contains(part), "{failure:?}");
    }

    #[test]
    fn covers_end_with_their_memory() {
        let (memory, faults, signals) = short();
        let ram = memory.ram().memory();
        let region = ram.iter().next().unwrap();
        assert_eq!(faults.covers.lock().unwrap().ram.len(), 1);
        for _ in 0..SLOTS_MAX {
            let faults = MemoryFaults::new(&signals);
            faults.cover(region, PAGE_BYTES).unwrap();
            let device = faults.cover_device("_pmem0", region.get_mmap(), 0);
            drop(device.unwrap());
        }
    }

    #[test]
    fn missing_page_of_a_device_is_named_as_long_as_the_device_exists() {
        const START: u64 = 4 << 30;
        let (memory, faults, signals) = short();
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * MIB).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let mapping = Arc::new(MmapRegion::from_file(offset, 2 * MIB as usize).unwrap());
        let device = faults.cover_device("_pmem0", mapping, START).unwrap();
        assert!(faults.covers_devices() && faults.is_of_device(START + 2 * MIB - 1));
        assert!(!faults.is_of_device(START - 1) && !faults.is_of_device(START + 2 * MIB));
        file.set_len(MIB).unwrap();
        assert_eq!(faults.read_of_device(START), Some(0));
        assert_eq!(faults.take(), None);
        // As for RAM: the process lives, and the owner is notified.
        let address = START + MIB + 8;
        assert_eq!(faults.read_of_device(address), Some(0));
        assert_eq!(signals.memory.read().unwrap(), 1);
        let fault = faults.take().unwrap();
        assert_eq!(fault, MemoryFault::Vmm { address });
        let explained = |fault| faults.explain(fault, memory.zones()).reason;
        let place = "memory of device _pmem0 that the VMM accessed at guest address 0x100100008";
        assert!(explained(fault).contains(place), "{}", explained(fault));
        let of_vcpu = || explained(MemoryFault::Vcpu { vcpu: 0 });
        let both = "RAM of memory zone a (file-shared) or memory of device _pmem0 that vCPU 0";
        assert!(of_vcpu().contains(both), "{}", of_vcpu());
        drop(device);
        assert!(!faults.covers_devices() && !faults.is_of_device(address));
        assert!(!of_vcpu().contains("_pmem0"));
    }
}
