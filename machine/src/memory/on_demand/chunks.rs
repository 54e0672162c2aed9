//! Tracks the pages that are still missing, and their place in the files.

use std::collections::VecDeque;
use std::ops::Range;

use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::super::checksums::PIECE_PAGES;
use super::super::content::{self, CHUNK_BYTES, ContentError, PAGE};
use super::super::layers::SavedChunk;
use super::super::{AbsentPages, GuestMemory, SavedZone};
use super::error::FillError;
use super::orders::{Content, PageSource};

/// Maximum number of mappings into which memory may be divided: a process can have 65530.
const RUNS_MAX: u64 = 8192;

/// Up to 2 MiB of RAM with pages in a file.
#[derive(Debug)]
pub(super) struct Chunk {
    /// Its addresses in this process.
    pub(super) host: Range<u64>,
    /// Number of its first page in guest memory.
    guest_page: u64,
    zone: usize,
    /// Its offset in the zone.
    offset: u64,
    saved: SavedChunk,
    /// The pages that were neither filled in nor discarded.
    left: Vec<u8>,
    /// The pieces whose pages can be read one by one, one bit each: their checksums matched, or there are none.
    checked: u128,
}

/// The files of a zone.
#[derive(Debug)]
struct Source {
    id: String,
    saved: SavedZone,
}

/// Where the pages come from.
#[derive(Debug)]
enum Origin {
    Files(Vec<Source>),
    Elsewhere(Box<dyn PageSource>),
}

/// All chunks, in the order of their addresses.
#[derive(Debug)]
pub(super) struct Chunks {
    origin: Origin,
    all: Vec<Chunk>,
}

