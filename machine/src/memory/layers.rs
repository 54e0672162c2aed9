//! The content of a zone in the files of a snapshot and of those that it is based on.
//!
//! ```text
//!   snapshot 3   │   │ B │ 0 │   │   the pages written since snapshot 2, and those that are zero since then
//!   snapshot 2   │ b │   │ b │   │
//!   snapshot 1   │ A │ a │   │ D │   all pages with data
//!   zone         │ b │ B │ 0 │ D │
//! ```
//! A checksum covers the pages of one piece, or of one chunk, in one file. All files of a piece are verified before a page
//! of it is used.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use state::{Bytes, StateError};

use super::content::{
    CHUNK_BYTES, Chunk, ChunkState, PAGE, PART, checked_table, each_run, in_file, is_set,
    read_checked, read_piece, sums_in_place,
};
use super::{ContentError, Zone, ZoneContentState};

/// The file of a zone in one snapshot, and its table.
#[derive(Debug)]
pub struct ZoneFile {
    /// The snapshot, if there are several.
    pub snapshot: Option<String>,
    /// Its content.
    pub file: File,
    /// Its table.
    pub table: ZoneContentState,
}

/// A zone in one snapshot, or in a chain of them.
#[derive(Debug)]
pub struct SavedZone {
    /// The oldest first. There is at least one.
    files: Vec<ZoneFile>,
}

impl From<(File, ZoneContentState)> for SavedZone {
    fn from((file, table): (File, ZoneContentState)) -> Self {
        Self::new(vec![ZoneFile {
            snapshot: None,
            file,
            table,
        }])
    }
}

/// A chunk with pages, in all files that have some.
#[derive(Debug)]
pub(super) struct SavedChunk {
    /// The number of the file, and its entry; the oldest first.
    parts: Vec<(usize, ChunkState)>,
    /// The pages that hold data, one bit each.
    pub(super) pages: Vec<u8>,
}

impl SavedZone {
    /// The files of a zone, the oldest first.
    ///
    /// # Panics
    /// There is none.
    pub fn new(files: Vec<ZoneFile>) -> Self {
        assert!(!files.is_empty(), "a zone is saved in at least one file");
        Self { files }
    }

    /// The size of the zone.
    pub fn bytes(&self) -> u64 {
        self.files[0].table.bytes
    }

    /// The only file, unless there are several.
    pub(super) fn single(&self) -> Option<&ZoneFile> {
        match &self.files[..] {
            [file] => Some(file),
            _ => None,
        }
    }

