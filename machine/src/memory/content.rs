//! The content of guest RAM in files, one per zone.
//!
//! A file has the size of its zone. It holds the resident pages that are not zero; the rest is a hole:
//!
//! ```text
//!   guest RAM   │ data │ discarded  │ zeros │ data │
//!   file        │ data │ hole               │ data │
//! ```
//! A table stored with the file lists these pages in chunks of 2 MiB. A reader therefore depends neither on the holes
//! that a file system keeps nor on the rest of the file. It does not touch pages that are not listed.
//!
//! Resident pages of private memory are found through the page tables. Shared memory is found through its file, whose
//! holes read as zeros without becoming resident.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use state::{Bytes, Part, StateError, parts, require};
use virtio_devices::reclaim::Pagemap;
use vm_memory::{
    Bytes as _, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion,
};

use super::checksums::{self, PIECE_BYTES, PIECE_PAGES};
use super::layout::{MIB, PAGE_BYTES};
use super::{GuestMemory, Zone, backing};

/// The tables have no envelopes, because they can be long: they are of the version of their snapshot.
pub(super) const PART: Part = parts::SNAPSHOT;

pub(super) const CHUNK_BYTES: usize = (2 * MIB) as usize;
pub(super) const PAGE: usize = PAGE_BYTES as usize;
const ZERO_PAGE: [u8; PAGE] = [0; PAGE];

/// The table of one zone's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZoneContentState {
    /// Size of the zone and of the file.
    pub bytes: u64,
    /// The chunks with pages, in ascending order.
    pub chunks: Vec<ChunkState>,
}

impl ZoneContentState {
    /// The number of bytes in the listed pages.
    pub fn data_bytes(&self) -> u64 {
        let bytes = self.chunks.iter().flat_map(|chunk| &chunk.pages.0);
        bytes.map(|byte| u64::from(byte.count_ones())).sum::<u64>() * PAGE_BYTES
    }
}

/// Up to 2 MiB of a zone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkState {
    /// Offset in the file.
    pub offset: u64,
    /// The pages in the file: one bit each, the first in bit 0 of the first byte.
    pub pages: Bytes,
    /// In a differential snapshot, the pages that hold no data any more, unlike in its base. Since version 4, and left
    /// out if there are none.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub zeros: Bytes,
    /// CRC-32 of the pages in each piece of 16 KiB that has some, of 4 bytes each, least significant first. Since version 6.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub sums: Bytes,
    /// CRC-32 of all pages, one after the other. Before version 6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crc32: Option<u32>,
}

fn is_empty(bytes: &Bytes) -> bool {
    bytes.0.is_empty()
}

impl ChunkState {
    /// Whether it has all checksums of one version.
    pub(super) fn has_checksums(&self) -> bool {
        match self.crc32 {
            Some(_) => self.sums.0.is_empty(),
            None => checksums::fit(&self.pages.0, &self.sums),
        }
    }

    /// Whether the checksums match its pages, which are at their places in `buffer`.
    fn matches(&self, buffer: &[u8]) -> bool {
        let pages = &self.pages.0;
        let Some(expected) = self.crc32 else {
            return sums_in_place(pages, buffer) == self.sums;
        };
        let mut crc = crc32fast::Hasher::new();
        let data = buffer.chunks_exact(PAGE).enumerate();
        for (_, page) in data.filter(|(page, _)| is_set(pages, *page)) {
            crc.update(page);
        }
        crc.finalize() == expected
    }
}

/// The checksums of `pages`, which are at their places in `buffer`.
pub(super) fn sums_in_place(pages: &[u8], buffer: &[u8]) -> Bytes {
    checksums::sums(pages, |page| &buffer[page * PAGE..(page + 1) * PAGE])
}

