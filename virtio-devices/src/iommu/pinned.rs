//! The mappings of an assigned device, in the IOMMU of the host.
//!
//! The host pins the memory that it maps. A mapping therefore has four steps. The range counts as mapped, so that no
//! discard of it begins ([`crate::dma_mapped`]). Discards of the range that have already begun end. The memory of the
//! range is looked up, which fails if it has been unplugged. Then the host maps it.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    Permissions, VolatileSlice,
};

use crate::Unpoisoned;
use crate::counters::Count;
use crate::device::GuestRam;
use crate::dma::{HostMappings, MSI_RANGE, Mapping, Refusal};
use crate::dma_mapped::DmaMapped;

/// Maximum size of a device's mappings, as a multiple of RAM. Without it, a guest could map the same memory all over the
/// input range: the host's page tables would have no bound, nor would the time for a device to join a domain.
const RAM_TIMES_MAX: u64 = 2;

/// The part of the host's IOMMU in front of one device.
pub trait HostIommu: Send + Sync {
    /// The input addresses that it can map, ascending.
    fn usable(&self) -> &[RangeInclusive<u64>];

    /// Gives the device access to `memory` from the input address `input` on, and pins it. The memory is guest RAM, and
    /// stays mapped in this process longer than this value exists.
    ///
    /// # Errors
    /// The host refuses.
    fn map(&self, input: u64, memory: &VolatileSlice<'_>, allows: Permissions) -> io::Result<()>;

    /// Undoes all mappings from `input` to `input + bytes`. None of them is only partly inside. The device has no access
    /// when this returns.
    ///
    /// # Errors
    /// The host fails. The device may still have access.
    fn unmap(&self, input: u64, bytes: u64) -> io::Result<()>;

    /// Keeps `value` until the host has ended all mappings, also those that it did not undo. It does so at the latest
    /// when the device is closed.
    fn keep(&self, value: Arc<dyn Any + Send + Sync>);
}

/// The guest memory that the host has pinned, and which is not discarded as long as it is.
#[derive(Debug)]
struct Held {
    book: Arc<DmaMapped>,
    ranges: Mutex<Ranges>,
}

#[derive(Debug, Default)]
struct Ranges {
    /// By first input address.
    mapped: BTreeMap<u64, Range<u64>>,
    /// Ranges that the host did not unmap.
    stuck: Vec<Range<u64>>,
}

impl Drop for Held {
    /// The host has closed the device, and so pins nothing.
    fn drop(&mut self) {
        let ranges = std::mem::take(self.ranges.get_mut().unpoisoned());
        let all = ranges.mapped.values().chain(&ranges.stuck);
        all.for_each(|range| self.book.release(range));
    }
}

/// Maps guest RAM for one device.
pub(crate) struct PinnedMappings {
    iommu: Arc<dyn HostIommu>,
    ram: GuestRam,
    held: Arc<Held>,
    mapped_bytes: AtomicU64,
    /// Mappings that the host refused.
    refused: Count,
    /// Mappings that the host did not remove.
    stuck: Count,
}

impl fmt::Debug for PinnedMappings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedMappings").finish_non_exhaustive()
    }
}

impl PinnedMappings {
    pub(crate) fn new(iommu: Arc<dyn HostIommu>, ram: GuestRam) -> Self {
        let held = Arc::new(Held {
            book: Arc::clone(ram.dma_mapped()),
            ranges: Mutex::default(),
        });
        iommu.keep(held.clone());
        Self {
            iommu,
            ram,
            held,
            mapped_bytes: AtomicU64::new(0),
            refused: Count::default(),
            stuck: Count::default(),
        }
    }

    /// Maps the parts of `range`, which can be in several regions of RAM. An error is returned with whether the host has
    /// some of them mapped nevertheless.
    fn map_parts(
        &self,
        ram: &GuestMemoryMmap<()>,
        input: u64,
        range: &Range<u64>,
        allows: Permissions,
    ) -> Result<(), (Refusal, bool)> {
        let no_ram = (Refusal::Invalid, false);
        let bytes = usize::try_from(range.end - range.start).map_err(|_| no_ram)?;
        let slices = || ram.get_slices(GuestAddress(range.start), bytes);
        if slices().any(|slice| slice.is_err()) {
            return Err(no_ram);
        }
        let ram_bytes: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
        if self.mapped_bytes() + bytes as u64 > ram_bytes.saturating_mul(RAM_TIMES_MAX) {
            return Err((Refusal::NoMemory, false));
        }
        let mut done = 0;
        for slice in slices().flatten() {
            if let Err(error) = self.iommu.map(input + done, &slice, allows) {
                let is_left = done > 0 && self.unmap_range(input, done).is_err();
                return Err((self.refused(&error), is_left));
            }
            done += slice.len() as u64;
        }
        Ok(())
    }

