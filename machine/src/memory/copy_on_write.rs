//! Guest RAM that maps the files of a snapshot and shares their pages with other machines.
//!
//! ```text
//!   file   │ pages │ hole │ pages │            one page cache for all machines
//!   RAM    │ private mapping │ anonymous …     a write makes a page the machine's own
//! ```
//! If guest RAM is discarded, [`Overlay`] replaces the file by anonymous memory, so that the guest reads zeros instead of
//! the snapshot's content.
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
        &mut self,
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
        self.overlay = Some(overlay);
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
mod tests {
    use std::os::unix::fs::FileExt;

    use virtio_devices::reclaim::{DiscardEngine, DiscardSwitch, Expected, GuestRange, Outcome};
    use vm_memory::Bytes;

    use super::super::layout::{MIB, PAGE_BYTES};
    use super::super::test_memory::{self, address, mark, zones};
    use super::*;

    /// Single pages and runs; between pages 600 and 700 are holes.
    const PAGES: [u64; 9] = [0, 1, 511, 512, 600, 700, 701, 1700, 1791];

    fn memory(shared: bool) -> GuestMemory {
        zones(&[("a", shared)])
    }

    fn read(memory: &GuestMemory, page: u64) -> u64 {
        memory.ram().memory().read_obj(address(page)).unwrap()
    }

    fn write(memory: &GuestMemory, page: u64, value: u64) {
        let ram = memory.ram().memory();
        ram.write_obj(value, address(page)).unwrap();
    }

    fn save(memory: &GuestMemory) -> Vec<SavedZone> {
        let files = test_memory::saved(memory);
        files.into_iter().map(SavedZone::from).collect()
    }

    fn saved() -> Vec<SavedZone> {
        let memory = memory(false);
        for page in PAGES {
            write(&memory, page, mark(page));
        }
        save(&memory)
    }

    fn shown(files: &[SavedZone]) -> GuestMemory {
        let mut memory = memory(false);
        memory.show_files(files, true, |_| ()).unwrap();
        memory
    }

    fn discard(memory: &GuestMemory, pages: std::ops::Range<u64>) -> Outcome {
        let mut claims = [GuestRange {
            start: pages.start * PAGE_BYTES,
            bytes: (pages.end - pages.start) * PAGE_BYTES,
        }];
        let engine = DiscardEngine::new(Arc::<DiscardSwitch>::default());
        let mut engine = engine.over(memory.overlay().cloned());
        engine.discard(memory.ram(), &mut claims, Expected::Zeros)
    }

    #[test]
    fn machines_see_the_file_and_each_its_own_writes() {
        let files = saved();
        let (first, second) = (shown(&files), shown(&files));
        write(&first, 1, 7);
        write(&first, 650, 8);
        for page in 0..1792 {
            let expected = if PAGES.contains(&page) { mark(page) } else { 0 };
            assert_eq!(read(&second, page), expected, "{page}");
        }
        assert_eq!((read(&first, 1), read(&first, 650)), (7, 8));
        assert_eq!(read(&first, 700), mark(700));
    }

    #[test]
    fn discarded_page_is_zero_and_never_the_files_again() {
        let files = saved();
        let memory = shown(&files);
        write(&memory, 1, 7);
        // Written, read, never touched; across the border of two chunks, and of the file.
        assert_eq!(read(&memory, 700), mark(700));
        for pages in [0..2, 511..513, 699..701, 1024..1792] {
            let bytes = (pages.end - pages.start) * PAGE_BYTES;
            let outcome = discard(&memory, pages);
            assert_eq!(outcome.discarded.bytes, bytes, "{outcome:?}");
        }
        for page in [0, 1, 511, 512, 700, 1700, 1791] {
            assert_eq!(read(&memory, page), 0, "{page}");
        }
        assert_eq!(
            (read(&memory, 600), read(&memory, 701)),
            (mark(600), mark(701))
        );
        write(&memory, 700, 9);
        assert_eq!(discard(&memory, 700..701).discarded.bytes, PAGE_BYTES);
        assert_eq!(read(&memory, 700), 0);
    }

    #[test]
    fn every_other_page_is_discarded_and_its_neighbours_stay() {
        let full = memory(false);
        for page in 0..1792 {
            write(&full, page, mark(page));
        }
        let files = save(&full);
        let memory = shown(&files);
        for page in (0..1792).step_by(2) {
            let outcome = discard(&memory, page..page + 1);
            assert_eq!(outcome.discarded.bytes, PAGE_BYTES, "{outcome:?}");
            assert_eq!(read(&memory, page), 0);
            assert_eq!(read(&memory, page + 1), mark(page + 1));
        }
    }

    #[test]
    fn memory_that_shows_a_file_is_saved_as_the_guest_sees_it() {
        let memory = shown(&saved());
        write(&memory, 1, 7);
        write(&memory, 1000, 8);
        discard(&memory, 700..701);
        let again = shown(&save(&memory));
        for page in 0..1792 {
            assert_eq!(read(&again, page), read(&memory, page), "{page}");
        }
    }

    #[test]
    fn damaged_file_and_other_memory_are_refused_by_name() {
        let files = saved();
        let refused = memory(true).show_files(&files, true, |_| ()).unwrap_err();
        assert!(
            refused.to_string().contains("zone a is memfd-shared"),
            "{refused}"
        );
        let refused = |files: &[_]| {
            let refused = memory(false).show_files(files, true, |_| ()).unwrap_err();
            refused.to_string()
        };
        // In a page, and between two.
        for at in [600 * PAGE_BYTES + 1, 650 * PAGE_BYTES] {
            let files = saved();
            files[0]
                .single()
                .unwrap()
                .file
                .write_all_at(&[1], at)
                .unwrap();
            let told = refused(&files);
            assert!(
                told.contains("zone a is damaged at offset 0x200000"),
                "{told}"
            );
        }
        files[0].single().unwrap().file.set_len(MIB).unwrap();
        let told = refused(&files);
        assert!(told.contains("the memory file has"), "{told}");
    }
}
