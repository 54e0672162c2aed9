//! Memory hot-plug registers, which show the guest its memory devices and their addresses.
//!
//! | Offset | Width | Name in the DSDT | Meaning |
//! | --- | --- | --- | --- |
//! | 0x0 | 32 bits | `MSEL` | write: selects a device; all registers of a nonexistent device are zero |
//! | 0x0, 0x4 | 32 bits | `MHBL`, `MHBH` | read: its address |
//! | 0x8, 0xc | 32 bits | `MHLL`, `MHLH` | read: its size |
//! | 0x14 | 8 bits | `MEN_`, `MINS` | bit 0: present; bit 1: added (write 1 to acknowledge) |
//!
//! Accesses of any other width or offset read zero and change nothing. Devices cannot be ejected; they stay until a
//! reboot.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use state::{Part, State, StateError, parts, require};
use virtio_devices::Unpoisoned;

use super::DIMMS_MAX;
use crate::bus::BusDevice;

/// Size of the registers, including one that upstream declares but no driver uses.
pub const MEMORY_HOTPLUG_BYTES: u64 = 0x18;

const SELECT: u64 = 0x0;
const LENGTH: u64 = 0x8;
const STATUS: u64 = 0x14;

const PRESENT: u8 = 1 << 0;
const INSERTING: u8 = 1 << 1;

const PART: Part = parts::MEMORY_HOTPLUG;

/// The saved state of the controller. The memory map has the devices.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugState {
    /// The device that the guest has selected.
    pub selected: u32,
    /// Added devices that the guest has not acknowledged.
    pub inserting: Vec<u32>,
}

impl State for MemoryHotplugState {
    const PART: Part = PART;
}

#[derive(Debug)]
struct Slot {
    start: u64,
    bytes: u64,
    /// The guest has not acknowledged the device.
    inserting: bool,
}

#[derive(Debug, Default)]
struct Registers {
    /// In the order in which they were added; at most [`DIMMS_MAX`].
    slots: Vec<Slot>,
    /// The device selected by the guest, which can write any number.
    selected: u32,
}

impl Registers {
    fn selected(&mut self) -> Option<&mut Slot> {
        self.slots.get_mut(usize::try_from(self.selected).ok()?)
    }
}

/// The hot-plug controller of memory devices.
#[derive(Debug)]
pub struct MemoryHotplug {
    registers: Mutex<Registers>,
}

impl MemoryHotplug {
    /// Creates a controller with devices that the guest already has.
    pub fn new(dimms: Vec<Range<u64>>) -> Self {
        let controller = Self {
            registers: Mutex::default(),
        };
        for dimm in dimms {
            controller.insert(&dimm);
        }
        for slot in &mut controller.lock().slots {
            slot.inserting = false;
        }
        controller
    }

    /// Records that a device was added. The caller interrupts the guest next.
    pub fn insert(&self, dimm: &Range<u64>) {
        let slots = &mut self.lock().slots;
        assert!(slots.len() < DIMMS_MAX, "no more devices than slots");
        slots.push(Slot {
            start: dimm.start,
            bytes: dimm.end - dimm.start,
            inserting: true,
        });
    }

    /// Returns the state that the guest has not acknowledged yet.
    pub fn state(&self) -> MemoryHotplugState {
        let registers = self.lock();
        let slots = (0..).zip(&registers.slots);
        MemoryHotplugState {
            selected: registers.selected,
            inserting: slots
                .filter_map(|(index, slot)| slot.inserting.then_some(index))
                .collect(),
        }
    }

    /// Restores the state that the guest has not acknowledged yet.
    ///
    /// # Errors
    /// The state names a device that does not exist; in this case nothing is changed.
    pub fn restore(&self, state: &MemoryHotplugState) -> Result<(), StateError> {
        let mut registers = self.lock();
        let count = registers.slots.len();
        for &index in &state.inserting {
            require((index as usize) < count, PART, "inserting", || {
                format!("names memory device {index} of {count}")
            })?;
        }
        for &index in &state.inserting {
            registers.slots[index as usize].inserting = true;
        }
        registers.selected = state.selected;
        Ok(())
    }

    /// The registers are consistent after every statement, so a thread that panicked with the lock left nothing half
    /// done.
    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unpoisoned()
    }
}

