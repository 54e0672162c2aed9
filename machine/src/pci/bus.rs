//! Slots, and the dispatch of configuration cycles to the function in each.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, Weak};

use virtio_devices::Unpoisoned;
use virtio_devices::pci::PciFunction;
use vm_allocator::RangeInclusive;

use super::bars::{Fabric, Mappings};
use super::{Bdf, DoorbellBackend, HostBridge, MemoryWindows, PciError, SLOT_COUNT, WindowRanges};
use crate::bus::Bus;

/// Configuration space of one function in bytes.
const CONFIG_BYTES: u64 = 0x1000;

pub(super) struct Slot {
    pub(super) function: Arc<dyn PciFunction>,
    /// Also serialises remapping of this function.
    mappings: Mutex<Mappings>,
    /// Address space allocated to its BARs.
    pub(super) ranges: Vec<RangeInclusive>,
}

impl Slot {
    pub(super) fn new(function: Arc<dyn PciFunction>, ranges: Vec<RangeInclusive>) -> Arc<Self> {
        Arc::new(Self {
            function,
            mappings: Mutex::default(),
            ranges,
        })
    }
}

/// The one bus of a segment.
///
/// Lock order: a slot's `mappings` before `windows`. The slot table is never
/// locked while a function is called.
pub struct PciBus {
    segment: u16,
    pub(super) slots: RwLock<[Option<Arc<Slot>>; SLOT_COUNT as usize]>,
    pub(super) windows: Mutex<MemoryWindows>,
    /// Weak, because the MMIO bus holds our ECAM window and BARs.
    mmio: Weak<Bus>,
    doorbells: Arc<dyn DoorbellBackend>,
    unmapped_bars: AtomicU64,
    /// Bitmap of slots that are assigned only on request, as long as others are free.
    pub(super) reserved: AtomicU32,
}

impl fmt::Debug for PciBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(
                self.functions()
                    .iter()
                    .map(|(bdf, function)| format!("{bdf} {}", function.id())),
            )
            .finish()
    }
}

impl PciBus {
    /// The bus of `segment`. It starts without functions, except for the host bridge of segment 0. BARs are mapped on
    /// `mmio`.
    #[must_use]
    pub fn new(
        segment: u16,
        mmio: &Arc<Bus>,
        windows: MemoryWindows,
        doorbells: Arc<dyn DoorbellBackend>,
    ) -> Self {
        let mut slots = [const { None }; SLOT_COUNT as usize];
        if segment == 0 {
            slots[0] = Some(Slot::new(Arc::new(HostBridge::default()), Vec::new()));
        }
        Self {
            segment,
            slots: RwLock::new(slots),
            windows: Mutex::new(windows),
            mmio: Arc::downgrade(mmio),
            doorbells,
            unmapped_bars: AtomicU64::new(0),
            reserved: AtomicU32::new(0),
        }
    }

    /// Its windows.
    pub fn windows(&self) -> WindowRanges {
        lock(&self.windows).ranges()
    }

    /// The slots that functions can have: all but the host bridge's.
    pub(crate) fn own_slots(&self) -> Range<u8> {
        u8::from(self.segment == 0)..SLOT_COUNT
    }

    /// Reserves these slots for functions that request them. Functions without a requested slot that are added earlier
    /// then do not occupy them. Invalid slot numbers are ignored.
    pub fn reserve(&self, slots: impl IntoIterator<Item = u8>) {
        let slots = slots.into_iter().filter(|slot| *slot < SLOT_COUNT);
        let bitmap = slots.fold(0, |bitmap, slot| bitmap | 1_u32 << slot);
        self.reserved.fetch_or(bitmap, Ordering::Relaxed);
    }

