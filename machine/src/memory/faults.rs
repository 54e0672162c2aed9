//! Guest RAM that the host fails to provide while the machine runs: the pool of huge pages is empty, a file system is
//! full, a file became shorter, or memory is defective.
//!
//! | Access | How it is noticed | Can be repeated |
//! | --- | --- | --- |
//! | by a vCPU | `KVM_RUN` fails | yes |
//! | by a vCPU, and KVM tries again endlessly | page faults without result (`cpu/stall.rs`) | yes |
//! | by KVM's emulator for a vCPU | an exit with an address in RAM | no |
//! | by KVM, of page tables, handlers or code | a triple fault or a failed emulation, and then by the vCPU's thread (`cpu/exception_path.rs`) | no |
//! | by a thread of ours | SIGBUS ([`super::bus_error`]) | no |

use std::io;
use std::sync::{Arc, Mutex};

use virtio_devices::Unpoisoned;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::bus_error::Cover;
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

/// What a machine's owner has to know of such an access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryFailure {
    /// What happened.
    pub reason: String,
    /// The guest can go on once the host has memory again.
    pub can_continue: bool,
}

/// Collects the faults of one machine and notifies its owner.
#[derive(Debug)]
pub struct MemoryFaults {
    signals: Arc<VmSignals>,
    first: Mutex<Option<MemoryFault>>,
    covers: Mutex<Covers>,
}

#[derive(Debug, Default)]
struct Covers {
    all: Vec<Cover>,
    /// A page was replaced by zeros.
    lost: bool,
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
        self.covers.lock().unpoisoned().all.push(cover);
        Ok(())
    }

    /// Keeps the first fault and notifies the owner.
    pub(crate) fn add(&self, fault: MemoryFault) {
        self.first.lock().unpoisoned().get_or_insert(fault);
        if let Err(error) = self.signals.memory.write(1) {
            log::error!("Cannot notify the control thread of missing RAM: {error}");
        }
    }

    /// The first fault since the last call. One after which the guest cannot go on comes first.
    pub(crate) fn take(&self) -> Option<MemoryFault> {
        let noted = self.first.lock().unpoisoned().take();
        let mut covers = self.covers.lock().unpoisoned();
        // Takes those of all covers.
        let faults = covers.all.iter().filter_map(Cover::take_fault);
        let ours = faults.fold(None, |first, address| first.or(Some(address)));
        covers.lost |= ours.is_some();
        ours.map(|address| MemoryFault::Vmm { address }).or(noted)
    }

    /// Whether a thread of the VMM has found zeros in place of a page. The machine cannot go on.
    pub(crate) fn has_lost(&self) -> bool {
        let covers = self.covers.lock().unpoisoned();
        covers.lost || covers.all.iter().any(Cover::has_fault)
    }
}

impl MemoryFault {
    /// Explains the fault of a machine with `zones`.
    pub(crate) fn explain(self, zones: &[Zone]) -> MemoryFailure {
        let named = |zone: &Zone| format!("{} ({})", zone.id, zone.backing);
        let (reason, can_continue) = match self {
            Self::Vcpu { vcpu } => {
                let zones = zones.iter().filter(|zone| zone.may_run_out());
                let of = match zones.map(named).collect::<Vec<_>>().join(" or ") {
                    none if none.is_empty() => none,
                    zones => format!(" of memory zone {zones}"),
                };
                (format!("RAM{of} that vCPU {vcpu} touched"), true)
            }
            Self::Emulated { address } | Self::Vmm { address } => {
                let who = match self {
                    Self::Emulated { .. } => "a vCPU",
                    _ => "the VMM",
                };
                let zone = zones.iter().find(|zone| zone.holds(address));
                let zone = zone.map_or_else(String::new, |zone| {
                    format!(" in memory zone {}", named(zone))
                });
                (
                    format!("RAM that {who} accessed at guest address {address:#x}{zone}"),
                    false,
                )
            }
        };
        MemoryFailure {
            reason: format!(
                "the host cannot provide {reason}: no huge pages are left, a file system is full, a memory file is too \
                 short, or memory is defective"
            ),
            can_continue,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use api::config::{MemoryConfig, MemoryZoneConfig};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::memory::GuestMemory;
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
        let failure = fault.explain(memory.zones());
        assert!(!failure.can_continue);
        let place = "guest address 0x701008 in memory zone a (file-shared)";
        assert!(failure.reason.contains(place), "{failure:?}");
    }

    #[test]
    fn fault_of_a_vcpu_names_the_zones_that_may_run_out() {
        let (memory, faults, signals) = short();
        faults.add(MemoryFault::Vcpu { vcpu: 3 });
        assert_eq!(signals.memory.read().unwrap(), 1);
        let failure = faults.take().unwrap().explain(memory.zones());
        assert!(failure.can_continue);
        let part = "memory zone a (file-shared) that vCPU 3 touched";
        assert!(failure.reason.contains(part), "{failure:?}");
    }

    #[test]
    fn covers_end_with_their_memory() {
        // More than there are slots.
        for _ in 0..600 {
            let (memory, faults, _signals) = short();
            drop(memory);
            assert_eq!(faults.covers.lock().unwrap().all.len(), 1);
        }
    }
}