/// Reasons why the content of RAM cannot be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// The page tables of this process cannot be read.
    #[error("Cannot determine which pages of guest RAM hold data")]
    Pages(#[source] io::Error),
    /// Guest RAM cannot be read or written.
    #[error("Cannot access guest RAM of zone {zone} at offset {offset:#x}")]
    Ram {
        zone: String,
        /// The offset in it.
        offset: u64,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The file cannot be read or written.
    #[error("Cannot access the memory file of zone {zone} at offset {offset:#x}")]
    File {
        zone: String,
        /// The offset in it.
        offset: u64,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A checksum does not match.
    #[error("The memory file of zone {zone} is damaged at offset {offset:#x}")]
    Damaged {
        /// The zone.
        zone: String,
        /// Offset of the chunk.
        offset: u64,
    },
    /// Content for another place, or of another size than stated.
    #[error("Content for memory zone {zone} at offset {offset:#x} is invalid: {reason}")]
    Invalid {
        /// Number of the zone.
        zone: u32,
        /// The offset in it.
        offset: u64,
        /// The fault.
        reason: &'static str,
    },
    /// The table does not fit this zone.
    #[error(transparent)]
    Table(StateError),
}

/// A piece of a zone that ends with its range.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk {
    /// In the zone and in the file.
    pub(super) offset: u64,
    pub(super) guest: GuestAddress,
    pub(super) bytes: usize,
}

pub(super) fn chunks(zone: &Zone) -> impl Iterator<Item = Chunk> {
    let mut before = 0;
    zone.ranges.iter().flat_map(move |range| {
        let (start, offset) = (range.start, before);
        let bytes = range.end - range.start;
        before += bytes;
        (0..bytes).step_by(CHUNK_BYTES).map(move |at| Chunk {
            offset: offset + at,
            guest: GuestAddress(start + at),
            bytes: (bytes - at).min(CHUNK_BYTES as u64) as usize,
        })
    })
}

/// Whether the bit of `page` is set; the first is bit 0 of the first byte.
pub(super) fn is_set(pages: &[u8], page: usize) -> bool {
    pages[page / 8] & 1 << (page % 8) != 0
}

/// Calls `visit` with each run of set bits, in bytes from the start of the chunk.
pub(super) fn each_run<E>(
    pages: &[u8],
    count: usize,
    mut visit: impl FnMut(usize, usize) -> Result<(), E>,
) -> Result<(), E> {
    let mut page = 0;
    while page < count {
        let start = page;
        while page < count && is_set(pages, page) {
            page += 1;
        }
        if page > start {
            visit(start * PAGE, (page - start) * PAGE)?;
        }
        page += 1;
    }
    Ok(())
}

impl GuestMemory {
    /// Writes the pages of `zone` that hold data into `file`, in which the zone begins at `start`. The machine is paused.
    ///
    /// # Errors
    /// The page tables, RAM or the file cannot be accessed.
    pub fn write_zone(&self, zone: &Zone, file: &File, start: u64) -> Result<(), ContentError> {
        let pagemap = Pagemap::open().map_err(ContentError::Pages)?;
        let mut buffer = vec![0; CHUNK_BYTES];
        for chunk in chunks(zone) {
            let buffer = &mut buffer[..chunk.bytes];
            let pages = self.read_chunk(zone, &pagemap, chunk, None, buffer)?;
            each_run(&pages, chunk.bytes / PAGE, |at, bytes| {
                let data = &buffer[at..at + bytes];
                file.write_all_at(data, start + chunk.offset + at as u64)
            })
            .map_err(in_file(&zone.id, chunk.offset))?;
        }
        Ok(())
    }

    /// Fills `buffer` and returns a bitmap of its non-zero pages, of all or of those in `wanted`.
    pub(super) fn read_chunk(
        &self,
        zone: &Zone,
        pagemap: &Pagemap,
        chunk: Chunk,
        wanted: Option<&[u8]>,
        buffer: &mut [u8],
    ) -> Result<Vec<u8>, ContentError> {
        let count = chunk.bytes / PAGE;
        let mut is_held = vec![true; count];
        let keep_wanted = |is_held: &mut [bool]| {
            for (page, held) in is_held.iter_mut().enumerate() {
                *held &= wanted.is_none_or(|bits| is_set(bits, page));
            }
        };
        let mut pages = vec![0; count.div_ceil(8)];
        let ram = self.ram().memory();
        let in_ram = |source| ContentError::Ram {
            zone: zone.id.clone(),
            offset: chunk.offset,
            source,
        };
        let region = ram.find_region(chunk.guest);
        let region = region.expect("the zones are made of the regions");
        let at = chunk.guest.0 - region.start_addr().0;
        let is_shared = region.flags() & libc::MAP_SHARED != 0;
        match region.file_offset() {
            Some(file) if is_shared => {
                keep_wanted(&mut is_held);
                file.file()
                    .read_exact_at(buffer, file.start() + at)
                    .map_err(in_ram)?;
            }
            file => {
                // Pages that the guest has not written still map the file.
                if file.is_none() {
                    let start = region.as_ptr() as u64 + at;
                    pagemap
                        .mark_held(start, &mut is_held)
                        .map_err(ContentError::Pages)?;
                    if let Some(overlay) = self.overlay() {
                        overlay.mark_shown(start as usize, &mut is_held);
                    }
                }
                keep_wanted(&mut is_held);
                let data = buffer.chunks_exact_mut(PAGE).zip(&is_held);
                for (page, (data, _)) in data.enumerate().filter(|(_, (_, held))| **held) {
                    let address = GuestAddress(chunk.guest.0 + (page * PAGE) as u64);
                    ram.read_slice(data, address)
                        .map_err(|error| in_ram(io::Error::other(error)))?;
                }
            }
        }
        let data = buffer.chunks_exact(PAGE).zip(&is_held).enumerate();
        for (page, _) in data.filter(|(_, (data, held))| **held && **data != ZERO_PAGE[..]) {
            pages[page / 8] |= 1 << (page % 8);
        }
        Ok(pages)
    }

    pub(super) fn advise_huge_pages(&self, zone: &Zone, wanted: bool) {
        let ram = self.ram().memory();
        let regions = ram.iter().filter(|it| zone.holds(it.start_addr().0));
        for region in regions {
            backing::advise_huge_pages(region, wanted);
        }
    }
}

/// Checks that the table and the size of the file match `zone`; returns the chunks that it lists. `differs`: they are a
/// difference from another file.
pub(super) fn checked_table<'a>(
    zone: &Zone,
    file: &File,
    state: &'a ZoneContentState,
    differs: bool,
) -> Result<Vec<(Chunk, &'a ChunkState)>, ContentError> {
    let invalid = |field, reason| ContentError::Table(StateError::invalid(PART, field, reason));
    let (saved, own) = (state.bytes, zone.bytes());
    require(saved == own, PART, "bytes", || {
        format!("is {saved}, zone {} has {own}", zone.id)
    })
    .map_err(ContentError::Table)?;
    let found = file.metadata().map_err(in_file(&zone.id, 0))?.len();
    if found != own {
        let reason = format!("is {own}, the memory file has {found}");
        return Err(invalid("bytes", reason));
    }
    let mut table = Vec::new();
    let mut left = state.chunks.iter().peekable();
    for chunk in chunks(zone) {
        let Some(saved) = left.next_if(|saved| saved.offset == chunk.offset) else {
            continue;
        };
        let count = chunk.bytes / PAGE;
        let zeros = &saved.zeros.0;
        let fits = |bits: &[u8]| {
            bits.len() == count.div_ceil(8) && (count..bits.len() * 8).all(|it| !is_set(bits, it))
        };
        let both = saved
            .pages
            .0
            .iter()
            .zip(zeros)
            .any(|(it, zero)| it & zero != 0);
        let zeros_fit = zeros.is_empty() || (differs && fits(zeros) && !both);
        if !fits(&saved.pages.0) || !zeros_fit {
            let reason = format!("has other pages at {:#x} than the zone", chunk.offset);
            return Err(invalid("chunks", reason));
        }
        if !saved.has_checksums() {
            let reason = format!("has other checksums at {:#x} than pages", chunk.offset);
            return Err(invalid("chunks", reason));
        }
        table.push((chunk, saved));
    }
    match left.next() {
        Some(saved) => {
            let at = saved.offset;
            let reason = format!("has a chunk at {at:#x}, out of order or of no zone");
            Err(invalid("chunks", reason))
        }
        None => Ok(table),
    }
}