    /// Puts `function` into `slot`, or into the next free one, and places its BARs.
    ///
    /// # Errors
    /// No such slot, no free slot, or no address space; nothing is changed then.
    pub fn add(&self, function: Arc<dyn PciFunction>, slot: Option<u8>) -> Result<Bdf, PciError> {
        let mut slots = self.slots.write().unpoisoned();
        let slot = match slot {
            Some(slot) if slot >= SLOT_COUNT => {
                return Err(PciError::SlotOutOfRange(slot));
            }
            Some(slot) if slots[usize::from(slot)].is_some() => {
                return Err(PciError::SlotInUse(slot));
            }
            Some(slot) => slot,
            None => {
                let reserved = self.reserved.load(Ordering::Relaxed);
                let own = self.own_slots();
                let free = || {
                    own.clone()
                        .filter(|slot| slots[usize::from(*slot)].is_none())
                };
                free()
                    .find(|slot| reserved & 1 << slot == 0)
                    .or_else(|| free().next())
                    .ok_or(PciError::BusFull {
                        segment: self.segment,
                        count: own.end - own.start,
                    })?
            }
        };
        let ranges = self.place_bars(function.as_ref())?;
        let entry = Slot::new(function, ranges);
        slots[usize::from(slot)] = Some(Arc::clone(&entry));
        drop(slots);
        self.remap(&entry);
        Ok(self.bdf(slot))
    }

    /// Removes the function from its slot; `None` if there is none or it is the host bridge. The guest must have
    /// released it.
    pub fn remove(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        if !self.own_slots().contains(&slot) {
            return None;
        }
        let entry = self.slots.write().unpoisoned()[usize::from(slot)].take()?;
        {
            let mut mappings = lock(&entry.mappings);
            let mut windows = lock(&self.windows);
            if let Some(mmio) = self.mmio.upgrade() {
                mappings.detach(&entry.function, &self.fabric(&mmio, &windows));
            }
            for range in &entry.ranges {
                windows.free(range);
            }
        }
        self.retry_refused();
        Some(Arc::clone(&entry.function))
    }

    /// Allocates addresses for memory of function `id` that is not behind a BAR.
    ///
    /// # Errors
    /// No address space is free.
    pub fn allocate_memory(
        &self,
        id: &str,
        bytes: u64,
        align_bytes: u64,
    ) -> Result<RangeInclusive, PciError> {
        lock(&self.windows).allocate_memory(id, bytes, align_bytes)
    }

    /// Allocates the addresses that such memory had when its function was saved; `None` if they are not free.
    pub fn take_memory(&self, start: u64, bytes: u64) -> Option<RangeInclusive> {
        if !lock(&self.windows).take(start, bytes) {
            return None;
        }
        RangeInclusive::new(start, start + bytes - 1).ok()
    }

    /// Frees the result of [`PciBus::allocate_memory`] or [`PciBus::take_memory`].
    pub fn free_memory(&self, range: &RangeInclusive) {
        lock(&self.windows).free(range);
    }

    /// Every function with its address, the host bridge first.
    pub fn functions(&self) -> Vec<(Bdf, Arc<dyn PciFunction>)> {
        let slots = self.slots.read().unpoisoned();
        (0..SLOT_COUNT)
            .zip(slots.iter())
            .filter_map(|(slot, entry)| {
                let function = Arc::clone(&entry.as_ref()?.function);
                Some((self.bdf(slot), function))
            })
            .collect()
    }

    /// Whether a function is in the slot.
    pub(super) fn is_filled(&self, slot: u8) -> bool {
        self.slot(slot).is_some()
    }

    /// Number of times the guest programmed a BAR to an address where it cannot be mapped.
    pub fn unmapped_bars(&self) -> u64 {
        self.unmapped_bars.load(Ordering::Relaxed)
    }