impl BusDevice for MemoryHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let mut registers = self.lock();
        let Some(slot) = registers.selected() else {
            return;
        };
        match (offset, data) {
            (0x0 | 0x4 | 0x8 | 0xc, data @ [_, _, _, _]) => {
                let value = if offset < LENGTH {
                    slot.start
                } else {
                    slot.bytes
                };
                let half = (offset % 8) as usize;
                data.copy_from_slice(&value.to_le_bytes()[half..half + 4]);
            }
            (STATUS, [status]) => {
                *status = PRESENT | if slot.inserting { INSERTING } else { 0 };
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.lock();
        match (offset, data) {
            (SELECT, &[a, b, c, d]) => registers.selected = u32::from_le_bytes([a, b, c, d]),
            (STATUS, &[bits]) if bits & INSERTING != 0 => {
                if let Some(slot) = registers.selected() {
                    slot.inserting = false;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use ::state::{Saved, testing};
    use proptest::prelude::*;

    use super::*;

    const FIRST: Range<u64> = 0x1_0000_0000..0x1_0800_0000;
    const SECOND: Range<u64> = 0x1_0800_0000..0x3_0800_0000;

    fn select(controller: &MemoryHotplug, slot: u32) {
        controller.write(SELECT, &slot.to_le_bytes());
    }

    fn status(controller: &MemoryHotplug, slot: u32) -> u8 {
        select(controller, slot);
        let mut status = [0xee];
        controller.read(STATUS, &mut status);
        status[0]
    }

    fn registers(controller: &MemoryHotplug, slot: u32) -> [u32; 4] {
        select(controller, slot);
        [0x0, 0x4, 0x8, 0xc].map(|offset| {
            let mut data = [0xee; 4];
            controller.read(offset, &mut data);
            u32::from_le_bytes(data)
        })
    }

    #[test]
    fn devices_show_where_they_are_and_that_they_came_until_the_guest_has_seen_it() {
        let controller = MemoryHotplug::new(vec![FIRST]);
        assert_eq!([0, 1].map(|slot| status(&controller, slot)), [1, 0]);
        controller.insert(&SECOND);
        assert_eq!([0, 1, 2].map(|slot| status(&controller, slot)), [1, 3, 0]);
        assert_eq!(registers(&controller, 0), [0, 1, 0x0800_0000, 0]);
        assert_eq!(registers(&controller, 1), [0x0800_0000, 1, 0, 2]);
        assert_eq!(registers(&controller, u32::MAX), [0; 4]);
        select(&controller, 1);
        controller.write(STATUS, &[INSERTING]);
        assert_eq!([0, 1].map(|slot| status(&controller, slot)), [1, 1]);
    }

    proptest! {
        #[test]
        fn accesses_of_any_form_take_no_device_away(
            accesses in prop::collection::vec(
                (0u64..0x20, prop::collection::vec(any::<u8>(), 0..9), any::<bool>()), 0..60),
        ) {
            let controller = MemoryHotplug::new(vec![FIRST]);
            controller.insert(&SECOND);
            for (offset, mut data, is_write) in accesses {
                if is_write {
                    controller.write(offset, &data);
                } else {
                    controller.read(offset, &mut data);
                }
            }
            prop_assert_eq!(registers(&controller, 0), [0, 1, 0x0800_0000, 0]);
            prop_assert_eq!(registers(&controller, 1), [0x0800_0000, 1, 0, 2]);
            prop_assert_eq!(status(&controller, 1) & PRESENT, PRESENT);
        }
    }

    #[test]
    fn controller_saved_and_restored_tells_of_what_was_not_read() {
        let controller = MemoryHotplug::new(vec![FIRST]);
        controller.insert(&SECOND);
        select(&controller, 1);
        let saved = Saved::of(&controller.state());
        let all = || vec![FIRST, SECOND];
        let restored = MemoryHotplug::new(all());
        restored.restore(&saved.read().unwrap()).unwrap();
        assert_eq!(Saved::of(&restored.state()), saved);
        assert_eq!([0, 1].map(|slot| status(&restored, slot)), [1, 3]);
        testing::damage(&saved, |damaged| {
            let read = damaged.read();
            let restored = MemoryHotplug::new(all());
            if let Err(error) = read.and_then(|state| restored.restore(&state)) {
                assert!(error.to_string().contains("memory-hotplug"), "{error}");
            }
        });
    }
}