/// Reads the pages of a chunk to their places in `buffer`.
pub(super) fn read_chunk(file: &File, saved: &ChunkState, buffer: &mut [u8]) -> io::Result<()> {
    each_run(&saved.pages.0, buffer.len() / PAGE, |start, bytes| {
        let data = &mut buffer[start..start + bytes];
        file.read_exact_at(data, saved.offset + start as u64)
    })
}

/// As [`read_chunk`]. Returns false if a checksum does not match.
pub(super) fn read_checked(file: &File, saved: &ChunkState, buffer: &mut [u8]) -> io::Result<bool> {
    read_chunk(file, saved, buffer)?;
    Ok(saved.matches(buffer))
}

/// Reads the pages of a piece, if it has some, to their places in `buffer`. Returns false if their checksum does not match.
pub(super) fn read_piece(
    file: &File,
    saved: &ChunkState,
    piece: usize,
    buffer: &mut [u8],
) -> io::Result<bool> {
    let Some((pages, expected)) = checksums::of_piece(&saved.pages.0, &saved.sums, piece) else {
        return Ok(true);
    };
    let start = saved.offset + (piece * PIECE_BYTES) as u64;
    let mut crc = crc32fast::Hasher::new();
    each_run(&[pages], PIECE_PAGES, |at, bytes| {
        let data = &mut buffer[at..at + bytes];
        file.read_exact_at(data, start + at as u64)?;
        crc.update(data);
        Ok::<_, io::Error>(())
    })?;
    Ok(crc.finalize() == expected)
}