    /// # Errors
    /// The system has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        let files = self.files.iter().map(|it| {
            Ok(ZoneFile {
                snapshot: it.snapshot.clone(),
                file: it.file.try_clone()?,
                table: it.table.clone(),
            })
        });
        Ok(Self {
            files: files.collect::<io::Result<_>>()?,
        })
    }

    /// Checks that all tables and files match `zone`; returns the chunks that have data, in ascending order.
    pub(super) fn chunks(&self, zone: &Zone) -> Result<Vec<(Chunk, SavedChunk)>, ContentError> {
        let mut merged: BTreeMap<u64, (Chunk, SavedChunk)> = BTreeMap::new();
        for (number, ZoneFile { file, table, .. }) in self.files.iter().enumerate() {
            for (chunk, entry) in checked_table(zone, file, table, number > 0)? {
                let (_, saved) = merged
                    .entry(chunk.offset)
                    .or_insert_with(|| (chunk, SavedChunk::empty(entry)));
                saved.add(number, entry);
            }
        }
        let chunks = merged.into_values();
        Ok(chunks.filter(|(_, saved)| saved.has_pages()).collect())
    }

    /// Reads all pages of a chunk to their places in `buffer`, which has its size.
    ///
    /// # Errors
    /// A file cannot be read, or a checksum does not match.
    pub(super) fn read(
        &self,
        zone: &str,
        chunk: &SavedChunk,
        buffer: &mut [u8],
    ) -> Result<(), ContentError> {
        self.each_part(zone, chunk, |file, entry| read_checked(file, entry, buffer))
    }

    /// As [`SavedZone::read`], for one piece of a chunk that has checksums of pieces.
    ///
    /// # Errors
    /// As for a chunk.
    pub(super) fn read_piece(
        &self,
        zone: &str,
        chunk: &SavedChunk,
        piece: usize,
        buffer: &mut [u8],
    ) -> Result<(), ContentError> {
        self.each_part(zone, chunk, |file, entry| {
            read_piece(file, entry, piece, buffer)
        })
    }

    /// Reads from all files of a chunk, the oldest first. `read` returns whether the checksums match.
    fn each_part(
        &self,
        zone: &str,
        chunk: &SavedChunk,
        mut read: impl FnMut(&File, &ChunkState) -> io::Result<bool>,
    ) -> Result<(), ContentError> {
        for (number, entry) in &chunk.parts {
            let of_file = &self.files[*number];
            let matches = read(&of_file.file, entry)
                .map_err(|error| in_file(&of_file.name(zone), entry.offset)(error))?;
            if !matches {
                return Err(ContentError::Damaged {
                    zone: of_file.name(zone),
                    offset: entry.offset,
                });
            }
        }
        Ok(())
    }

    /// Reads a page that has been verified; `buffer` has its size.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(super) fn read_page(
        &self,
        zone: &str,
        chunk: &SavedChunk,
        page: usize,
        buffer: &mut [u8],
    ) -> Result<(), ContentError> {
        let newest = chunk.parts.iter().rev();
        let mut newest = newest.filter(|(_, entry)| is_set(&entry.pages.0, page));
        let (number, entry) = newest.next().expect("the page holds data");
        let of_file = &self.files[*number];
        let offset = entry.offset + (page * PAGE) as u64;
        let read = of_file.file.read_exact_at(buffer, offset);
        read.map_err(|error| in_file(&of_file.name(zone), offset)(error))
    }

    /// Writes the content into one file, which must be empty, and syncs it. `done` receives the size of each finished
    /// piece. Needs 2 MiB of buffer. The tables are those of no particular machine; a restore compares them with it.
    ///
    /// # Errors
    /// The tables do not match each other, a file is damaged, or one cannot be accessed.
    pub fn merge(
        &self,
        zone: &str,
        target: &File,
        mut done: impl FnMut(u64),
    ) -> Result<ZoneContentState, ContentError> {
        let bytes = self.bytes();
        let invalid = |reason| {
            let error = StateError::invalid(PART, "chunks", reason);
            Err(ContentError::Table(error))
        };
        let mut merged: BTreeMap<u64, SavedChunk> = BTreeMap::new();
        for (number, ZoneFile { table, .. }) in self.files.iter().enumerate() {
            for entry in &table.chunks {
                let at = entry.offset;
                let size = (entry.pages.0.len() * 8 * PAGE) as u64;
                if size > CHUNK_BYTES as u64 || at.checked_add(size).is_none_or(|end| end > bytes) {
                    return invalid(format!(
                        "has a chunk at {at:#x} that is outside zone {zone}"
                    ));
                }
                if number == 0 && !entry.zeros.0.is_empty() {
                    return invalid("has zeros, which only a differential snapshot has".to_owned());
                }
                let saved = merged.entry(at).or_insert_with(|| SavedChunk::empty(entry));
                let zeros = entry.zeros.0.len();
                if saved.pages.len() != entry.pages.0.len()
                    || ![0, saved.pages.len()].contains(&zeros)
                {
                    return invalid(format!("has other pages at {at:#x} than its base"));
                }
                if !entry.has_checksums() {
                    return invalid(format!("has other checksums at {at:#x} than pages"));
                }
                saved.add(number, entry);
            }
        }
        let in_target = |offset| in_file(zone, offset);
        target.set_len(bytes).map_err(in_target(0))?;
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut chunks = Vec::new();
        let mut end = 0;
        for (offset, saved) in merged.into_iter().filter(|(_, saved)| saved.has_pages()) {
            let count = saved.pages.len() * 8;
            let buffer = &mut buffer[..count * PAGE];
            self.read(zone, &saved, buffer)?;
            each_run(&saved.pages, count, |start, bytes| {
                let data = &buffer[start..start + bytes];
                target.write_all_at(data, offset + start as u64)
            })
            .map_err(in_target(offset))?;
            let sums = sums_in_place(&saved.pages, buffer);
            chunks.push(ChunkState {
                offset,
                pages: Bytes(saved.pages),
                zeros: Bytes::default(),
                sums,
                crc32: None,
            });
            done(offset.saturating_sub(end));
            end = offset;
        }
        done(bytes - end);
        target.sync_all().map_err(in_target(0))?;
        Ok(ZoneContentState { bytes, chunks })
    }
}

