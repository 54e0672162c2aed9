//! vCPU hot-plug registers: the guest reads which vCPUs were added or should be removed, and ejects them.
//!
//! | Offset | Width | Name in the DSDT | Meaning |
//! | --- | --- | --- | --- |
//! | 0x0 | 32 bits | `CSEL` | selects the vCPU of the other register; one that does not exist reads as no bits |
//! | 0x4 | 8 bits | `CPEN`, `CINS`, `CRMV`, `CEJ0` | bits 0 to 3, below |
//!
//! | Bit | Read | Write 1 |
//! | --- | --- | --- |
//! | 0 | the vCPU is present | – |
//! | 1 | the vCPU was added | acknowledged by the guest |
//! | 2 | removal is requested | acknowledged by the guest |
//! | 3 | 0 | the guest has released the vCPU |
//!
//! Accesses of any other width or offset read zero and have no effect.
//!
//! ```text
//!          insert              request_removal           CEJ0            take_ejected
//!  absent ────────► present ──────────────────► leaving ──────► ejected ─────────────► absent
//! ```
//! A guest can eject only vCPUs whose removal the host requested. The guest acknowledges a request before it ejects, so
//! ejection is tied to the request, not to the acknowledgement.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use state::{Part, State, StateError, parts, require};
use virtio_devices::Unpoisoned;

use crate::bus::BusDevice;
use crate::pci::EjectSink;

/// Size of the registers, including two that upstream describes and no guest uses.
pub const CPU_HOTPLUG_BYTES: u64 = 0xc;

const SELECT: u64 = 0x0;
const STATUS: u64 = 0x4;

const PRESENT: u8 = 1 << 0;
const INSERTING: u8 = 1 << 1;
const REMOVING: u8 = 1 << 2;
const EJECT: u8 = 1 << 3;

const PART: Part = parts::CPU_HOTPLUG;

/// The saved state of the controller. While a removal is pending, the machine cannot be saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuHotplugState {
    /// The vCPU that the guest has selected.
    pub selected: u32,
    /// Added vCPUs that the guest has not acknowledged.
    pub inserting: Vec<u32>,
}

impl State for CpuHotplugState {
    const PART: Part = PART;
}

#[derive(Debug, Clone, Copy, Default)]
struct Flags {
    present: bool,
    /// Added, and the guest has not acknowledged it.
    inserting: bool,
    /// Requested for removal, and the guest has not acknowledged it.
    removing: bool,
    /// Requested for removal and not yet released.
    leaving: bool,
    /// Released; the control thread has not stopped it yet.
    ejected: bool,
}

#[derive(Debug)]
struct Registers {
    /// One item for each possible vCPU.
    vcpus: Vec<Flags>,
    /// Selected by the guest, which can write any number.
    selected: u32,
}

impl Registers {
    fn selected(&mut self) -> Option<&mut Flags> {
        self.vcpus.get_mut(usize::try_from(self.selected).ok()?)
    }

    fn of(&mut self, vcpus: Range<u32>) -> &mut [Flags] {
        &mut self.vcpus[vcpus.start as usize..vcpus.end as usize]
    }
}

/// The hot-plug controller of the vCPUs.
pub struct CpuHotplug {
    registers: Mutex<Registers>,
    sink: EjectSink,
    refused_ejects: AtomicU64,
}

virtio_devices::debug_fields!(CpuHotplug { registers });

impl CpuHotplug {
    /// A controller of `max` vCPUs, of which the first `boot` are present. Notifies `sink` when the guest has released
    /// one.
    pub fn new(boot: u32, max: u32, sink: EjectSink) -> Self {
        let flags = |index| Flags {
            present: index < boot,
            ..Flags::default()
        };
        let registers = Registers {
            vcpus: (0..max).map(flags).collect(),
            selected: 0,
        };
        Self {
            registers: Mutex::new(registers),
            sink,
            refused_ejects: AtomicU64::new(0),
        }
    }

    /// The number of vCPUs that the guest has.
    pub fn present(&self) -> u32 {
        u32::try_from(self.present_vcpus().len()).expect("vCPUs have 32-bit numbers")
    }

    /// The vCPUs that the guest has: the first ones, unless a removal is pending. The guest may release them in any order.
    pub fn present_vcpus(&self) -> Vec<u32> {
        let registers = self.lock();
        let vcpus = (0..).zip(&registers.vcpus);
        vcpus
            .filter_map(|(index, flags)| flags.present.then_some(index))
            .collect()
    }

