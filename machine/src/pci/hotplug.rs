//! Hot-plug registers: the guest reads which functions were added or should be removed, and ejects slots.
//!
//! | Offset | Name in the DSDT | Read | Write |
//! | --- | --- | --- | --- |
//! | 0x0 | `PCIU` | slots filled since the last read | – |
//! | 0x4 | `PCID` | slots whose removal was requested since the last read | – |
//! | 0x8 | `B0EJ` | 0 | slots that the guest has released |
//! | 0xc | `PSEG` | the segment of the other registers | selects the segment; one that does not exist has no slots |
//!
//! Each register is 32 bits wide, with bit n for slot n. Accesses of any other width or offset read zero and have no
//! effect.
//!
//! ```text
//!          add              request_removal           B0EJ           take_ejected
//!  empty ───────► occupied ─────────────────► leaving ─────► ejected ─────────────► empty
//! ```
//! A guest can eject only functions whose removal the host requested. The host's configuration determines the machine's
//! devices, and a balloon must not be removed with memory in it. Any other ejection is counted and has no effect.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use serde::{Deserialize, Serialize};
use state::{Fields, Part, State, StateError, parts, require, wrap_in_list};
use virtio_devices::Unpoisoned;

use super::{Bdf, PciBus, PciSegments, SLOT_COUNT};
use crate::bus::BusDevice;

/// Size of the registers.
pub const HOTPLUG_BYTES: u64 = 0x10;

const SLOTS_UP: u64 = 0x0;
const SLOTS_DOWN: u64 = 0x4;
const EJECT: u64 = 0x8;
const SEGMENT: u64 = 0xc;

/// Called on a vCPU thread after a slot was ejected. Must not block.
pub type EjectSink = Arc<dyn Fn() + Send + Sync>;

const PART: Part = parts::PCI_HOTPLUG;

/// The saved state of the controller.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HotplugState {
    /// The slots of each segment.
    pub segments: Vec<SegmentSlots>,
    /// The segment that the guest has selected.
    pub segment: u32,
}

impl HotplugState {
    /// Whether the guest still has this function although its removal was requested.
    pub fn is_leaving(&self, bdf: Bdf) -> bool {
        let slots = self.segments.get(usize::from(bdf.segment));
        slots.is_some_and(|slots| slots.leaving & bit(bdf.slot) != 0)
    }
}

/// Bitmaps of the slots of a segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentSlots {
    /// Added since the guest last read it.
    pub up: u32,
    /// Requested for removal since the guest last read it.
    pub down: u32,
    /// Requested for removal and not yet released.
    pub leaving: u32,
    /// Off the bus; the control thread has not collected them yet.
    pub ejected: u32,
}

impl State for HotplugState {
    const PART: Part = PART;

    /// A machine of version 1 had one segment.
    fn upgrade(_from: u32, fields: &mut Fields) -> Result<(), StateError> {
        wrap_in_list(fields, &["up", "down", "leaving", "ejected"], "segments");
        Ok(())
    }
}

/// Bitmaps of the slots of a segment, as in [`SegmentSlots`].
#[derive(Debug, Clone, Copy, Default)]
struct Slots {
    up: u32,
    down: u32,
    leaving: u32,
    ejected: u32,
}

#[derive(Debug)]
struct Registers {
    /// One item for each segment.
    segments: Vec<Slots>,
    /// Selected by the guest, which can write any number.
    segment: u32,
}

impl Registers {
    fn selected(&mut self) -> Option<&mut Slots> {
        self.segments.get_mut(usize::try_from(self.segment).ok()?)
    }

    fn of(&mut self, bdf: Bdf) -> &mut Slots {
        &mut self.segments[usize::from(bdf.segment)]
    }
}

/// The hot-plug controller of all segments.
pub struct HotplugController {
    /// Weak, because the buses' MMIO bus holds this controller.
    buses: Vec<Weak<PciBus>>,
    registers: Mutex<Registers>,
    sink: EjectSink,
    refused_ejects: AtomicU64,
}

virtio_devices::debug_fields!(HotplugController { registers });

impl HotplugController {
    /// A controller that removes ejected functions from the buses of `segments` and then notifies `sink`.
    pub fn new(segments: &PciSegments, sink: EjectSink) -> Self {
        let buses: Vec<_> = segments.buses().iter().map(Arc::downgrade).collect();
        let registers = Registers {
            segments: vec![Slots::default(); buses.len()],
            segment: 0,
        };
        Self {
            buses,
            registers: Mutex::new(registers),
            sink,
            refused_ejects: AtomicU64::new(0),
        }
    }

    /// Slots that the guest has not read or released yet.
    pub fn state(&self) -> HotplugState {
        let registers = self.lock();
        let segment = |slots: &Slots| SegmentSlots {
            up: slots.up,
            down: slots.down,
            leaving: slots.leaving,
            ejected: slots.ejected,
        };
        HotplugState {
            segments: registers.segments.iter().map(segment).collect(),
            segment: registers.segment,
        }
    }

