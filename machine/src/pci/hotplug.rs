//! Hot-plug registers: the guest reads which functions were added or should be removed, and ejects slots.
//!
//! | Offset | Name in the DSDT | Read | Write |
//! | --- | --- | --- | --- |
//! | 0x0 | `PCIU` | slots filled since the last read | – |
//! | 0x4 | `PCID` | slots to be emptied, asked for since the last read | – |
//! | 0x8 | `B0EJ` | 0 | slots the guest has let go of |
//! | 0xc | `PSEG` | the segment the others are for | selects it; there is only 0 |
//!
//! Each is 32 bits wide, bit n for slot n; accesses of any other form read zero and change nothing.
//!
//! ```text
//!          add              request_removal           B0EJ           take_ejected
//!  empty ───────► occupied ─────────────────► leaving ─────► ejected ─────────────► empty
//! ```
//! A guest can only eject what the host requested: the host's configuration determines the machine's devices, and a
//! balloon must not be removed with memory in it. Any other ejection is counted and has no effect.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use serde::{Deserialize, Serialize};
use state::{Part, State, StateError, parts, require};
use virtio_devices::Unpoisoned;

use super::{Bdf, PciBus, SLOT_COUNT};
use crate::bus::BusDevice;

/// Size of the registers.
pub const HOTPLUG_BYTES: u64 = 0x10;

const SLOTS_UP: u64 = 0x0;
const SLOTS_DOWN: u64 = 0x4;
const EJECT: u64 = 0x8;
const SEGMENT: u64 = 0xc;

/// Called on a vCPU thread when a slot was ejected. Must not block.
pub type EjectSink = Arc<dyn Fn() + Send + Sync>;

const PART: Part = parts::PCI_HOTPLUG;

/// The saved state of the controller: bitmaps of slots, and the selected segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HotplugState {
    /// Added since the guest last read it.
    pub up: u32,
    /// Requested for removal since the guest last read it.
    pub down: u32,
    /// Requested for removal and not yet released.
    pub leaving: u32,
    /// Off the bus; the control thread has not collected them yet.
    pub ejected: u32,
    /// Selected by the guest.
    pub segment: u32,
}

impl State for HotplugState {
    const PART: Part = PART;
}

/// Bitmaps of slots.
#[derive(Debug, Default)]
struct Slots {
    up: u32,
    down: u32,
    /// Requested for removal and not yet released.
    leaving: u32,
    ejected: u32,
    segment: u32,
}

/// The hot-plug controller of the bus.
pub struct HotplugController {
    /// Weak, because the bus's own MMIO bus holds this.
    bus: Weak<PciBus>,
    slots: Mutex<Slots>,
    sink: EjectSink,
    refused_ejects: AtomicU64,
}

virtio_devices::debug_fields!(HotplugController { slots });

impl HotplugController {
    /// A controller that takes functions off `bus` and then notifies `sink`.
    pub fn new(bus: &Arc<PciBus>, sink: EjectSink) -> Self {
        Self {
            bus: Arc::downgrade(bus),
            slots: Mutex::default(),
            sink,
            refused_ejects: AtomicU64::new(0),
        }
    }

    /// Slots that the guest has not read or released yet.
    pub fn state(&self) -> HotplugState {
        let slots = self.lock();
        HotplugState {
            up: slots.up,
            down: slots.down,
            leaving: slots.leaving,
            ejected: slots.ejected,
            segment: slots.segment,
        }
    }

    /// Restores the controller from which `state` was taken. The functions are on the bus again.
    ///
    /// # Errors
    /// Slots without a function, or the host bridge's; nothing is changed then.
    pub fn restore(&self, state: &HotplugState) -> Result<(), StateError> {
        let functions = self
            .bus
            .upgrade()
            .map_or_else(Vec::new, |bus| bus.functions());
        let filled = functions
            .iter()
            .filter(|(bdf, _)| bdf.slot() != 0)
            .fold(0, |slots, (bdf, _)| slots | bit(*bdf));
        for (field, slots) in [
            ("up", state.up),
            ("down", state.down),
            ("leaving", state.leaving),
        ] {
            require(slots & !filled == 0, PART, field, || {
                format!("names slots {slots:#x}, those with a function are {filled:#x}")
            })?;
        }
        require(state.ejected & (filled | 1) == 0, PART, "ejected", || {
            format!(
                "names slots {:#x}, of which some have a function",
                state.ejected
            )
        })?;
        *self.lock() = Slots {
            up: state.up,
            down: state.down,
            leaving: state.leaving,
            ejected: state.ejected,
            segment: state.segment,
        };
        Ok(())
    }

