//! RAM that moves to another process as memory files, instead of its content.
//!
//! ```text
//!   source                                target
//!   memory_files() ─ one for each zone ─► ZoneFiles::Given ─► with_dimms()   maps the same pages
//! ```
//! Both processes map the same pages until one of them has ended, so only the owner of the machine may write to them.

use std::fs::File;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::GuestMemory;

/// A zone that other processes cannot map.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "memory zone {zone} is {backing}, so it cannot be handed over; use shared=on or hugepages=on"
)]
pub struct PrivateZone {
    /// Its name.
    pub zone: String,
    /// Its kind, as in statistics.
    pub backing: &'static str,
}

impl GuestMemory {
    /// The memory file of each zone, in their order.
    ///
    /// # Errors
    /// The first zone that has none.
    pub fn memory_files(&self) -> Result<Vec<Arc<File>>, PrivateZone> {
        let ram = self.ram().memory();
        let files = self.zones().iter().map(|zone| {
            let start = zone.ranges.first().map(|range| GuestAddress(range.start));
            let region = start.and_then(|start| ram.find_region(start));
            let shared = region.filter(|it| it.flags() & libc::MAP_SHARED != 0);
            let file = shared.and_then(|it| it.file_offset());
            let file = file.map(|it| Arc::clone(it.arc()));
            file.ok_or_else(|| PrivateZone {
                zone: zone.id.clone(),
                backing: zone.backing,
            })
        });
        files.collect()
    }
}

#[cfg(test)]
mod tests;