    /// Reads configuration space of any length at any offset.
    pub(super) fn config_read(&self, slot: u8, offset: u16, data: &mut [u8]) {
        let end = u64::from(offset) + data.len() as u64;
        let Some(entry) = self.slot(slot).filter(|_| end <= CONFIG_BYTES) else {
            data.fill(0xff);
            return;
        };
        let mut at = 0;
        while at < data.len() {
            let piece = aligned_piece(offset + at as u16, data.len() - at);
            let part = &mut data[at..at + piece];
            entry.function.config_read(offset + at as u16, part);
            at += piece;
        }
    }

    /// Writes configuration space of any length at any offset.
    pub(super) fn config_write(&self, slot: u8, offset: u16, data: &[u8]) {
        let end = u64::from(offset) + data.len() as u64;
        let Some(entry) = self.slot(slot).filter(|_| end <= CONFIG_BYTES) else {
            return;
        };
        let mut at = 0;
        let mut moved = false;
        while at < data.len() {
            let piece = aligned_piece(offset + at as u16, data.len() - at);
            let part = &data[at..at + piece];
            moved |= entry.function.config_write(offset + at as u16, part);
            at += piece;
        }
        if moved {
            self.remap(&entry);
        }
    }

    pub(super) fn bdf(&self, slot: u8) -> Bdf {
        let segment = self.segment;
        Bdf { segment, slot }
    }

    fn slot(&self, slot: u8) -> Option<Arc<Slot>> {
        let slots = self.slots.read().unpoisoned();
        slots.get(usize::from(slot))?.clone()
    }

    fn place_bars(&self, function: &dyn PciFunction) -> Result<Vec<RangeInclusive>, PciError> {
        let mut windows = lock(&self.windows);
        let mut ranges = Vec::new();
        for bar in function.bars() {
            match windows.allocate(function.id(), &bar) {
                Ok(range) => {
                    function.set_bar_address(bar.index, range.start());
                    ranges.push(range);
                }
                Err(error) => {
                    ranges.iter().for_each(|range| windows.free(range));
                    return Err(error);
                }
            }
        }
        Ok(ranges)
    }

    pub(super) fn remap(&self, entry: &Slot) {
        // Without the MMIO bus, the machine is being torn down.
        let Some(mmio) = self.mmio.upgrade() else {
            return;
        };
        let remapped = {
            let mut mappings = lock(&entry.mappings);
            let windows = lock(&self.windows);
            mappings.update(&entry.function, &self.fabric(&mmio, &windows))
        };
        self.unmapped_bars
            .fetch_add(remapped.refused, Ordering::Relaxed);
        if remapped.released {
            self.retry_refused();
        }
    }

    /// Maps BARs that could not be mapped while another one was at their address. A guest that moves two functions one
    /// after the other may overlap them temporarily.
    fn retry_refused(&self) {
        let Some(mmio) = self.mmio.upgrade() else {
            return;
        };
        let entries: Vec<Arc<Slot>> = {
            let slots = self.slots.read().unpoisoned();
            slots.iter().flatten().cloned().collect()
        };
        // A BAR that another vCPU is moving at this moment may be released by this loop and not by that vCPU, which
        // would have noticed it.
        for _ in 0..SLOT_COUNT {
            let mut released = false;
            for entry in &entries {
                let mut mappings = lock(&entry.mappings);
                if mappings.has_refused() {
                    let windows = lock(&self.windows);
                    let fabric = self.fabric(&mmio, &windows);
                    released |= mappings.update(&entry.function, &fabric).released;
                }
            }
            if !released {
                return;
            }
        }
    }

    fn fabric<'a>(&'a self, mmio: &'a Bus, windows: &'a MemoryWindows) -> Fabric<'a> {
        Fabric {
            mmio,
            doorbells: self.doorbells.as_ref(),
            windows,
        }
    }
}

/// The longest piece of 1, 2 or 4 bytes that is naturally aligned.
fn aligned_piece(offset: u16, left: usize) -> usize {
    match (offset % 4, left) {
        (0, 4..) => 4,
        (0 | 2, 2..) => 2,
        _ => 1,
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unpoisoned()
}

#[cfg(test)]
mod tests;