    /// Records that a function was put into this slot. The caller interrupts the guest next.
    pub fn announce(&self, bdf: Bdf) {
        self.lock().up |= bit(bdf);
    }

    /// Requests the removal of the function in this slot. The caller interrupts the guest next; may be repeated.
    pub fn request_removal(&self, bdf: Bdf) {
        let mut slots = self.lock();
        slots.down |= bit(bdf);
        slots.leaving |= bit(bdf);
    }

    /// Slots that the guest has released since the last call; they are off the bus.
    pub fn take_ejected(&self) -> Vec<Bdf> {
        let ejected = std::mem::take(&mut self.lock().ejected);
        bdfs(ejected).collect()
    }

    /// How often the guest ejected a slot without a request.
    pub fn refused_ejects(&self) -> u64 {
        self.refused_ejects.load(Ordering::Relaxed)
    }

    fn eject(&self, wanted: u32) {
        let granted = {
            let mut slots = self.lock();
            let granted = match slots.segment {
                0 => wanted & slots.leaving,
                _ => 0,
            };
            slots.leaving &= !granted;
            slots.down &= !granted;
            slots.up &= !granted;
            granted
        };
        let refused = (wanted & !granted).count_ones();
        self.refused_ejects
            .fetch_add(u64::from(refused), Ordering::Relaxed);
        if granted == 0 {
            return;
        }
        // Removed before this write returns, so that the guest never finds a function again after releasing it.
        if let Some(bus) = self.bus.upgrade() {
            for bdf in bdfs(granted) {
                bus.remove(bdf);
            }
        }
        self.lock().ejected |= granted;
        (self.sink)();
    }

    /// The bitmaps are consistent after every statement, so a thread that panicked with the lock left nothing half
    /// done.
    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unpoisoned()
    }
}

impl BusDevice for HotplugController {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let mut slots = self.lock();
        let here = slots.segment == 0;
        *data = match offset {
            SLOTS_UP if here => std::mem::take(&mut slots.up),
            SLOTS_DOWN if here => std::mem::take(&mut slots.down),
            SEGMENT => slots.segment,
            _ => 0,
        }
        .to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
            return;
        };
        match offset {
            EJECT => self.eject(value),
            SEGMENT => self.lock().segment = value,
            _ => {}
        }
    }
}

fn bit(bdf: Bdf) -> u32 {
    1 << bdf.slot()
}