    fn refused(&self, error: &io::Error) -> Refusal {
        if self.refused.count_loudly() {
            log::warn!(
                "Virtual IOMMU: the host does not map memory for an assigned device: {error}"
            );
        }
        match error.raw_os_error() {
            // The limit of locked memory, and that of mappings.
            Some(libc::ENOMEM | libc::ENOSPC) => Refusal::NoMemory,
            Some(libc::EINVAL | libc::EEXIST) => Refusal::Invalid,
            _ => Refusal::Device,
        }
    }

    /// Undoes the mapping at the input address `first`. What the host does not release is never discarded.
    fn unmap_held(&self, first: u64, range: Range<u64>) -> Result<(), Refusal> {
        let bytes = range.end - range.start;
        if let Err(refusal) = self.unmap_range(first, bytes) {
            self.held.ranges.lock().unpoisoned().stuck.push(range);
            return Err(refusal);
        }
        self.held.book.release(&range);
        self.mapped_bytes.fetch_sub(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn unmap_range(&self, input: u64, bytes: u64) -> Result<(), Refusal> {
        self.iommu.unmap(input, bytes).map_err(|error| {
            if self.stuck.count_loudly() {
                log::error!(
                    "Virtual IOMMU: the host does not unmap {bytes:#x} bytes at {input:#x}: {error}"
                );
            }
            Refusal::Device
        })
    }
}

/// The guest addresses of a mapping; `None` if it would need more than there are.
fn target(first: u64, mapping: &Mapping) -> Option<Range<u64>> {
    let bytes = (mapping.last - first).checked_add(1)?;
    Some(mapping.to..mapping.to.checked_add(bytes)?)
}

impl HostMappings for PinnedMappings {
    fn map(&self, first: u64, mapping: &Mapping) -> Result<(), Refusal> {
        if mapping.allows == Permissions::No {
            return Ok(());
        }
        let mut usable = self.iommu.usable().iter();
        if !usable.any(|it| it.contains(&first) && it.contains(&mapping.last)) {
            return Err(Refusal::Range);
        }
        let range = target(first, mapping).ok_or(Refusal::Invalid)?;
        let bytes = range.end - range.start;
        self.held.book.hold(&range);
        let mapped = self.map_parts(&self.ram.memory(), first, &range, mapping.allows);
        if let Err((refusal, false)) = mapped {
            self.held.book.release(&range);
            return Err(refusal);
        }
        self.mapped_bytes.fetch_add(bytes, Ordering::Relaxed);
        let mut ranges = self.held.ranges.lock().unpoisoned();
        match mapped {
            Ok(()) => {
                ranges.mapped.insert(first, range);
                Ok(())
            }
            Err((refusal, _)) => {
                ranges.stuck.push(range);
                Err(refusal)
            }
        }
    }

    fn unmap(&self, first: u64) -> Result<(), Refusal> {
        let removed = self.held.ranges.lock().unpoisoned().mapped.remove(&first);
        removed.map_or(Ok(()), |range| self.unmap_held(first, range))
    }

    fn unmap_all(&self) -> Result<(), Refusal> {
        let mut result = Ok(());
        loop {
            let removed = self.held.ranges.lock().unpoisoned().mapped.pop_first();
            let Some((first, range)) = removed else {
                return result;
            };
            result = result.and(self.unmap_held(first, range));
        }
    }

    fn mapped_bytes(&self) -> u64 {
        self.mapped_bytes.load(Ordering::Relaxed)
    }

    fn reserved(&self) -> Vec<RangeInclusive<u64>> {
        let msi = std::iter::once(&MSI_RANGE);
        let mut usable: Vec<_> = self.iommu.usable().iter().chain(msi).collect();
        usable.sort_by_key(|range| *range.start());
        let mut reserved = Vec::new();
        let mut at = Some(0);
        for range in usable {
            if let Some(first) = at.filter(|first| first < range.start()) {
                reserved.push(first..=range.start() - 1);
            }
            at = at.and_then(|at| Some(at.max(range.end().checked_add(1)?)));
        }
        reserved.extend(at.map(|first| first..=u64::MAX));
        reserved
    }
}