    /// The number of vCPUs whose removal was requested and is not complete: the guest still has them, or their threads
    /// still run.
    pub fn leaving(&self) -> usize {
        let vcpus = &self.lock().vcpus;
        vcpus.iter().filter(|it| it.leaving || it.ejected).count()
    }

    /// Records that these vCPUs were added. The caller interrupts the guest next.
    pub fn insert(&self, vcpus: Range<u32>) {
        self.lock().of(vcpus).fill(Flags {
            present: true,
            inserting: true,
            ..Flags::default()
        });
    }

    /// Requests the removal of these vCPUs. The caller interrupts the guest next.
    pub fn request_removal(&self, vcpus: Range<u32>) {
        for flags in self.lock().of(vcpus) {
            flags.removing = true;
            flags.leaving = true;
        }
    }

    /// vCPUs that the guest has released since the last call; their threads still run.
    pub fn take_ejected(&self) -> Vec<u32> {
        let mut registers = self.lock();
        let vcpus = (0..).zip(&mut registers.vcpus);
        let ejected = vcpus.filter_map(|(index, flags)| {
            let ejected = std::mem::take(&mut flags.ejected);
            ejected.then_some(index)
        });
        ejected.collect()
    }

    /// Number of ejections without a request.
    pub fn refused_ejects(&self) -> u64 {
        self.refused_ejects.load(Ordering::Relaxed)
    }

    /// The changes that the guest has not read yet. No removal may be pending.
    pub fn state(&self) -> CpuHotplugState {
        let registers = self.lock();
        let vcpus = (0..).zip(&registers.vcpus);
        CpuHotplugState {
            selected: registers.selected,
            inserting: vcpus
                .filter_map(|(index, flags)| flags.inserting.then_some(index))
                .collect(),
        }
    }

    /// Restores the changes that the guest has not read yet.
    ///
    /// # Errors
    /// An added vCPU that is not present or was present at boot. Nothing is changed then.
    pub fn restore(&self, state: &CpuHotplugState) -> Result<(), StateError> {
        let mut registers = self.lock();
        for &index in &state.inserting {
            let flags = registers.vcpus.get(index as usize);
            let possible = index > 0 && flags.is_some_and(|flags| flags.present);
            require(possible, PART, "inserting", || {
                format!("names vCPU {index}, which cannot have been added")
            })?;
        }
        for &index in &state.inserting {
            registers.vcpus[index as usize].inserting = true;
        }
        registers.selected = state.selected;
        Ok(())
    }

    fn write_status(&self, bits: u8) {
        let mut registers = self.lock();
        let Some(flags) = registers.selected() else {
            return;
        };
        flags.inserting &= bits & INSERTING == 0;
        flags.removing &= bits & REMOVING == 0;
        if bits & EJECT == 0 {
            return;
        }
        if !flags.leaving {
            self.refused_ejects.fetch_add(1, Ordering::Relaxed);
            return;
        }
        *flags = Flags {
            ejected: true,
            ..Flags::default()
        };
        drop(registers);
        // The vCPU's thread may be the calling thread, so it cannot be stopped here.
        (self.sink)();
    }

    /// The flags are consistent after every statement, so a thread that panicked while it held the lock left a valid
    /// state.
    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unpoisoned()
    }
}

