//! Writes the content of guest RAM to files: in one pass, or in several while the machine runs.
//!
//! ```text
//!   send_content(None)      pages with data ──────► ContentFiles::write
//!   send_content(written)   pages with data ──────► ContentFiles::write   over the earlier content
//!                           pages without  ───────► ContentFiles::clear   a hole again
//!   paused: the last pages
//!   finish                  checksums of rewritten chunks, synced
//! ```
//! The files do not depend on the number of passes. They have all content, or only the difference from earlier files:
//! the pages written since, and which of these hold no data.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use state::Bytes;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::checksums;
use super::content::{CHUNK_BYTES, ChunkState, PAGE, each_run, in_file, read_chunk, sums_in_place};
use super::transfer::place;
use super::{ContentError, GuestMemory, PageRun, Pages, Zone, ZoneContentState};

/// The files of all zones, while they are written.
#[derive(Debug)]
pub struct ContentFiles {
    zones: Vec<WrittenZone>,
    differs: bool,
    data_bytes: u64,
}

#[derive(Debug)]
struct WrittenZone {
    zone: Zone,
    file: File,
    /// The chunks that were written, by their offset.
    chunks: BTreeMap<u64, Written>,
}

#[derive(Debug)]
struct Written {
    bytes: usize,
    /// One bit for each page in the file.
    pages: Vec<u8>,
    /// The same for the pages that hold no data any more. Empty unless the file is a difference.
    zeros: Vec<u8>,
    /// `None`: other pages have been written since the first time.
    sums: Option<Bytes>,
}

impl ContentFiles {
    /// `files` has an empty file for each zone of `memory`. `differs`: they get the difference from earlier files, so
    /// the first pass has only the pages that were written since.
    ///
    /// # Errors
    /// A file cannot be as large as its zone.
    pub fn new(
        memory: &GuestMemory,
        files: impl IntoIterator<Item = File>,
        differs: bool,
    ) -> Result<Self, ContentError> {
        let mut zones = Vec::new();
        for (zone, file) in memory.zones().iter().zip(files) {
            file.set_len(zone.bytes()).map_err(in_file(&zone.id, 0))?;
            zones.push(WrittenZone {
                zone: zone.clone(),
                file,
                chunks: BTreeMap::new(),
            });
        }
        Ok(Self {
            zones,
            differs,
            data_bytes: 0,
        })
    }