pub(super) fn in_file(zone: &str, offset: u64) -> impl Fn(io::Error) -> ContentError {
    let zone = zone.to_owned();
    move |source| ContentError::File {
        zone: zone.clone(),
        offset,
        source,
    }
}

#[cfg(test)]
mod tests {
    use crate::memory::SavedZone;
    use state::{Saved, State};

    use super::*;
    use crate::memory::test_memory::{private_and_shared, saved};
    use virtio_devices::reclaim::{DiscardEngine, Expected, GuestRange, ResidencyProbe};

    /// Only the tests wrap a table in its own envelope.
    impl State for ZoneContentState {
        const PART: Part = PART;
    }

    fn resident_bytes(memory: &GuestMemory) -> u64 {
        let probe = ResidencyProbe::new(memory.ram().clone()).unwrap();
        probe.measure().unwrap().resident_bytes
    }

    fn put(memory: &GuestMemory, page: u64, byte: u8) {
        let data = [byte; PAGE];
        let address = GuestAddress(page * PAGE_BYTES);
        memory.ram().memory().write_slice(&data, address).unwrap();
    }

    fn content(memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = vec![0; 14 * MIB as usize];
        let ram = memory.ram().memory();
        ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    /// Pages with data at the borders of chunks and zones, and one page of zeros.
    fn filled() -> GuestMemory {
        let memory = private_and_shared();
        for page in [0, 1, 511, 512, 1700, 1791, 1792, 2303, 2304, 3583] {
            put(&memory, page, page as u8 | 1);
        }
        put(&memory, 100, 0);
        put(&memory, 2000, 0);
        memory
    }

    fn load(memory: &GuestMemory, files: &[(File, ZoneContentState)]) -> Result<(), ContentError> {
        let mut zones = memory.zones().iter().zip(files);
        zones.try_for_each(|(zone, (file, state))| {
            let saved = SavedZone::from((file.try_clone().unwrap(), state.clone()));
            memory.load_zone(zone, &saved, true, |_| ())
        })
    }

    #[test]
    fn content_comes_back_and_only_pages_with_data_are_resident() {
        use std::os::unix::fs::MetadataExt;

        let memory = filled();
        let before = resident_bytes(&memory);
        let files = saved(&memory);
        assert_eq!(resident_bytes(&memory), before, "saving touches nothing");
        for ((file, state), expected) in files.iter().zip([6, 4]) {
            let pages = state.chunks.iter().flat_map(|chunk| &chunk.pages.0);
            assert_eq!(pages.map(|byte| byte.count_ones()).sum::<u32>(), expected);
            assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
        }
        let other = private_and_shared();
        load(&other, &files).unwrap();
        assert_eq!(resident_bytes(&other), 10 * PAGE_BYTES);
        assert!(content(&other) == content(&memory));
    }

    #[test]
    fn page_that_was_given_back_is_not_in_the_file() {
        let memory = filled();
        let claim = |page: u64| GuestRange {
            start: page * PAGE_BYTES,
            bytes: PAGE_BYTES,
        };
        let mut gone = [claim(1), claim(2303)];
        DiscardEngine::new(Default::default()).discard(memory.ram(), &mut gone, Expected::Anything);
        for ((_, state), expected) in saved(&memory).into_iter().zip([5, 3]) {
            let pages = state.chunks.iter().flat_map(|chunk| &chunk.pages.0);
            assert_eq!(pages.map(|byte| byte.count_ones()).sum::<u32>(), expected);
        }
    }

    #[test]
    fn holes_that_a_copy_of_the_file_lost_stay_absent() {
        let memory = filled();
        let mut files = saved(&memory);
        for (file, _) in &mut files {
            let mut bytes = vec![0; 7 * MIB as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            // Bytes outside the listed pages do not matter.
            bytes[5 * PAGE] = 1;
            file.write_all_at(&bytes, 0).unwrap();
        }
        let other = private_and_shared();
        load(&other, &files).unwrap();
        assert_eq!(resident_bytes(&other), 10 * PAGE_BYTES);
        assert!(content(&other) == content(&memory));
    }

    #[test]
    fn damaged_file_is_refused_by_name() {
        let files = saved(&filled());
        for page in [0, 511, 512, 1700] {
            for (at, bit) in [(0, 0), (PAGE as u64 - 1, 7)] {
                let file = &files[0].0;
                let at = page * PAGE_BYTES + at;
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
                let error = load(&private_and_shared(), &files).unwrap_err();
                assert!(matches!(error, ContentError::Damaged { .. }), "{error}");
                assert!(error.to_string().contains("zone a"), "{error}");
                file.write_all_at(&byte, at).unwrap();
            }
        }
        load(&private_and_shared(), &files).unwrap();
        for bytes in [0, PAGE_BYTES, 7 * MIB - 1, 7 * MIB + 1] {
            files[1].0.set_len(bytes).unwrap();
            let error = load(&private_and_shared(), &files).unwrap_err();
            assert!(error.to_string().contains("the memory file has"), "{error}");
        }
    }

    #[test]
    fn damaged_table_is_refused_or_loads() {
        let (file, state) = saved(&filled()).remove(0);
        let memory = private_and_shared();
        let zone = &memory.zones()[0];
        let mut refused = 0;
        let count = state::testing::damage(&Saved::of(&state), |damaged| {
            let Ok(state) = damaged.read::<ZoneContentState>() else {
                return;
            };
            let saved = SavedZone::from((file.try_clone().unwrap(), state));
            refused += usize::from(memory.load_zone(zone, &saved, false, |_| ()).is_err());
        });
        assert!(count > 100 && refused > 20, "{refused} of {count}");
    }
}