impl BusDevice for CpuHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let mut registers = self.lock();
        match (offset, data) {
            (SELECT, data @ [_, _, _, _]) => {
                data.copy_from_slice(&registers.selected.to_le_bytes());
            }
            (STATUS, [status]) => {
                let bit = |set: bool, bit: u8| if set { bit } else { 0 };
                *status = registers.selected().map_or(0, |flags| {
                    bit(flags.present, PRESENT)
                        | bit(flags.inserting, INSERTING)
                        | bit(flags.removing, REMOVING)
                });
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SELECT, &[a, b, c, d]) => self.lock().selected = u32::from_le_bytes([a, b, c, d]),
            (STATUS, &[bits]) => self.write_status(bits),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use proptest::prelude::*;

    use super::*;

    struct Rig {
        controller: CpuHotplug,
        told: Arc<AtomicUsize>,
    }

    impl Rig {
        /// Two vCPUs of at most four.
        fn new() -> Self {
            let told = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&told);
            let sink: EjectSink = Arc::new(move || {
                counted.fetch_add(1, Ordering::Relaxed);
            });
            Self {
                controller: CpuHotplug::new(2, 4, sink),
                told,
            }
        }

        fn status(&self, vcpu: u32) -> u8 {
            self.controller.write(SELECT, &vcpu.to_le_bytes());
            let mut status = [0xee];
            self.controller.read(STATUS, &mut status);
            status[0]
        }

        fn write(&self, vcpu: u32, bits: u8) {
            self.controller.write(SELECT, &vcpu.to_le_bytes());
            self.controller.write(STATUS, &[bits]);
        }
    }

    #[test]
    fn added_vcpus_are_told_of_until_the_guest_acknowledges() {
        let rig = Rig::new();
        assert_eq!(
            [0, 1, 2, 3, 4].map(|vcpu| rig.status(vcpu)),
            [1, 1, 0, 0, 0]
        );
        rig.controller.insert(2..4);
        assert_eq!(rig.controller.present(), 4);
        assert_eq!([1, 2, 3].map(|vcpu| rig.status(vcpu)), [1, 3, 3]);
        rig.write(2, INSERTING);
        assert_eq!([1, 2, 3].map(|vcpu| rig.status(vcpu)), [1, 1, 3]);
    }

    #[test]
    fn vcpus_leave_after_the_acknowledgement_one_at_a_time_and_twice() {
        let rig = Rig::new();
        for round in 1..=2 {
            rig.controller.insert(2..4);
            rig.controller.request_removal(1..4);
            assert_eq!(rig.controller.leaving(), 3);
            for vcpu in [2, 1, 3] {
                assert_ne!(rig.status(vcpu) & REMOVING, 0);
                // Linux acknowledges during its scan and ejects later.
                rig.write(vcpu, REMOVING);
                assert_eq!(rig.status(vcpu) & (PRESENT | REMOVING), PRESENT);
                rig.write(vcpu, EJECT);
                assert_eq!(rig.status(vcpu), 0);
                // Its thread still runs, so the vCPU cannot be added again.
                assert_ne!(rig.controller.leaving(), 0);
                assert_eq!(rig.controller.take_ejected(), [vcpu]);
            }
            assert!(rig.controller.take_ejected().is_empty());
            assert_eq!(rig.controller.leaving(), 0);
            assert_eq!(rig.controller.present(), 1);
            assert_eq!(rig.told.load(Ordering::Relaxed), 3 * round);
            rig.controller.insert(1..2);
        }
        assert_eq!(rig.controller.refused_ejects(), 0);
    }

    #[test]
    fn vcpu_ejected_unasked_stays_and_is_counted() {
        let rig = Rig::new();
        rig.controller.insert(2..3);
        for vcpu in 0..3 {
            rig.write(vcpu, EJECT);
        }
        rig.write(u32::MAX, EJECT);
        assert_eq!(rig.controller.present(), 3);
        assert_eq!(rig.controller.refused_ejects(), 3);
        assert_eq!(rig.told.load(Ordering::Relaxed), 0);
    }

    proptest! {
        #[test]
        fn accesses_of_any_form_never_take_more_than_was_asked_for(
            accesses in prop::collection::vec(
                (0u64..12, prop::collection::vec(any::<u8>(), 0..9), any::<bool>()), 0..60),
            selections in prop::collection::vec(0u32..6, 60),
        ) {
            let rig = Rig::new();
            rig.controller.insert(2..4);
            rig.controller.request_removal(3..4);
            for ((offset, mut data, is_write), vcpu) in accesses.into_iter().zip(selections) {
                rig.controller.write(SELECT, &vcpu.to_le_bytes());
                if is_write {
                    rig.controller.write(offset, &data);
                } else {
                    rig.controller.read(offset, &mut data);
                }
            }
            prop_assert!(rig.controller.present() >= 3);
            let ejected = rig.controller.take_ejected();
            prop_assert!(ejected.is_empty() || ejected == [3]);
        }
    }

    #[test]
    fn controller_saved_and_restored_tells_of_what_was_not_read() {
        use ::state::{Saved, testing};

        let rig = Rig::new();
        rig.controller.insert(2..4);
        rig.write(3, INSERTING);
        let saved = Saved::of(&rig.controller.state());
        let restored = || CpuHotplug::new(4, 4, Arc::new(|| {}));
        let other = restored();
        other.restore(&saved.read().unwrap()).unwrap();
        assert_eq!(Saved::of(&other.state()), saved);
        testing::damage(&saved, |damaged| {
            let read = damaged.read();
            if let Err(error) = read.and_then(|state| restored().restore(&state)) {
                assert!(error.to_string().contains("cpu-hotplug"), "{error}");
            }
        });
    }
}