    /// Restores the controller from which `state` was taken. The functions are on the bus again.
    ///
    /// # Errors
    /// Another number of segments, slots without a function, or the host bridge's slot; nothing is changed then.
    pub fn restore(&self, state: &HotplugState) -> Result<(), StateError> {
        let (own, saved) = (self.buses.len(), state.segments.len());
        require(own == saved, PART, "segments", || {
            format!("are {saved}, the configuration has {own}")
        })?;
        for (bus, saved) in self.buses.iter().zip(&state.segments) {
            if let Some(bus) = bus.upgrade() {
                check(&bus, saved)?;
            }
        }
        let segment = |saved: &SegmentSlots| Slots {
            up: saved.up,
            down: saved.down,
            leaving: saved.leaving,
            ejected: saved.ejected,
        };
        *self.lock() = Registers {
            segments: state.segments.iter().map(segment).collect(),
            segment: state.segment,
        };
        Ok(())
    }

    /// Records that a function was put into this slot. The caller interrupts the guest next.
    pub fn announce(&self, bdf: Bdf) {
        self.lock().of(bdf).up |= bit(bdf.slot);
    }

    /// Requests the removal of the function in this slot. The caller interrupts the guest next; may be repeated. If the
    /// slot is empty, the guest has released the function already.
    pub fn request_removal(&self, bdf: Bdf) {
        let mut registers = self.lock();
        // Checked under the lock, as the guest ejects under it. A request for an empty slot would be one for the next
        // function there.
        let bus = self.buses[usize::from(bdf.segment)].upgrade();
        if !bus.is_some_and(|bus| bus.is_filled(bdf.slot)) {
            return;
        }
        let slots = registers.of(bdf);
        slots.down |= bit(bdf.slot);
        slots.leaving |= bit(bdf.slot);
    }

    /// Slots that the guest has released since the last call. Their functions are off the bus; a function that was added
    /// since may be in the same slot.
    pub fn take_ejected(&self) -> Vec<Bdf> {
        let mut registers = self.lock();
        let segments = (0_u16..).zip(&mut registers.segments);
        let ejected = segments.flat_map(|(segment, slots)| {
            let ejected = slots_in(std::mem::take(&mut slots.ejected));
            ejected.map(move |slot| Bdf { segment, slot })
        });
        ejected.collect()
    }

    /// Number of ejections without a request.
    pub fn refused_ejects(&self) -> u64 {
        self.refused_ejects.load(Ordering::Relaxed)
    }

    fn eject(&self, wanted: u32) {
        let mut registers = self.lock();
        let segment = registers.segment as usize;
        let granted = registers.selected().map_or(0, |slots| {
            let granted = wanted & slots.leaving;
            slots.leaving &= !granted;
            slots.down &= !granted;
            slots.up &= !granted;
            slots.ejected |= granted;
            granted
        });
        let refused = (wanted & !granted).count_ones();
        self.refused_ejects
            .fetch_add(u64::from(refused), Ordering::Relaxed);
        if granted == 0 {
            return;
        }
        // Removed before this write returns, so that the guest never finds a function again after releasing it, and
        // before the lock is released, so that no removal is requested in the meantime.
        if let Some(bus) = self.buses[segment].upgrade() {
            for slot in slots_in(granted) {
                bus.remove(slot);
            }
        }
        drop(registers);
        (self.sink)();
    }

    /// The bitmaps are consistent after every statement, so a thread that panicked while it held the lock left a valid
    /// state.
    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unpoisoned()
    }
}

