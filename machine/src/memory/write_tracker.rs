//! Tracks which pages of guest RAM are written while the machine runs. KVM's log has the writes of the guest and KVM;
//! the log of this process has those of devices and the discard engine.
#![allow(unsafe_code)]
// UNSAFETY: memory slots hand address ranges of this process to the kernel.

use std::ops::Range;
use std::sync::Arc;

use hypervisor::bindings::KVM_MEM_LOG_DIRTY_PAGES;
use hypervisor::{MemorySlot, Vm};

use virtio_devices::write_log::WriteLog;

use super::layout::PAGE_BYTES;
use super::{GuestMemory, MemoryError};

const WORD_PAGES: u64 = u64::BITS as u64;

/// Tracks writes until it is dropped.
#[derive(Debug)]
pub struct WriteTracker {
    vm: Arc<Vm>,
    slots: Vec<MemorySlot>,
    /// Dropped after `vm`: keeps the slots mapped, should the machine end earlier.
    memory: GuestMemory,
}

impl WriteTracker {
    /// `slots` are the slots of `memory`.
    pub(super) fn start(
        vm: &Arc<Vm>,
        slots: Vec<MemorySlot>,
        memory: &GuestMemory,
    ) -> Result<Self, MemoryError> {
        let tracker = Self {
            vm: Arc::clone(vm),
            slots,
            memory: memory.clone(),
        };
        let zones = memory.zones().iter();
        let ranges = zones.flat_map(|zone| zone.ranges.clone());
        memory.ram().writes().start(ranges);
        tracker.set_flags(KVM_MEM_LOG_DIRTY_PAGES)?;
        Ok(tracker)
    }

    fn set_flags(&self, flags: u32) -> Result<(), MemoryError> {
        for slot in &self.slots {
            // SAFETY: the slot is one of `memory`, which is the guest's and stays mapped as long as `vm` exists here.
            let set = unsafe { self.vm.set_memory_slot(MemorySlot { flags, ..*slot }) };
            set.map_err(|source| MemoryError::Slot {
                guest_address: slot.guest_address,
                source,
            })?;
        }
        Ok(())
    }

    /// The tracked RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The pages that were written since the start or the last call.
    ///
    /// # Errors
    /// KVM cannot return its log: the machine has ended.
    pub fn take(&self) -> Result<WrittenPages, MemoryError> {
        let mut written = WrittenPages::of_log(self.memory.ram().writes());
        for slot in &self.slots {
            let log = self.vm.dirty_pages(slot.slot, slot.bytes);
            let log = log.map_err(|source| MemoryError::Slot {
                guest_address: slot.guest_address,
                source,
            })?;
            written.add(slot.guest_address, &log);
        }
        Ok(written)
    }
}

impl Drop for WriteTracker {
    fn drop(&mut self) {
        if let Err(error) = self.set_flags(0) {
            // The guest is slower than it could be, but correct.
            log::warn!("Cannot stop recording the guest's writes: {error}");
        }
        self.memory.ram().writes().stop();
        for hotplug in self.memory.hotplug_ram() {
            hotplug.thaw();
        }
    }
}

/// A set of pages of guest RAM.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct WrittenPages {
    ranges: Vec<WrittenRange>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct WrittenRange {
    guest: Range<u64>,
    words: Vec<u64>,
}

impl WrittenPages {
    /// Takes the pages that this process has recorded.
    pub(super) fn of_log(log: &WriteLog) -> Self {
        let mut ranges = Vec::new();
        log.take(|guest, words| {
            ranges.push(WrittenRange {
                guest: guest.clone(),
                words: words.collect(),
            });
        });
        Self { ranges }
    }

    /// Adds the pages of `log` that begin at `start`.
    fn add(&mut self, start: u64, log: &[u64]) {
        let Some(range) = self.ranges.iter_mut().find(|it| it.guest.contains(&start)) else {
            return;
        };
        // Slots are whole zones' ranges, or blocks of at least 2 MiB: they begin at a word.
        let first = ((start - range.guest.start) / PAGE_BYTES / WORD_PAGES) as usize;
        for (word, bits) in range.words[first..].iter_mut().zip(log) {
            *word |= bits;
        }
    }

    /// Adds all pages of `other`, which has the same ranges.
    pub fn add_all(&mut self, other: &Self) {
        for range in &other.ranges {
            self.add(range.guest.start, &range.words);
        }
    }

    /// The number of bytes in these pages.
    pub fn bytes(&self) -> u64 {
        let words = self.ranges.iter().flat_map(|range| &range.words);
        let pages: u64 = words.map(|word| u64::from(word.count_ones())).sum();
        pages * PAGE_BYTES
    }

    /// The bits of the `count` pages from the address `start` on, which is a multiple of 64 pages from the start of its
    /// range; the first in bit 0 of the first byte. `None` if none is set.
    pub(super) fn bits(&self, start: u64, count: usize) -> Option<Vec<u8>> {
        let range = self.ranges.iter().find(|it| it.guest.contains(&start))?;
        let first = ((start - range.guest.start) / PAGE_BYTES / WORD_PAGES) as usize;
        let words = &range.words[first..];
        let words = &words[..words.len().min(count.div_ceil(WORD_PAGES as usize))];
        if words.iter().all(|word| *word == 0) {
            return None;
        }
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(count.div_ceil(8));
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use hypervisor::Kvm;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::memory::test_memory::zones;

    #[test]
    fn pages_that_this_process_writes_or_discards_are_tracked_until_the_end() {
        let Ok(kvm) = Kvm::open().map_err(test_skip::skip) else {
            return;
        };
        let memory = zones(&[("a", false), ("b", true)]);
        let vm = Arc::new(kvm.create_vm().unwrap());
        let slots = memory.attach(&vm).unwrap();
        let tracker = slots.track_writes(&memory).unwrap();
        assert_eq!(tracker.take().unwrap().bytes(), 0);
        let writes = memory.ram().writes();
        assert!(writes.is_on());
        writes.record(4096, 1);
        writes.record((8 << 20) - 1, 2);
        let written = tracker.take().unwrap();
        assert_eq!(written.bytes(), 3 * 4096);
        assert_eq!(written.bits(0, 512).unwrap()[0], 2);
        assert_eq!(written.bits(2 << 20, 512), None);
        let mut sum = tracker.take().unwrap();
        assert_eq!(sum.bytes(), 0);
        sum.add_all(&written);
        assert_eq!(sum, written);
        drop(tracker);
        assert!(!writes.is_on());
        // The slots are still there, without a log.
        assert!(vm.dirty_pages(0, 7 << 20).is_err());
        memory
            .ram()
            .memory()
            .write_obj(1_u8, GuestAddress(0))
            .unwrap();
        drop(slots);
    }
}
