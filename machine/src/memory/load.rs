//! Loads the saved content of a zone into RAM before the machine exists.

use std::io;

use vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace};

use super::content::{CHUNK_BYTES, Chunk, PAGE, chunks, each_run};
use super::layers::{SavedChunk, SavedZone};
use super::{ContentError, GuestMemory, Zone};

impl GuestMemory {
    /// Loads files written by [`super::ContentFiles`] into untouched RAM. `thp`: whether RAM
    /// uses transparent huge pages. They are disabled while the content is loaded, because huge pages that the content does
    /// not fill must not become resident. `done` receives the size of each piece of the zone.
    ///
    /// # Errors
    /// A table does not fit the zone, a checksum does not match, or RAM or a file cannot be accessed.
    pub fn load_zone(
        &self,
        zone: &Zone,
        saved: &SavedZone,
        thp: bool,
        mut done: impl FnMut(u64),
    ) -> Result<(), ContentError> {
        let table = saved.chunks(zone)?;
        self.advise_huge_pages(zone, false);
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut left = table.into_iter().peekable();
        for chunk in chunks(zone) {
            done(chunk.bytes as u64);
            if let Some((_, pages)) = left.next_if(|(it, _)| it.offset == chunk.offset) {
                self.load_chunk(zone, saved, chunk, &pages, &mut buffer[..chunk.bytes])?;
            }
        }
        if thp {
            self.advise_huge_pages(zone, true);
        }
        Ok(())
    }

    /// Verifies the checksums before writing anything to RAM.
    fn load_chunk(
        &self,
        zone: &Zone,
        saved: &SavedZone,
        chunk: Chunk,
        pages: &SavedChunk,
        buffer: &mut [u8],
    ) -> Result<(), ContentError> {
        saved.read(&zone.id, pages, buffer)?;
        let ram = self.ram().memory();
        each_run(&pages.pages, chunk.bytes / PAGE, |start, bytes| {
            let address = GuestAddress(chunk.guest.0 + start as u64);
            ram.write_slice(&buffer[start..start + bytes], address)
        })
        .map_err(|error| ContentError::Ram {
            zone: zone.id.clone(),
            offset: chunk.offset,
            source: io::Error::other(error),
        })
    }
}