impl BusDevice for HotplugController {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let mut registers = self.lock();
        let mut take = |of: fn(&mut Slots) -> &mut u32| {
            let slots = registers.selected();
            slots.map_or(0, |slots| std::mem::take(of(slots)))
        };
        *data = match offset {
            SLOTS_UP => take(|slots| &mut slots.up),
            SLOTS_DOWN => take(|slots| &mut slots.down),
            SEGMENT => registers.segment,
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

/// Whether `saved` fits this bus.
fn check(bus: &PciBus, saved: &SegmentSlots) -> Result<(), StateError> {
    let own = bus.own_slots().fold(0, |slots, slot| slots | bit(slot));
    let functions = bus.functions();
    let filled = own & (functions.iter()).fold(0, |slots, (bdf, _)| slots | bit(bdf.slot));
    for (field, slots) in [
        ("up", saved.up),
        ("down", saved.down),
        ("leaving", saved.leaving),
    ] {
        require(slots & !filled == 0, PART, field, || {
            format!("names slots {slots:#x}, those with a function are {filled:#x}")
        })?;
    }
    let ejected = saved.ejected;
    require(ejected & !own == 0, PART, "ejected", || {
        format!("names slots {ejected:#x}, of which some cannot have a function")
    })
}

fn bit(slot: u8) -> u32 {
    1 << slot
}

fn slots_in(bitmap: u32) -> impl Iterator<Item = u8> {
    (0..SLOT_COUNT).filter(move |slot| bitmap & bit(*slot) != 0)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use proptest::prelude::*;

    use super::super::fake::{FakeDoorbells, FakeFunction};
    use super::super::{DoorbellBackend, Place, SegmentWeights};
    use super::*;
    use crate::bus::Bus;

    struct Rig {
        _mmio: Arc<Bus>,
        segments: PciSegments,
        controller: HotplugController,
        told: Arc<AtomicUsize>,
    }

    impl Rig {
        fn new() -> Self {
            let mmio = Arc::new(Bus::new());
            let doorbells: Arc<dyn DoorbellBackend> = Arc::new(FakeDoorbells::default());
            let (mmio32, mmio64) = (0xc000_0000..0xe800_0000, 0x1_0000_0000..0x2_0000_0000);
            let segments = PciSegments::new(
                &[SegmentWeights::default(); 2],
                &mmio,
                &mmio32,
                &mmio64,
                &doorbells,
            )
            .unwrap();
            let told = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&told);
            let sink: EjectSink = Arc::new(move || {
                counted.fetch_add(1, Ordering::Relaxed);
            });
            Self {
                controller: HotplugController::new(&segments, sink),
                _mmio: mmio,
                segments,
                told,
            }
        }

        fn put(&self, segment: u16, slot: u8) -> Bdf {
            let function = Arc::new(FakeFunction::new("_f"));
            let place = Place {
                segment,
                slot: Some(slot),
            };
            self.segments.add(function, place).unwrap()
        }

        fn add_on(&self, segment: u16, slot: u8) -> Bdf {
            let bdf = self.put(segment, slot);
            self.controller.announce(bdf);
            bdf
        }

        fn add(&self, slot: u8) -> Bdf {
            self.add_on(0, slot)
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
            self.segments.functions().len()
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

    /// A client may repeat its request at the moment when the guest ejects.
    #[test]
    fn request_that_comes_too_late_does_not_meet_the_next_function_of_the_slot() {
        let rig = Rig::new();
        let bdf = rig.add(3);
        rig.controller.request_removal(bdf);
        rig.write(EJECT, 1 << 3);
        rig.controller.request_removal(bdf);
        assert_eq!(rig.add(3), bdf);
        assert_eq!(rig.read(SLOTS_DOWN), 0);
        rig.write(EJECT, 1 << 3);
        assert_eq!(rig.functions(), 2);
        assert_eq!(rig.controller.refused_ejects(), 1);
        // The ejection of the first one was not collected yet.
        let state = rig.controller.state();
        rig.controller.restore(&state).unwrap();
        assert_eq!(rig.controller.take_ejected(), [bdf]);
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

    #[test]
    fn registers_are_those_of_the_selected_segment() {
        let rig = Rig::new();
        let near = rig.add(3);
        let far = [rig.add_on(1, 0), rig.add_on(1, 3)];
        rig.write(SEGMENT, 1);
        assert_eq!(rig.read(SLOTS_UP), 1 << 0 | 1 << 3);
        rig.controller.request_removal(near);
        rig.controller.request_removal(far[0]);
        assert_eq!(rig.read(SLOTS_DOWN), 1 << 0);
        rig.write(EJECT, 1 << 0 | 1 << 3);
        assert_eq!(rig.controller.take_ejected(), [far[0]]);
        assert_eq!(rig.controller.refused_ejects(), 1);
        rig.write(SEGMENT, 0);
        assert_eq!((rig.read(SLOTS_UP), rig.read(SLOTS_DOWN)), (8, 8));
        rig.write(EJECT, 1 << 3);
        assert_eq!(rig.controller.take_ejected(), [near]);
        let left: Vec<_> = rig
            .segments
            .functions()
            .into_iter()
            .map(|it| it.0)
            .collect();
        assert_eq!(
            left,
            [
                Bdf {
                    segment: 0,
                    slot: 0
                },
                far[1]
            ]
        );
    }

    #[test]
    fn state_of_the_machine_with_one_segment_is_read() {
        let one = r#"{"version":1,"up":2,"down":4,"leaving":12,"ejected":16,"segment":7}"#;
        let one: state::Saved = serde_json::from_str(one).unwrap();
        let state: HotplugState = one.read().unwrap();
        assert_eq!(state.segment, 7);
        let slots = SegmentSlots {
            up: 2,
            down: 4,
            leaving: 12,
            ejected: 16,
        };
        assert_eq!(state.segments, [slots]);
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
            let left = rig.segments.functions().iter().fold(0, |bits, (bdf, _)| bits | bit(bdf.slot));
            prop_assert_eq!(left & !asked & !1, !asked & !1);
            let ejected = rig.controller.take_ejected().into_iter().fold(0, |bits, it| bits | bit(it.slot));
            prop_assert_eq!(left ^ ejected, u32::MAX);
        }
    }

    #[test]
    fn controller_saved_and_restored_lets_go_of_what_was_asked_for() {
        use ::state::{Saved, testing};

        let rig = Rig::new();
        let bdf = rig.put(1, 5);
        rig.controller.request_removal(bdf);
        let saved = Saved::of(&rig.controller.state());
        let other = Rig::new();
        assert!(
            other.controller.restore(&saved.read().unwrap()).is_err(),
            "no function there"
        );
        other.put(1, 5);
        other.controller.restore(&saved.read().unwrap()).unwrap();
        other.write(SEGMENT, 1);
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