impl Chunks {
    /// The chunks of `content`.
    ///
    /// # Errors
    /// The table or the size of a file does not match its zone.
    pub(super) fn new(memory: &GuestMemory, content: Content) -> Result<Self, ContentError> {
        let mut all = Vec::new();
        let origin = match content {
            Content::Files(saved) => {
                let mut sources = Vec::new();
                for ((number, zone), saved) in memory.zones().iter().enumerate().zip(saved) {
                    for (chunk, pages) in saved.chunks(zone)? {
                        all.push(Chunk::new(memory, number, chunk, pages, 0));
                    }
                    let id = zone.id.clone();
                    sources.push(Source { id, saved });
                }
                Origin::Files(sources)
            }
            Content::Elsewhere(absent, source) => {
                let chunk = |it: AbsentPages| {
                    let pages = SavedChunk::outside_files(it.bits);
                    Chunk::new(memory, it.zone, it.chunk, pages, u128::MAX)
                };
                all.extend(absent.into_iter().map(chunk));
                Origin::Elsewhere(source)
            }
        };
        all.sort_unstable_by_key(|chunk| chunk.host.start);
        Ok(Self { origin, all })
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    pub(super) fn get(&self, at: usize) -> &Chunk {
        &self.all[at]
    }

    /// The number of the chunk with `address`; none if the file has no data for that part of RAM.
    pub(super) fn find(&self, address: u64) -> Option<usize> {
        let at = self.all.partition_point(|chunk| chunk.host.end <= address);
        let chunk = self.all.get(at)?;
        chunk.host.contains(&address).then_some(at)
    }

    /// The chunks and pages there of the guest's pages with these numbers, without those that no chunk has.
    pub(super) fn places(&self, guest_pages: &[u32]) -> VecDeque<(usize, usize)> {
        let mut starts: Vec<(u64, usize)> = self
            .all
            .iter()
            .enumerate()
            .map(|(at, chunk)| (chunk.guest_page, at))
            .collect();
        starts.sort_unstable();
        let places = guest_pages.iter().filter_map(|number| {
            let number = u64::from(*number);
            let after = starts.partition_point(|(start, _)| *start <= number);
            let (start, at) = *starts.get(after.checked_sub(1)?)?;
            let page = (number - start) as usize;
            (page < self.all[at].bytes() / PAGE).then_some((at, page))
        });
        places.collect()
    }

    /// Reads the pages of a chunk to their places in `buffer`, and checks them. From elsewhere, only missing pages with data
    /// come; the others are no longer missing then.
    ///
    /// # Errors
    /// A file cannot be read, its checksum does not match, or the other process does not send the pages.
    pub(super) fn read(&mut self, at: usize, buffer: &mut [u8]) -> Result<(), FillError> {
        let chunk = &mut self.all[at];
        let buffer = &mut buffer[..chunk.bytes()];
        match &mut self.origin {
            Origin::Files(zones) => {
                let Source { id, saved } = &zones[chunk.zone];
                let read = saved.read(id, &chunk.saved, buffer);
                read.map_err(FillError::Content)?;
            }
            Origin::Elsewhere(source) => {
                let mut come = vec![0; chunk.left.len()];
                let mut put = |page: usize, data: &[u8]| {
                    buffer[page * PAGE..(page + 1) * PAGE].copy_from_slice(data);
                    come[page / 8] |= 1 << (page % 8);
                };
                let (zone, offset) = (chunk.zone, chunk.offset);
                let fetched = source.fetch(zone, offset, &chunk.left, &mut put);
                fetched.map_err(FillError::Elsewhere)?;
                // The others read as zeros without being filled in.
                chunk.left = come;
            }
        }
        chunk.checked = u128::MAX;
        Ok(())
    }

    /// Reads the piece with `page` into `buffer`, which has its size, and checks it. Returns the place of the page there; none
    /// if the chunk can only be checked as a whole.
    ///
    /// # Errors
    /// As for [`Chunks::read`].
    pub(super) fn read_piece(
        &mut self,
        at: usize,
        page: usize,
        buffer: &mut [u8],
    ) -> Result<Option<usize>, FillError> {
        let chunk = &mut self.all[at];
        let piece = page / PIECE_PAGES;
        match &self.origin {
            Origin::Files(zones) if chunk.saved.has_sums() => {
                let Source { id, saved } = &zones[chunk.zone];
                let read = saved.read_piece(id, &chunk.saved, piece, buffer);
                read.map_err(FillError::Content)?;
            }
            _ => return Ok(None),
        }
        chunk.checked |= 1 << piece;
        Ok(Some(page % PIECE_PAGES * PAGE))
    }

    /// Reads one page that has been checked; `buffer` has its size.
    ///
    /// # Errors
    /// As for [`Chunks::read`].
    pub(super) fn read_page(
        &mut self,
        at: usize,
        page: usize,
        buffer: &mut [u8],
    ) -> Result<(), FillError> {
        let chunk = &self.all[at];
        match &mut self.origin {
            Origin::Files(zones) => {
                let Source { id, saved } = &zones[chunk.zone];
                let read = saved.read_page(id, &chunk.saved, page, buffer);
                read.map_err(FillError::Content)
            }
            Origin::Elsewhere(source) => {
                let mut bits = vec![0; chunk.left.len()];
                bits[page / 8] = 1 << (page % 8);
                buffer.fill(0);
                let mut put = |_page: usize, data: &[u8]| buffer.copy_from_slice(data);
                let fetched = source.fetch(chunk.zone, chunk.offset, &bits, &mut put);
                fetched.map_err(FillError::Elsewhere)
            }
        }
    }

    /// No further page is needed.
    pub(super) fn end(&mut self) {
        if let Origin::Elsewhere(source) = &mut self.origin {
            source.end();
        }
    }

    /// Drops the pages in `[start, end)`, which are no longer missing. Only whole pages can be discarded.
    pub(super) fn forget(&mut self, start: u64, end: u64) {
        let first = self.all.partition_point(|chunk| chunk.host.end <= start);
        for chunk in &mut self.all[first..] {
            if chunk.host.start >= end {
                break;
            }
            let from = start.max(chunk.host.start) - chunk.host.start;
            let to = end.min(chunk.host.end) - chunk.host.start;
            chunk.done(from as usize / PAGE..to as usize / PAGE);
        }
    }

    /// Records that these pages of a chunk have been filled in.
    pub(super) fn done(&mut self, at: usize, pages: Range<usize>) {
        self.all[at].done(pages);
    }

    /// The ranges of memory that contain chunks. Neighbours are joined until there are few enough.
    pub(super) fn ranges(&self, memory: &GuestMemory) -> Vec<Range<u64>> {
        let ram = memory.ram().memory();
        let bytes: u64 = ram.iter().map(|region| region.len()).sum();
        let gap_max = (bytes / RUNS_MAX).next_multiple_of(CHUNK_BYTES as u64);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for region in ram.iter() {
            let start = region.as_ptr() as u64;
            let end = start + region.len();
            let mut open = None::<Range<u64>>;
            for chunk in &self.all {
                if chunk.host.start < start || chunk.host.start >= end {
                    continue;
                }
                open = Some(match open.take() {
                    Some(run) if chunk.host.start - run.end < gap_max => run.start..chunk.host.end,
                    run => {
                        ranges.extend(run);
                        chunk.host.clone()
                    }
                });
            }
            ranges.extend(open);
        }
        ranges
    }
}

impl Chunk {
    fn new(
        memory: &GuestMemory,
        zone: usize,
        chunk: content::Chunk,
        saved: SavedChunk,
        checked: u128,
    ) -> Self {
        let ram = memory.ram().memory();
        let region = ram.find_region(chunk.guest);
        let region = region.expect("the zones are made of the regions");
        let host = region.as_ptr() as u64 + (chunk.guest.0 - region.start_addr().0);
        Self {
            host: host..host + chunk.bytes as u64,
            guest_page: chunk.guest.0 / PAGE as u64,
            zone,
            offset: chunk.offset,
            left: saved.pages.clone(),
            saved,
            checked,
        }
    }

    /// Whether this page can be read alone.
    pub(super) fn is_checked(&self, page: usize) -> bool {
        self.checked & 1 << (page / PIECE_PAGES) != 0
    }

    /// Its size.
    pub(super) fn bytes(&self) -> usize {
        (self.host.end - self.host.start) as usize
    }

    /// The number of a page in guest memory, unless it is beyond 16 TiB.
    pub(super) fn guest_page(&self, page: usize) -> Option<u32> {
        u32::try_from(self.guest_page + page as u64).ok()
    }

    /// Whether a page is still missing.
    pub(super) fn is_left(&self, page: usize) -> bool {
        content::is_set(&self.left, page)
    }

    /// The first run of missing pages from `page` on.
    pub(super) fn next_left(&self, page: usize) -> Option<Range<usize>> {
        let count = self.bytes() / PAGE;
        let start = (page..count).find(|page| self.is_left(*page))?;
        let end = (start..count).find(|page| !self.is_left(*page));
        Some(start..end.unwrap_or(count))
    }

    fn done(&mut self, pages: Range<usize>) {
        for page in pages {
            self.left[page / 8] &= !(1 << (page % 8));
        }
    }
}
