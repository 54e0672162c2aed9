//! Guest RAM that maps the files of a snapshot and shares their pages with other machines.
//!
//! ```text
//!   file   │ pages │ hole │ pages │            one page cache for all machines
//!   RAM    │ private mapping │ anonymous …     a write makes a page the machine's own
//! ```
//! If guest RAM is discarded, [`Overlay`] replaces the file with anonymous memory, so that the guest reads zeros
//! instead of the snapshot's content.
#![allow(unsafe_code)]
// UNSAFETY: files are mapped over guest RAM.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use virtio_devices::reclaim::Overlay;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::content::{self, CHUNK_BYTES, ChunkState, ContentError, PAGE};
use super::layers::ZoneFile;
use super::{GuestMemory, SavedZone, Zone, source};

/// Reasons why RAM cannot map the files.
#[derive(Debug, thiserror::Error)]
pub enum CopyOnWriteError {
    /// A zone has another kind of memory.
    #[error(
        "memory zone {zone} is {backing}; copy-on-write needs private memory without file and huge pages"
    )]
    Backing {
        /// The zone.
        zone: String,
        /// Its kind, as in statistics.
        backing: &'static str,
    },
    /// The pages of a zone are in several files, which would need too many mappings.
    #[error(
        "memory zone {zone} is in a chain of snapshots; merge them first (ch-remote snapshot-merge)"
    )]
    Chain {
        /// The zone.
        zone: String,
    },
    /// A file is damaged or cannot be read.
    #[error(transparent)]
    Content(ContentError),
    /// A file cannot be mapped.
    #[error("cannot map the memory file of zone {zone}")]
    Map {
        /// The zone.
        zone: String,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
}

impl GuestMemory {
    /// Maps the file of each zone, which must not change, over untouched RAM. All checksums are verified first. `thp`:
    /// memory that replaces a file may have transparent huge pages. `done` receives the size of each piece.
    ///
    /// # Errors
    /// A zone has another kind of memory or several files, a table or file does not match its zone, or a file cannot be
    /// mapped.
    pub fn show_files(
        &self,
        saved: &[SavedZone],
        thp: bool,
        mut done: impl FnMut(u64),
    ) -> Result<(), CopyOnWriteError> {
        let other = |zone: &&Zone| zone.backing != source::ANONYMOUS;
        if let Some(zone) = self.zones().iter().find(other) {
            let (zone, backing) = (zone.id.clone(), zone.backing);
            return Err(CopyOnWriteError::Backing { zone, backing });
        }
        let overlay = Arc::new(Overlay::new(thp));
        let mut buffer = vec![0; CHUNK_BYTES];
        for (zone, saved) in self.zones().iter().zip(saved) {
            let Some(ZoneFile { file, table, .. }) = saved.single() else {
                let zone = zone.id.clone();
                return Err(CopyOnWriteError::Chain { zone });
            };
            let table = content::checked_table(zone, file, table, false);
            for (chunk, saved) in table.map_err(CopyOnWriteError::Content)? {
                let buffer = &mut buffer[..chunk.bytes];
                let span = check(file, saved, buffer);
                let span = span.map_err(content::in_file(&zone.id, chunk.offset));
                let Some((first, end)) = span.map_err(CopyOnWriteError::Content)? else {
                    return Err(CopyOnWriteError::Content(ContentError::Damaged {
                        zone: zone.id.clone(),
                        offset: chunk.offset,
                    }));
                };
                let ram = self.ram().memory();
                let region = ram.find_region(chunk.guest);
                let region = region.expect("the zones are made of the regions");
                let at = (chunk.guest.0 - region.start_addr().0) as usize + first;
                let start = region.as_ptr() as usize + at;
                // SAFETY: whole pages of private anonymous guest RAM, which is untouched.
                let shown =
                    unsafe { overlay.show(start, end - first, file, chunk.offset + first as u64) };
                shown.map_err(|source| CopyOnWriteError::Map {
                    zone: zone.id.clone(),
                    source,
                })?;
                done(chunk.bytes as u64);
            }
        }
        // RAM was untouched, so it shows no other files.
        self.overlay.set(overlay).ok();
        Ok(())
    }
}

/// The part of a chunk from its first to its last page, in bytes. `None` if its checksum does not match, or if the file
/// has other data between these pages, which the guest would see.
fn check(file: &File, saved: &ChunkState, buffer: &mut [u8]) -> io::Result<Option<(usize, usize)>> {
    if !content::read_checked(file, saved, buffer)? {
        return Ok(None);
    }
    let is_saved = |page: &usize| content::is_set(&saved.pages.0, *page);
    let count = buffer.len() / PAGE;
    let (Some(first), Some(last)) = ((0..count).find(is_saved), (0..count).rfind(is_saved)) else {
        return Ok(None);
    };
    for page in (first..last).filter(|page| !is_saved(page)) {
        let between = &mut buffer[page * PAGE..(page + 1) * PAGE];
        file.read_exact_at(between, saved.offset + (page * PAGE) as u64)?;
        if between.iter().any(|byte| *byte != 0) {
            return Ok(None);
        }
    }
    Ok(Some((first * PAGE, (last + 1) * PAGE)))
}

#[cfg(test)]
mod tests;