    /// The number of bytes that were written in all passes.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Writes pages of a zone of the memory.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&mut self, pages: Pages<'_>) -> Result<(), ContentError> {
        let Pages {
            zone: number,
            offset,
            bits,
            data,
        } = pages;
        let number = number as usize;
        let WrittenZone { zone, file, chunks } = &mut self.zones[number];
        let mut left = data;
        each_run(bits, bits.len() * 8, |start, bytes| {
            let (run, rest) = left.split_at(bytes);
            left = rest;
            file.write_all_at(run, offset + start as u64)
        })
        .map_err(in_file(&zone.id, offset))?;
        self.data_bytes += data.len() as u64;
        let mut left = data;
        let sums = checksums::sums(bits, |_| {
            let (page, rest) = left.split_at(PAGE);
            left = rest;
            page
        });
        match chunks.get_mut(&offset) {
            Some(written) => {
                // The checksums of the only pages are known.
                let is_first = written.pages.iter().all(|byte| *byte == 0);
                written.sums = is_first.then_some(sums);
                for (own, new) in written.pages.iter_mut().zip(bits) {
                    *own |= new;
                }
                for (zero, new) in written.zeros.iter_mut().zip(bits) {
                    *zero &= !new;
                }
            }
            None => {
                let written = Written {
                    bytes: chunk_bytes(zone, offset),
                    pages: bits.to_vec(),
                    zeros: self.no_zeros(bits.len()),
                    sums: Some(sums),
                };
                self.zones[number].chunks.insert(offset, written);
            }
        }
        Ok(())
    }

    fn no_zeros(&self, bytes: usize) -> Vec<u8> {
        vec![0; if self.differs { bytes } else { 0 }]
    }

    /// Removes pages of a chunk, which hold no data any more.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn clear(&mut self, run: PageRun) -> Result<(), ContentError> {
        let PageRun {
            zone: number,
            offset,
            bytes,
        } = run;
        let number = number as usize;
        let start = chunk_start(&self.zones[number].zone, offset);
        if self.differs && !self.zones[number].chunks.contains_key(&start) {
            let size = chunk_bytes(&self.zones[number].zone, start);
            let none = vec![0; (size / PAGE).div_ceil(8)];
            let written = Written {
                bytes: size,
                zeros: none.clone(),
                pages: none,
                sums: Some(Bytes::default()),
            };
            self.zones[number].chunks.insert(start, written);
        }
        let WrittenZone { zone, file, chunks } = &mut self.zones[number];
        let Some(written) = chunks.get_mut(&start) else {
            return Ok(());
        };
        let first = (offset - start) as usize / PAGE;
        let mut had_data = false;
        for page in first..first + bytes as usize / PAGE {
            let (byte, bit) = (page / 8, 1 << (page % 8));
            had_data |= written.pages[byte] & bit != 0;
            written.pages[byte] &= !bit;
            if let Some(zeros) = written.zeros.get_mut(byte) {
                *zeros |= bit;
            }
        }
        if !had_data {
            return Ok(());
        }
        written.sums = None;
        // Readers that map the file need zeros there.
        make_zeros(file, offset, bytes).map_err(in_file(&zone.id, offset))
    }

    /// Moves data from the host's page cache to stable storage, so that a later pass does not wait for its write-back.
    ///
    /// # Errors
    /// A file cannot be synced.
    pub fn sync_data(&self) -> Result<(), ContentError> {
        self.zones
            .iter()
            .try_for_each(|WrittenZone { zone, file, .. }| {
                file.sync_data().map_err(in_file(&zone.id, 0))
            })
    }

    /// Syncs the files and returns the table of each. Needs 2 MiB of buffer.
    ///
    /// # Errors
    /// A file cannot be read or synced.
    pub fn finish(self) -> Result<Vec<ZoneContentState>, ContentError> {
        let mut buffer = vec![0; CHUNK_BYTES];
        let zones = self.zones.into_iter();
        let tables = zones.map(|WrittenZone { zone, file, chunks }| {
            let mut table = Vec::new();
            for (offset, written) in chunks {
                let mut bits = written.pages.iter().chain(&written.zeros);
                if bits.all(|byte| *byte == 0) {
                    continue;
                }
                let has_zeros = written.zeros.iter().any(|byte| *byte != 0);
                let mut chunk = ChunkState {
                    offset,
                    pages: Bytes(written.pages),
                    zeros: Bytes(if has_zeros { written.zeros } else { Vec::new() }),
                    sums: Bytes::default(),
                    crc32: None,
                };
                chunk.sums = match written.sums {
                    Some(sums) => sums,
                    None => {
                        let buffer = &mut buffer[..written.bytes];
                        read_chunk(&file, &chunk, buffer).map_err(in_file(&zone.id, offset))?;
                        sums_in_place(&chunk.pages.0, buffer)
                    }
                };
                table.push(chunk);
            }
            file.sync_all().map_err(in_file(&zone.id, 0))?;
            Ok(ZoneContentState {
                bytes: zone.bytes(),
                chunks: table,
            })
        });
        tables.collect()
    }
}

fn chunk_bytes(zone: &Zone, offset: u64) -> usize {
    let place = place(zone, offset);
    let (_, _, left) = place.expect("pages are sent from their zone");
    left.min(CHUNK_BYTES as u64) as usize
}