impl ZoneFile {
    /// The zone in errors.
    fn name(&self, zone: &str) -> String {
        match &self.snapshot {
            Some(snapshot) => format!("{zone} of snapshot {snapshot}"),
            None => zone.to_owned(),
        }
    }
}

impl SavedChunk {
    /// Pages that are in no file.
    pub(super) fn outside_files(pages: Vec<u8>) -> Self {
        Self {
            parts: Vec::new(),
            pages,
        }
    }

    /// No pages, of as many as `entry` can have.
    fn empty(entry: &ChunkState) -> Self {
        Self {
            parts: Vec::new(),
            pages: vec![0; entry.pages.0.len()],
        }
    }

    /// Applies the entry of a newer file.
    fn add(&mut self, number: usize, entry: &ChunkState) {
        for (own, new) in self.pages.iter_mut().zip(&entry.pages.0) {
            *own |= new;
        }
        for (own, zero) in self.pages.iter_mut().zip(&entry.zeros.0) {
            *own &= !zero;
        }
        self.parts.push((number, entry.clone()));
    }

    /// Whether all files have checksums of pieces.
    pub(super) fn has_sums(&self) -> bool {
        self.parts.iter().all(|(_, entry)| entry.crc32.is_none())
    }

    fn has_pages(&self) -> bool {
        self.pages.iter().any(|byte| *byte != 0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use vm_memory::{Bytes as _, GuestAddressSpace};

    use super::*;
    use crate::memory::layout::PAGE_BYTES;
    use crate::memory::test_memory::{address, mark, saved, zones};
    use crate::memory::{ContentFiles, GuestMemory, Pages, WrittenPages};

    const PAGES: u64 = 1792;

    fn memory() -> GuestMemory {
        zones(&[("a", false)])
    }

    fn put(memory: &GuestMemory, page: u64, value: u64) {
        let ram = memory.ram().memory();
        ram.write_obj(value, address(page)).unwrap();
        memory.ram().writes().record(page * PAGE_BYTES, 8);
    }

    fn values(memory: &GuestMemory) -> Vec<u64> {
        let ram = memory.ram().memory();
        let value = |page| ram.read_obj(address(page)).unwrap();
        (0..PAGES).map(value).collect()
    }

    /// The pages written since the last call.
    fn difference(memory: &GuestMemory) -> ZoneFile {
        let written = WrittenPages::of_log(memory.ram().writes());
        let file = tempfile::tempfile().unwrap();
        let copy = file.try_clone().unwrap();
        let files = ContentFiles::new(memory, [copy], true).unwrap();
        let files = std::cell::RefCell::new(files);
        let send = |pages: Pages<'_>| files.borrow_mut().write(pages);
        let clear = |run| files.borrow_mut().clear(run);
        memory
            .send_content::<ContentError>(Some(&written), send, clear)
            .unwrap();
        ZoneFile {
            snapshot: None,
            file,
            table: files.into_inner().finish().unwrap().remove(0),
        }
    }

    /// A chain of three, and the content at its end.
    fn chain() -> (Vec<ZoneFile>, Vec<u64>) {
        let memory = memory();
        let log = memory.ram().writes();
        log.start(memory.zones()[0].ranges.clone());
        for page in [0, 1, 2, 511, 512, 1790, 1791] {
            put(&memory, page, mark(page));
        }
        WrittenPages::of_log(log);
        let (file, table) = saved(&memory).remove(0);
        let mut files = vec![ZoneFile {
            snapshot: None,
            file,
            table,
        }];
        // Changed, new, zero, the only page of a chunk zero.
        put(&memory, 1, 7);
        put(&memory, 3, 8);
        put(&memory, 511, 0);
        put(&memory, 512, 0);
        files.push(difference(&memory));
        // Data again, changed twice, zero after it was new, all of a chunk zero.
        put(&memory, 511, 9);
        put(&memory, 1, 10);
        put(&memory, 3, 0);
        put(&memory, 1790, 0);
        put(&memory, 1791, 0);
        files.push(difference(&memory));
        (files, values(&memory))
    }

    #[test]
    fn chain_has_the_content_of_its_end_and_no_page_more() {
        let (files, expected) = chain();
        let pages: Vec<u64> = files
            .iter()
            .map(|it| it.table.data_bytes() / PAGE_BYTES)
            .collect();
        assert_eq!(pages, [7, 2, 2], "a difference has only what was written");
        let saved = SavedZone::new(files);
        let other = memory();
        let zone = &other.zones()[0];
        other.load_zone(zone, &saved, false, |_| ()).unwrap();
        assert_eq!(values(&other), expected);
        let chunks = saved.chunks(zone).unwrap();
        let data: Vec<u32> = chunks
            .iter()
            .map(|(_, it)| it.pages.iter().map(|byte| byte.count_ones()).sum())
            .collect();
        assert_eq!(data, [4], "pages 0, 1, 2 and 511");
        let mut page = [0; PAGE];
        saved.read_page("a", &chunks[0].1, 1, &mut page).unwrap();
        assert_eq!(page[..8], 10_u64.to_le_bytes());
    }

    #[test]
    fn merged_chain_is_the_same_as_one_export_at_its_end() {
        let (files, expected) = chain();
        let saved = SavedZone::new(files);
        let file = tempfile::tempfile().unwrap();
        let mut reported = 0;
        let table = saved.merge("a", &file, |bytes| reported += bytes).unwrap();
        assert_eq!(reported, saved.bytes());
        assert_eq!(table.data_bytes(), 4 * PAGE_BYTES);
        let other = memory();
        let merged = SavedZone::from((file, table));
        other
            .load_zone(&other.zones()[0], &merged, false, |_| ())
            .unwrap();
        assert_eq!(values(&other), expected);
    }

    #[test]
    fn damage_in_any_file_of_a_chain_is_found_and_named() {
        let (mut files, _) = chain();
        for (number, file) in files.iter_mut().enumerate() {
            file.snapshot = Some(format!("number-{number}"));
        }
        let saved = SavedZone::new(files);
        // Page 1 was replaced twice; its first content must still be right.
        for (number, page) in [(0, 1), (1, 1), (2, 1), (2, 511), (0, 2)] {
            let file = &saved.files[number].file;
            let at = page * PAGE_BYTES + 9;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 16], at).unwrap();
            let name = format!("zone a of snapshot number-{number} is damaged");
            let other = memory();
            let loaded = other.load_zone(&other.zones()[0], &saved, false, |_| ());
            let told = loaded.unwrap_err().to_string();
            assert!(told.contains(&name), "{told}");
            let target = tempfile::tempfile().unwrap();
            let told = saved.merge("a", &target, |_| ()).unwrap_err().to_string();
            assert!(told.contains(&name), "{told}");
            file.write_all_at(&byte, at).unwrap();
        }
    }

    #[test]
    fn tables_that_do_not_fit_are_refused_by_both_readers() {
        type Change = fn(&mut Vec<ZoneFile>);
        let changes: [Change; 7] = [
            // A difference without its base.
            |files| drop(files.remove(0)),
            |files| files[1].table.bytes += PAGE_BYTES * 512,
            |files| files[1].table.chunks[0].offset = 1 << 40,
            |files| files[1].table.chunks[0].offset = u64::MAX,
            |files| {
                files[1].table.chunks[0].pages.0.pop();
            },
            |files| files[1].table.chunks[0].zeros.0.push(0),
            |files| files[1].table.chunks[0].pages.0.extend([0; 512]),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let (mut files, _) = chain();
            change(&mut files);
            let saved = SavedZone::new(files);
            let other = memory();
            let loaded = other.load_zone(&other.zones()[0], &saved, false, |_| ());
            assert!(loaded.is_err(), "{number}");
            if number != 1 {
                let target = tempfile::tempfile().unwrap();
                let merged = saved.merge("a", &target, |_| ());
                assert!(merged.is_err(), "{number}");
            }
        }
    }
}
