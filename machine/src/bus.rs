//! Address spaces of the guest: maps ports and addresses to devices.
//!
//! Port I/O and memory-mapped I/O have one [`Bus`] each. On every exit, vCPU threads look up devices. PCI moves ranges
//! when the guest programs a BAR. The lock is held only during the lookup, because a device may change the same bus
//! while it handles an access.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use virtio_devices::Unpoisoned;

/// A device that responds to reads and writes in a range of addresses.
///
/// vCPU threads call it, several at a time. `offset` counts from the start of the device's range, and `offset +
/// data.len()` never exceeds its end. Any length is possible; the device must not panic or block.
pub trait BusDevice: Send + Sync {
    /// Fills all of `data`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Processes all of `data`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Reasons why a range cannot be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Part of the range belongs to another device.
    #[error("{base:#x}+{bytes:#x} overlaps the device at {other_base:#x}+{other_bytes:#x}")]
    Overlap {
        /// Start of the refused range.
        base: u64,
        /// Its length.
        bytes: u64,
        /// Start of the existing range.
        other_base: u64,
        /// Its length.
        other_bytes: u64,
    },
    /// The range is empty or exceeds the address space.
    #[error("{base:#x}+{bytes:#x} is not a range of addresses")]
    NotARange {
        /// Start of the refused range.
        base: u64,
        /// Its length.
        bytes: u64,
    },
}

struct Entry {
    bytes: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space with non-overlapping ranges.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Entry>>,
    missed: AtomicU64,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.ranges.read().unpoisoned();
        f.debug_map()
            .entries(ranges.iter().map(|(base, entry)| (base, entry.bytes)))
            .finish()
    }
}

impl Bus {
    /// An empty address space.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Maps `device` at `base..base + bytes`.
    ///
    /// # Errors
    /// The range, or a part of it, is in use, or it is invalid.
    pub fn insert(
        &self,
        base: u64,
        bytes: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let last = bytes
            .checked_sub(1)
            .and_then(|extent| base.checked_add(extent))
            .ok_or(BusError::NotARange { base, bytes })?;
        let mut ranges = self.ranges.write().unpoisoned();
        // Ranges do not overlap, so only the last one that starts at or before our end can overlap ours.
        if let Some((&other_base, other)) = ranges.range(..=last).next_back()
            && other_base + (other.bytes - 1) >= base
        {
            return Err(BusError::Overlap {
                base,
                bytes,
                other_base,
                other_bytes: other.bytes,
            });
        }
        ranges.insert(base, Entry { bytes, device });
        Ok(())
    }

    /// Unmaps the device that starts at `base`; false if there is none. Accesses that have already found it may still
    /// be running.
    pub fn remove(&self, base: u64) -> bool {
        let mut ranges = self.ranges.write().unpoisoned();
        ranges.remove(&base).is_some()
    }

    /// Reads. An address without a device reads as all ones, as on an undriven bus; the result is false then.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((device, offset)) = self.resolve(address, data.len()) else {
            self.missed.fetch_add(1, Ordering::Relaxed);
            data.fill(0xff);
            return false;
        };
        device.read(offset, data);
        true
    }

    /// Writes. A write to an address without a device is ignored; the result is false then.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((device, offset)) = self.resolve(address, data.len()) else {
            self.missed.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        device.write(offset, data);
        true
    }

    /// Accesses that hit no device or crossed the end of one.
    pub fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }

    /// First address and length of each range.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn ranges(&self) -> Vec<(u64, u64)> {
        let ranges = self.ranges.read().unpoisoned();
        let range = |(base, entry): (&u64, &Entry)| (*base, entry.bytes);
        ranges.iter().map(range).collect()
    }

    fn resolve(&self, address: u64, bytes: usize) -> Option<(Arc<dyn BusDevice>, u64)> {
        let ranges = self.ranges.read().unpoisoned();
        let (base, entry) = ranges.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(bytes as u64)?;
        (end <= entry.bytes).then(|| (Arc::clone(&entry.device), offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Mutex;

    /// Returns the low byte of each offset and records writes.
    #[derive(Default)]
    struct Recorder {
        writes: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = (offset as u8).wrapping_add(i as u8);
            }
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.writes.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn access_inside_a_range_reaches_the_device_with_its_offset() {
        let bus = Bus::new();
        let device = Arc::new(Recorder::default());
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        let mut data = [0; 4];
        bus.read(0x100c, &mut data);
        assert_eq!(data, [0xc, 0xd, 0xe, 0xf]);
        bus.write(0x1002, &[1, 2]);
        assert_eq!(*device.writes.lock().unwrap(), [(2, vec![1, 2])]);
        assert_eq!(bus.missed(), 0);
    }

    #[test]
    fn access_past_the_end_reads_ones_and_is_counted() {
        let bus = Bus::new();
        let device = Arc::new(Recorder::default());
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        for address in [0x100d, 0x1010, 0xfff, u64::MAX - 1] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
            bus.write(address, &data);
        }
        assert!(device.writes.lock().unwrap().is_empty());
        assert_eq!(bus.missed(), 8);
    }

    #[test]
    fn insert_of_impossible_ranges_is_refused() {
        let bus = Bus::new();
        let device = Arc::new(Recorder::default());
        assert!(matches!(
            bus.insert(0, 0, device.clone()),
            Err(BusError::NotARange { .. })
        ));
        assert!(matches!(
            bus.insert(u64::MAX, 2, device.clone()),
            Err(BusError::NotARange { .. })
        ));
        bus.insert(u64::MAX, 1, device.clone()).unwrap();
        assert!(bus.insert(0, u64::MAX, device).is_ok());
    }

    #[test]
    fn removed_range_is_free_again() {
        let bus = Bus::new();
        let device = Arc::new(Recorder::default());
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        assert!(!bus.remove(0x1001));
        assert!(bus.remove(0x1000));
        bus.insert(0xff8, 0x10, device).unwrap();
    }

    proptest! {
        #[test]
        fn insert_agrees_with_a_byte_map(ranges in prop::collection::vec((0u64..64, 1u64..16), 1..20)) {
            let bus = Bus::new();
            let mut taken = [false; 96];
            for (base, bytes) in ranges {
                let cells = &mut taken[base as usize..(base + bytes) as usize];
                let free = cells.iter().all(|cell| !cell);
                prop_assert_eq!(
                    bus.insert(base, bytes, Arc::new(Recorder::default())).is_ok(),
                    free
                );
                if free {
                    cells.fill(true);
                }
            }
            for (address, taken) in taken.into_iter().enumerate() {
                prop_assert_eq!(bus.resolve(address as u64, 1).is_some(), taken);
            }
        }
    }
}