fn chunk_start(zone: &Zone, offset: u64) -> u64 {
    let place = place(zone, offset);
    let (_, at, _) = place.expect("runs are of their zone");
    offset - at % CHUNK_BYTES as u64
}

/// A hole, or zeros on a file system without holes.
fn make_zeros(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    if fallocate(file, FallocateMode::PunchHole, true, offset, bytes).is_ok() {
        return Ok(());
    }
    let zeros = [0; PAGE];
    (0..bytes)
        .step_by(PAGE)
        .try_for_each(|at| file.write_all_at(&zeros, offset + at))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use vm_memory::{Bytes as _, GuestAddressSpace};

    use super::*;
    use crate::memory::WrittenPages;
    use crate::memory::layout::PAGE_BYTES;
    use crate::memory::test_memory::{address, mark, private_and_shared, saved};

    fn put(memory: &GuestMemory, page: u64, value: u64) {
        let ram = memory.ram().memory();
        ram.write_obj(value, address(page)).unwrap();
        memory.ram().writes().record(page * PAGE_BYTES, 8);
    }

    fn pass(memory: &GuestMemory, written: Option<&WrittenPages>, files: &mut ContentFiles) {
        let files = std::cell::RefCell::new(files);
        let send = |pages: Pages<'_>| files.borrow_mut().write(pages);
        let clear = |run| files.borrow_mut().clear(run);
        memory
            .send_content::<ContentError>(written, send, clear)
            .unwrap();
    }

    fn new_files() -> Vec<File> {
        (0..2).map(|_| tempfile::tempfile().unwrap()).collect()
    }

    #[test]
    fn passes_leave_the_same_files_and_tables_as_one_pass_at_the_end() {
        let memory = private_and_shared();
        for page in [0, 1, 511, 512, 700, 1791, 1792, 2304, 3583] {
            put(&memory, page, mark(page));
        }
        let log = memory.ram().writes();
        log.start(memory.zones().iter().flat_map(|zone| zone.ranges.clone()));
        let handles = new_files();
        let copies = handles.iter().map(|file| file.try_clone().unwrap());
        let mut files = ContentFiles::new(&memory, copies, false).unwrap();
        pass(&memory, None, &mut files);
        assert_eq!(files.data_bytes(), 9 * PAGE_BYTES);
        // Changed, new in a chunk with pages, new in one without, zero now, zero as before.
        put(&memory, 1, mark(7));
        put(&memory, 2, mark(2));
        put(&memory, 1100, mark(3));
        put(&memory, 700, 0);
        put(&memory, 1792, 0);
        put(&memory, 1200, 0);
        put(&memory, 3000, 0);
        pass(&memory, Some(&WrittenPages::of_log(log)), &mut files);
        // The only page of its chunk goes, and comes again.
        put(&memory, 1791, 0);
        pass(&memory, Some(&WrittenPages::of_log(log)), &mut files);
        put(&memory, 1791, mark(8));
        put(&memory, 3583, 0);
        pass(&memory, Some(&WrittenPages::of_log(log)), &mut files);
        files.sync_data().unwrap();
        let tables = files.finish().unwrap();
        let written = handles.iter().zip(tables);
        for ((zone, (file, table)), (expected, its_table)) in
            memory.zones().iter().zip(written).zip(saved(&memory))
        {
            assert_eq!(its_table, table);
            let read = |file: &File| {
                let mut bytes = vec![0; zone.bytes() as usize];
                file.read_exact_at(&mut bytes, 0).unwrap();
                bytes
            };
            assert!(read(file) == read(&expected), "zone {}", zone.id);
        }
    }

    #[test]
    fn full_file_is_reported_with_its_zone() {
        let memory = private_and_shared();
        put(&memory, 5, 1);
        let read_only = File::open("/dev/zero").unwrap();
        let error = ContentFiles::new(&memory, [read_only], false).unwrap_err();
        assert!(error.to_string().contains("zone a"), "{error}");
    }
}
