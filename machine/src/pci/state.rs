//! The saved state of the buses: functions in their slots, and allocated address space.
//!
//! The functions themselves, and the addresses to which the guest has moved their BARs, are in their own states.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ::state::{Fields, Part, State, StateError, parts, require, wrap_in_list};
use serde::{Deserialize, Serialize};
use virtio_devices::Unpoisoned;
use virtio_devices::pci::PciFunction;
use vm_allocator::RangeInclusive;

use super::bus::{Slot, lock};
use super::{Bdf, PciBus, SLOT_COUNT};

pub(super) const PART: Part = parts::PCI_BUS;

/// The buses, and the two ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciBusState {
    /// Address register of configuration mechanism 1.
    pub config_address: u32,
    /// The bus of each segment.
    pub segments: Vec<SegmentState>,
}

impl State for PciBusState {
    const PART: Part = PART;

    /// A machine of version 1 had one segment.
    fn upgrade(_from: u32, fields: &mut Fields) -> Result<(), StateError> {
        wrap_in_list(fields, &["reserved", "slots"], "segments");
        Ok(())
    }
}

impl PciBusState {
    /// The saved slot of the function `id`, and its segment.
    pub fn slot(&self, id: &str) -> Option<(u16, &SlotState)> {
        let mut slots = self.slots();
        slots.find(|(_, slot)| slot.id == id)
    }

    /// Every saved slot with its segment.
    pub fn slots(&self) -> impl Iterator<Item = (u16, &SlotState)> {
        let segments = (0_u16..).zip(&self.segments);
        segments.flat_map(|(number, it)| it.slots.iter().map(move |slot| (number, slot)))
    }
}

/// The bus of one segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentState {
    /// Slots reserved for functions that request them, one bit each.
    pub reserved: u32,
    /// The functions, without the host bridge.
    pub slots: Vec<SlotState>,
}

/// One function on the bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotState {
    /// Device number.
    pub slot: u8,
    /// The identifier of the function.
    pub id: String,
    /// Address space allocated to its BARs when it was added.
    pub ranges: Vec<RangeState>,
}

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RangeState {
    /// First address.
    pub start: u64,
    /// Length.
    pub bytes: u64,
}

impl PciBus {
    /// The functions and their slots.
    pub fn state(&self) -> SegmentState {
        let slots = self.slots.read().unpoisoned();
        let range = |range: &RangeInclusive| RangeState {
            start: range.start(),
            bytes: range.len(),
        };
        SegmentState {
            reserved: self.reserved.load(Ordering::Relaxed),
            slots: self
                .own_slots()
                .filter_map(|slot| {
                    let entry = slots[usize::from(slot)].as_ref()?;
                    Some(SlotState {
                        slot,
                        id: entry.function.id().to_owned(),
                        ranges: entry.ranges.iter().map(range).collect(),
                    })
                })
                .collect(),
        }
    }

    /// Restores which slots are reserved, one bit each.
    pub(super) fn restore_reserved(&self, reserved: u32) {
        self.reserve((0..SLOT_COUNT).filter(|slot| reserved & 1 << slot != 0));
    }

    /// Puts a function restored from its state back into its slot, and maps its BARs at the guest's addresses.
    ///
    /// # Errors
    /// The slot or its address space is in use or does not exist; nothing is changed then.
    pub fn add_restored(
        &self,
        function: Arc<dyn PciFunction>,
        state: &SlotState,
    ) -> Result<Bdf, StateError> {
        let slot = state.slot;
        let mut slots = self.slots.write().unpoisoned();
        let is_free = slots.get(usize::from(slot)).is_some_and(Option::is_none);
        require(is_free, PART, "slots", || {
            format!("has slot {slot}, which is taken or does not exist")
        })?;
        require(state.id == function.id(), PART, "slots", || {
            format!(
                "has {:?} in slot {slot}, the function is {:?}",
                state.id,
                function.id()
            )
        })?;
        let bars = function.bars();
        let fits = bars.len() == state.ranges.len()
            && bars
                .iter()
                .zip(&state.ranges)
                .all(|(bar, range)| bar.size_bytes == range.bytes);
        require(fits, PART, "slots", || {
            format!("has other ranges in slot {slot} than the function has BARs")
        })?;
        let ranges = self.take_ranges(state)?;
        let entry = Slot::new(function, ranges);
        slots[usize::from(slot)] = Some(Arc::clone(&entry));
        drop(slots);
        self.remap(&entry);
        Ok(self.bdf(slot))
    }

    fn take_ranges(&self, state: &SlotState) -> Result<Vec<RangeInclusive>, StateError> {
        let mut windows = lock(&self.windows);
        let mut taken: Vec<RangeInclusive> = Vec::new();
        for range in &state.ranges {
            let RangeState { start, bytes } = *range;
            if windows.take(start, bytes) {
                let range = RangeInclusive::new(start, start + bytes - 1);
                taken.push(range.expect("a range in a window is not empty"));
                continue;
            }
            taken.iter().for_each(|range| windows.free(range));
            let reason = format!("has {start:#x}+{bytes:#x}, which is not free or not PCI's");
            return Err(StateError::invalid(PART, "slots", reason));
        }
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use ::state::Saved;
    use serde_json::json;

    use super::*;

    #[test]
    fn state_of_the_machine_with_one_segment_is_read() {
        let slot = json!({"slot": 3, "id": "_rng", "ranges": [{"start": 4096, "bytes": 64}]});
        let one = json!({"version": 1, "config_address": 7, "reserved": 8, "slots": [slot]});
        let one: Saved = serde_json::from_value(one).unwrap();
        let state: PciBusState = one.read().unwrap();
        assert_eq!((state.config_address, state.segments.len()), (7, 1));
        assert_eq!(state.segments[0].reserved, 8);
        let (segment, slot) = state.slot("_rng").unwrap();
        assert_eq!((segment, slot.slot, slot.ranges[0].bytes), (0, 3, 64));
    }
}