fn bdfs(bitmap: u32) -> impl Iterator<Item = Bdf> {
    (0..SLOT_COUNT)
        .filter(move |slot| bitmap & 1 << slot != 0)
        .map(|slot| Bdf { slot })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use proptest::prelude::*;

    use super::super::MemoryWindows;
    use super::super::fake::{FakeDoorbells, FakeFunction};
    use super::*;
    use crate::bus::Bus;

    struct Rig {
        _mmio: Arc<Bus>,
        bus: Arc<PciBus>,
        controller: HotplugController,
        told: Arc<AtomicUsize>,
    }

    impl Rig {
        fn new() -> Self {
            let mmio = Arc::new(Bus::new());
            let windows =
                MemoryWindows::new(0xc000_0000..0xe800_0000, 0x1_0000_0000..0x2_0000_0000).unwrap();
            let bus = Arc::new(PciBus::new(
                &mmio,
                windows,
                Arc::new(FakeDoorbells::default()),
            ));
            let told = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&told);
            let sink: EjectSink = Arc::new(move || {
                counted.fetch_add(1, Ordering::Relaxed);
            });
            Self {
                controller: HotplugController::new(&bus, sink),
                _mmio: mmio,
                bus,
                told,
            }
        }

        fn add(&self, slot: u8) -> Bdf {
            let function = Arc::new(FakeFunction::new("_f"));
            let bdf = self.bus.add(function, Some(slot)).unwrap();
            self.controller.announce(bdf);
            bdf
        }

        fn read(&self, offset: u64) -> u32 {
            let mut data = [0xee; 4];
            self.controller.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&self, offset: u64, value: u32) {
            self.controller.write(offset, &value.to_le_bytes());
        }

        fn functions(&self) -> usize {
            self.bus.functions().len()
        }
    }

    #[test]
    fn added_function_is_told_of_once() {
        let rig = Rig::new();
        rig.add(3);
        rig.add(5);
        assert_eq!(rig.read(SLOTS_UP), 1 << 3 | 1 << 5);
        assert_eq!(rig.read(SLOTS_UP), 0);
        assert_eq!(rig.read(SLOTS_DOWN), 0);
    }

    #[test]
    fn function_asked_to_go_is_gone_when_the_guest_lets_go() {
        let rig = Rig::new();
        let bdf = rig.add(3);
        rig.controller.request_removal(bdf);
        assert_eq!(rig.functions(), 2);
        assert_eq!(rig.read(SLOTS_DOWN), 1 << 3);
        assert!(rig.controller.take_ejected().is_empty());
        rig.write(EJECT, 1 << 3);
        assert_eq!(rig.functions(), 1);
        assert_eq!(rig.told.load(Ordering::Relaxed), 1);
        assert_eq!(rig.controller.take_ejected(), [bdf]);
        assert!(rig.controller.take_ejected().is_empty());
        assert_eq!(rig.controller.refused_ejects(), 0);
        // The guest never read that it was added.
        assert_eq!(rig.read(SLOTS_UP), 0);
    }

    #[test]
    fn function_ejected_unasked_stays_and_is_counted() {
        let rig = Rig::new();
        rig.add(3);
        rig.write(EJECT, 1 << 3 | 1 << 4 | 1);
        assert_eq!(rig.functions(), 2);
        assert_eq!(rig.controller.refused_ejects(), 3);
        assert_eq!(rig.told.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn segment_without_slots_has_none() {
        let rig = Rig::new();
        let bdf = rig.add(3);
        rig.controller.request_removal(bdf);
        rig.write(SEGMENT, 7);
        assert_eq!(rig.read(SEGMENT), 7);
        assert_eq!((rig.read(SLOTS_UP), rig.read(SLOTS_DOWN)), (0, 0));
        rig.write(EJECT, 1 << 3);
        assert_eq!(rig.functions(), 2);
        rig.write(SEGMENT, 0);
        assert_eq!((rig.read(SLOTS_UP), rig.read(SLOTS_DOWN)), (8, 8));
    }

    proptest! {
        #[test]
        fn accesses_of_any_form_never_take_more_than_was_asked_for(
            asked in any::<u32>(),
            accesses in prop::collection::vec(
                (0u64..16, prop::collection::vec(any::<u8>(), 0..9), any::<bool>()), 0..60),
        ) {
            let rig = Rig::new();
            for slot in 1..SLOT_COUNT {
                let bdf = rig.add(slot);
                if asked & 1 << slot != 0 {
                    rig.controller.request_removal(bdf);
                }
            }
            for (offset, mut data, is_write) in accesses {
                if is_write {
                    rig.controller.write(offset, &data);
                } else {
                    rig.controller.read(offset, &mut data);
                }
            }
            let left = rig.bus.functions().iter().fold(0, |bits, (bdf, _)| bits | bit(*bdf));
            prop_assert_eq!(left & !asked & !1, !asked & !1);
            let ejected = rig.controller.take_ejected().into_iter().fold(0, |bits, it| bits | bit(it));
            prop_assert_eq!(left ^ ejected, u32::MAX);
        }
    }

    #[test]
    fn controller_saved_and_restored_lets_go_of_what_was_asked_for() {
        use ::state::{Saved, testing};

        let rig = Rig::new();
        let bdf = rig
            .bus
            .add(Arc::new(FakeFunction::new("_f")), Some(5))
            .unwrap();
        rig.controller.request_removal(bdf);
        let saved = Saved::of(&rig.controller.state());
        let other = Rig::new();
        assert!(
            other.controller.restore(&saved.read().unwrap()).is_err(),
            "no function there"
        );
        other
            .bus
            .add(Arc::new(FakeFunction::new("_f")), Some(5))
            .unwrap();
        other.controller.restore(&saved.read().unwrap()).unwrap();
        other.controller.write(EJECT, &(1_u32 << 5).to_le_bytes());
        assert_eq!(other.controller.take_ejected(), [bdf]);
        assert_eq!(other.controller.refused_ejects(), 0);
        testing::damage(&saved, |damaged| {
            if let Err(error) = damaged
                .read()
                .and_then(|state| rig.controller.restore(&state))
            {
                assert!(error.to_string().contains("pci-hotplug"), "{error}");
            }
        });
    }
}
