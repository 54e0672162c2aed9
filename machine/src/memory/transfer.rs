//! The content of guest RAM in pieces that another process writes to the same places of its own RAM.
//!
//! ```text
//!   source                                          target
//!   send_content(None)      pages with data ──────► ContentWriter::write   into RAM that reads as zeros
//!   send_content(written)   pages with data ──────► ContentWriter::write
//!                           pages without  ───────► ContentWriter::clear   discarded: not resident, read as zeros
//! ```
//! Pages that the guest never touched or has returned are thus neither sent nor resident afterwards.

use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_devices::reclaim::{DiscardEngine, Expected, GuestRange, Pagemap};
use vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace};

use super::content::{CHUNK_BYTES, Chunk, PAGE, chunks, each_run, is_set};
use super::layout::PAGE_BYTES;
use super::{ContentError, GuestMemory, WrittenPages, Zone};

/// Pages of up to 2 MiB of one zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages<'a> {
    /// Number of the zone.
    pub zone: u32,
    /// Offset in the zone, where a chunk begins.
    pub offset: u64,
    /// One bit for each page of the chunk, the first in bit 0 of the first byte: the pages in `data`.
    pub bits: &'a [u8],
    /// These pages, one after the other.
    pub data: &'a [u8],
}

/// Whole pages of one zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Number of the zone.
    pub zone: u32,
    /// Offset in the zone.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

/// Pages of a chunk that are not present, because they come later.
#[derive(Debug, Clone)]
pub struct AbsentPages {
    /// Number of the zone.
    pub(super) zone: usize,
    pub(super) chunk: Chunk,
    /// One bit for each page.
    pub(super) bits: Vec<u8>,
}

impl AbsentPages {
    /// Whether the chunk lies before that of `other`.
    pub fn is_before(&self, other: &Self) -> bool {
        (self.zone, self.chunk.offset) < (other.zone, other.chunk.offset)
    }
}

/// Divides the chunks of one pass over RAM among its senders: each takes the next one when it has sent one.
#[derive(Debug, Default)]
pub struct Chunks(AtomicUsize);

impl Chunks {
    fn next(&self) -> usize {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

impl GuestMemory {
    /// Has the kernel use transparent huge pages from now on.
    pub fn use_huge_pages(&self) {
        for zone in self.zones() {
            self.advise_huge_pages(zone, true);
        }
    }

    /// Passes the pages in `written` to `visit`, without data.
    ///
    /// # Errors
    /// `visit` failed.
    pub fn each_written<E>(
        &self,
        written: &WrittenPages,
        mut visit: impl FnMut(Pages<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        for (zone, own) in (0_u32..).zip(self.zones()) {
            for chunk in chunks(own) {
                let Some(bits) = written.bits(chunk.guest.0, chunk.bytes / PAGE) else {
                    continue;
                };
                visit(Pages {
                    zone,
                    offset: chunk.offset,
                    bits: &bits,
                    data: &[],
                })?;
            }
        }
        Ok(())
    }

    /// Passes the pages that hold data to `send`: all of them, or those in `written`. Those in `written` that hold none
    /// are passed to `clear`. The machine may run: pages that it changes in the meantime are in the next record. Needs
    /// 2 MiB of buffer.
    ///
    /// # Errors
    /// The page tables or RAM cannot be read, or `send` or `clear` failed.
    pub fn send_content<E: From<ContentError>>(
        &self,
        written: Option<&WrittenPages>,
        send: impl FnMut(Pages<'_>) -> Result<(), E>,
        clear: impl FnMut(PageRun) -> Result<(), E>,
    ) -> Result<(), E> {
        self.send_share(written, &Chunks::default(), send, clear)
    }

    /// The same, for one of several senders, each in a thread: they share `left`, and send the pass together.
    ///
    /// # Errors
    /// As [`GuestMemory::send_content`].
    pub fn send_share<E: From<ContentError>>(
        &self,
        written: Option<&WrittenPages>,
        left: &Chunks,
        mut send: impl FnMut(Pages<'_>) -> Result<(), E>,
        mut clear: impl FnMut(PageRun) -> Result<(), E>,
    ) -> Result<(), E> {
        let pagemap = Pagemap::open().map_err(ContentError::Pages)?;
        let mut buffer = vec![0; CHUNK_BYTES];
        let zones = (0_u32..).zip(self.zones());
        let all = zones.flat_map(|(number, zone)| chunks(zone).map(move |it| (number, zone, it)));
        let mut own = left.next();
        for (index, (number, zone, chunk)) in all.enumerate() {
            if index != own {
                continue;
            }
            let count = chunk.bytes / PAGE;
            let wanted = written.map(|written| written.bits(chunk.guest.0, count));
            if let Some(None) = wanted {
                own = left.next();
                continue;
            }
            let wanted = wanted.flatten();
            let buffer = &mut buffer[..chunk.bytes];
            let bits = self.read_chunk(zone, &pagemap, chunk, wanted.as_deref(), buffer)?;
            let used = pack(&bits, buffer);
            if used > 0 {
                send(Pages {
                    zone: number,
                    offset: chunk.offset,
                    bits: &bits,
                    data: &buffer[..used],
                })?;
            }
            let mut empty = wanted.unwrap_or_default();
            for (empty, data) in empty.iter_mut().zip(&bits) {
                *empty &= !data;
            }
            let pages = count.min(empty.len() * 8);
            each_run(&empty, pages, |start, bytes| {
                clear(PageRun {
                    zone: number,
                    offset: chunk.offset + start as u64,
                    bytes: bytes as u64,
                })
            })?;
            own = left.next();
        }
        Ok(())
    }
}

/// Moves the pages `bits` of a chunk to the start of `buffer`. Returns their size.
fn pack(bits: &[u8], buffer: &mut [u8]) -> usize {
    let mut used = 0;
    for page in (0..buffer.len() / PAGE).filter(|page| is_set(bits, *page)) {
        buffer.copy_within(page * PAGE..(page + 1) * PAGE, used);
        used += PAGE;
    }
    used
}

/// Reads pages of a paused machine on request.
#[derive(Debug)]
pub struct PageReader {
    memory: GuestMemory,
    pagemap: Pagemap,
    buffer: Vec<u8>,
    bits: Vec<u8>,
}

impl PageReader {
    /// Of this RAM.
    ///
    /// # Errors
    /// The page tables cannot be read.
    pub fn new(memory: GuestMemory) -> Result<Self, ContentError> {
        Ok(Self {
            memory,
            pagemap: Pagemap::open().map_err(ContentError::Pages)?,
            buffer: vec![0; CHUNK_BYTES],
            bits: Vec::new(),
        })
    }

    /// Those of the `wanted` pages that hold data. Its own data is ignored.
    ///
    /// # Errors
    /// There are no such pages, or RAM cannot be read.
    pub fn read(&mut self, wanted: Pages<'_>) -> Result<Pages<'_>, ContentError> {
        let Pages { zone, offset, .. } = wanted;
        let own = zone_of(&self.memory, zone, offset)?;
        let chunk = fitting_chunk(own, &wanted)?;
        let buffer = &mut self.buffer[..chunk.bytes];
        let bits = Some(wanted.bits);
        let read = self
            .memory
            .read_chunk(own, &self.pagemap, chunk, bits, buffer);
        self.bits = read?;
        let used = pack(&self.bits, buffer);
        Ok(Pages {
            zone,
            offset,
            bits: &self.bits,
            data: &buffer[..used],
        })
    }
}

/// Writes the content of another process's RAM into RAM that has none yet.
#[derive(Debug)]
pub struct ContentWriter {
    memory: GuestMemory,
    engine: DiscardEngine,
}

impl ContentWriter {
    /// Until [`ContentWriter::finish`], RAM has no transparent huge pages: those that the content does not fill must not
    /// become resident.
    pub fn new(memory: GuestMemory) -> Self {
        for zone in memory.zones() {
            memory.advise_huge_pages(zone, false);
        }
        Self {
            memory,
            engine: DiscardEngine::without_vectors(Default::default()),
        }
    }

    /// Another writer into the same RAM, for another thread.
    pub fn another(&self) -> Self {
        Self {
            memory: self.memory.clone(),
            engine: DiscardEngine::without_vectors(Default::default()),
        }
    }

    /// Writes pages.
    ///
    /// # Errors
    /// They do not fit RAM, or it cannot be written.
    pub fn write(&self, pages: Pages<'_>) -> Result<(), ContentError> {
        let Pages {
            zone,
            offset,
            bits,
            data,
        } = pages;
        let invalid = |reason| invalid(zone, offset, reason);
        let own = zone_of(&self.memory, zone, offset)?;
        let chunk = fitting_chunk(own, &pages)?;
        let pages = (0..chunk.bytes / PAGE).filter(|page| is_set(bits, *page));
        if pages.clone().count() * PAGE != data.len() {
            return Err(invalid(
                "its bitmap has another number of pages than the data",
            ));
        }
        let ram = self.memory.ram().memory();
        for (page, data) in pages.zip(data.chunks_exact(PAGE)) {
            let address = GuestAddress(chunk.guest.0 + (page * PAGE) as u64);
            ram.write_slice(data, address)
                .map_err(|error| in_ram(own, offset, error))?;
        }
        Ok(())
    }

    /// Makes pages read as zeros, without being resident if the host's page size allows.
    ///
    /// # Errors
    /// They are not in RAM, or it cannot be written.
    pub fn clear(&mut self, run: PageRun) -> Result<(), ContentError> {
        let PageRun {
            zone,
            offset,
            bytes,
        } = run;
        let invalid = |reason| invalid(zone, offset, reason);
        let own = zone_of(&self.memory, zone, offset)?;
        if !offset.is_multiple_of(PAGE_BYTES) || !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(invalid("it is not made of pages"));
        }
        let guest = guest_range(own, offset, bytes).ok_or_else(|| invalid("it is outside RAM"))?;
        let own = own.clone();
        if self.discard(guest) {
            return Ok(());
        }
        let ram = self.memory.ram().memory();
        for at in (0..bytes).step_by(PAGE) {
            ram.write_slice(&[0; PAGE], GuestAddress(guest.start + at))
                .map_err(|error| in_ram(&own, offset + at, error))?;
        }
        Ok(())
    }

    /// Makes pages absent, whatever they contain: they come when the machine runs.
    ///
    /// # Errors
    /// They do not fit RAM, or cannot be discarded.
    pub fn leave_out(&mut self, pages: Pages<'_>) -> Result<AbsentPages, ContentError> {
        let Pages {
            zone, offset, bits, ..
        } = pages;
        let own = zone_of(&self.memory, zone, offset)?;
        let chunk = fitting_chunk(own, &pages)?;
        each_run(bits, chunk.bytes / PAGE, |start, bytes| {
            let start = chunk.guest.0 + start as u64;
            let bytes = bytes as u64;
            match self.discard(GuestRange { start, bytes }) {
                true => Ok(()),
                false => Err(invalid(zone, offset, "its pages cannot be discarded here")),
            }
        })?;
        Ok(AbsentPages {
            zone: zone as usize,
            chunk,
            bits: bits.to_vec(),
        })
    }

    fn discard(&mut self, range: GuestRange) -> bool {
        let ram = self.memory.ram();
        let outcome = self.engine.discard(ram, &mut [range], Expected::Zeros);
        outcome.discarded.bytes == range.bytes
    }

    /// The RAM with its content. `thp`: whether it uses transparent huge pages from now on. If pages were left out, the
    /// kernel must not: it would fill the gaps of a huge page with zeros.
    pub fn finish(self, thp: bool) -> GuestMemory {
        if thp {
            self.memory.use_huge_pages();
        }
        self.memory
    }
}

fn zone_of(memory: &GuestMemory, number: u32, offset: u64) -> Result<&Zone, ContentError> {
    let zone = memory.zones().get(number as usize);
    zone.ok_or_else(|| invalid(number, offset, "there is no such zone"))
}

/// The chunk of `pages`, whose bitmap has its size.
fn fitting_chunk(zone: &Zone, pages: &Pages<'_>) -> Result<Chunk, ContentError> {
    let invalid = |reason| invalid(pages.zone, pages.offset, reason);
    let chunk = chunk_at(zone, pages.offset).ok_or_else(|| invalid("no chunk begins there"))?;
    let (bits, count) = (pages.bits, chunk.bytes / PAGE);
    let fits =
        bits.len() == count.div_ceil(8) && (count..bits.len() * 8).all(|page| !is_set(bits, page));
    match fits {
        true => Ok(chunk),
        false => Err(invalid("its bitmap has another length than the chunk")),
    }
}

fn invalid(zone: u32, offset: u64, reason: &'static str) -> ContentError {
    ContentError::Invalid {
        zone,
        offset,
        reason,
    }
}

fn in_ram(zone: &Zone, offset: u64, error: vm_memory::GuestMemoryError) -> ContentError {
    ContentError::Ram {
        zone: zone.id.clone(),
        offset,
        source: std::io::Error::other(error),
    }
}

/// The guest address at `offset`, its offset from the start of its range, and the number of bytes up to the range's end.
pub(super) fn place(zone: &Zone, offset: u64) -> Option<(u64, u64, u64)> {
    let mut before = 0;
    for range in &zone.ranges {
        let bytes = range.end - range.start;
        if let Some(at) = offset.checked_sub(before).filter(|at| *at < bytes) {
            return Some((range.start + at, at, bytes - at));
        }
        before += bytes;
    }
    None
}

/// The chunk that begins at `offset`.
fn chunk_at(zone: &Zone, offset: u64) -> Option<Chunk> {
    let (address, at, left) = place(zone, offset)?;
    at.is_multiple_of(CHUNK_BYTES as u64).then(|| Chunk {
        offset,
        guest: GuestAddress(address),
        bytes: left.min(CHUNK_BYTES as u64) as usize,
    })
}

/// The addresses of these bytes, if one range has them all.
fn guest_range(zone: &Zone, offset: u64, bytes: u64) -> Option<GuestRange> {
    let (start, _, left) = place(zone, offset)?;
    (bytes > 0 && bytes <= left).then_some(GuestRange { start, bytes })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use virtio_devices::reclaim::ResidencyProbe;

    use super::*;
    use crate::memory::layout::MIB;
    use crate::memory::test_memory::{address, mark, private_and_shared};

    fn put(memory: &GuestMemory, page: u64, value: u64) {
        memory
            .ram()
            .memory()
            .write_obj(value, address(page))
            .unwrap();
    }

    fn get(memory: &GuestMemory, page: u64) -> u64 {
        memory.ram().memory().read_obj(address(page)).unwrap()
    }

    fn resident_bytes(memory: &GuestMemory) -> u64 {
        let probe = ResidencyProbe::new(memory.ram().clone()).unwrap();
        probe.measure().unwrap().resident_bytes
    }

    /// Sends to `writer`; returns the bytes of data and those that were cleared.
    fn send(
        from: &GuestMemory,
        written: Option<&WrittenPages>,
        writer: &mut ContentWriter,
    ) -> (usize, u64) {
        let (mut sent, mut cleared) = (0, Vec::new());
        from.send_content::<ContentError>(
            written,
            |pages| {
                sent += pages.data.len();
                writer.write(pages)
            },
            |run| {
                cleared.push(run);
                Ok(())
            },
        )
        .unwrap();
        for run in &cleared {
            writer.clear(*run).unwrap();
        }
        (sent, cleared.iter().map(|run| run.bytes).sum())
    }

    #[test]
    fn target_has_the_data_of_each_pass_and_no_page_that_was_given_back() {
        let source = private_and_shared();
        for page in [0, 511, 512, 1791, 1792, 3583] {
            put(&source, page, mark(page));
        }
        put(&source, 100, 0);
        let mut writer = ContentWriter::new(private_and_shared());
        assert_eq!(send(&source, None, &mut writer), (6 * PAGE, 0));
        assert_eq!(resident_bytes(&writer.memory), 6 * PAGE_BYTES);

        let log = source.ram().writes();
        log.start(source.zones().iter().flat_map(|zone| zone.ranges.clone()));
        let mut given_back = [512, 1792].map(|page| GuestRange {
            start: page * PAGE_BYTES,
            bytes: PAGE_BYTES,
        });
        let mut engine = DiscardEngine::without_vectors(Default::default());
        let outcome = engine.discard(source.ram(), &mut given_back, Expected::Anything);
        assert_eq!(outcome.discarded.bytes, 2 * PAGE_BYTES);
        put(&source, 0, mark(7));
        log.record(0, 8);
        put(&source, 3583, 0);
        log.record(3583 * PAGE_BYTES, 8);
        let written = WrittenPages::of_log(log);
        assert_eq!(written.bytes(), 4 * PAGE_BYTES);
        let second = send(&source, Some(&written), &mut writer);
        assert_eq!(second, (PAGE, 3 * PAGE_BYTES));
        let target = writer.finish(false);
        for page in 0..3584 {
            assert_eq!(get(&target, page), get(&source, page), "page {page}");
        }
        assert_eq!(get(&target, 0), mark(7));
    }

    #[test]
    fn senders_that_share_a_pass_send_each_page_once() {
        let source = private_and_shared();
        let count = 3584;
        for page in (0..count).step_by(7) {
            put(&source, page, mark(page));
        }
        let (left, writer) = (Chunks::default(), ContentWriter::new(private_and_shared()));
        let sent: usize = std::thread::scope(|scope| {
            let senders = (0..3).map(|_| {
                let (source, left, writer) = (&source, &left, writer.another());
                scope.spawn(move || {
                    let mut sent = 0;
                    let send = |pages: Pages<'_>| {
                        sent += pages.data.len();
                        writer.write(pages)
                    };
                    let sends = source.send_share(None, left, send, |_| Ok(()));
                    sends.map(|()| sent).unwrap()
                })
            });
            let senders: Vec<_> = senders.collect();
            senders.into_iter().map(|it| it.join().unwrap()).sum()
        });
        assert_eq!(sent, count.div_ceil(7) as usize * PAGE);
        let target = writer.finish(false);
        for page in 0..count {
            assert_eq!(get(&target, page), get(&source, page), "page {page}");
        }
    }

    #[test]
    fn content_for_another_place_or_of_another_size_is_refused_and_writes_nothing() {
        let mut writer = ContentWriter::new(private_and_shared());
        let data = vec![1; 2 * PAGE];
        let mut bits = vec![0; 64];
        bits[0] = 0b101;
        let good = Pages {
            zone: 1,
            offset: 0,
            bits: &bits,
            data: &data,
        };
        let mut long = bits.clone();
        long.push(0);
        // The last chunk of a zone has 1 MiB.
        let mut beyond = vec![0; 32];
        beyond[0] = 3;
        for bad in [
            Pages { zone: 2, ..good },
            Pages {
                zone: u32::MAX,
                ..good
            },
            Pages {
                offset: PAGE_BYTES,
                ..good
            },
            Pages {
                offset: 8 * MIB,
                ..good
            },
            Pages {
                offset: u64::MAX,
                ..good
            },
            Pages {
                offset: 6 * MIB,
                ..good
            },
            Pages {
                bits: &bits[..63],
                ..good
            },
            Pages {
                bits: &long,
                ..good
            },
            Pages {
                bits: &beyond,
                ..good
            },
            Pages {
                data: &data[..PAGE],
                ..good
            },
            Pages {
                data: &data[..PAGE + 1],
                ..good
            },
        ] {
            let error = writer.write(bad).unwrap_err();
            assert!(matches!(error, ContentError::Invalid { .. }), "{error}");
        }
        let run = PageRun {
            zone: 0,
            offset: 0,
            bytes: PAGE_BYTES,
        };
        for bad in [
            PageRun { zone: 2, ..run },
            PageRun { offset: 1, ..run },
            PageRun { bytes: 0, ..run },
            PageRun {
                bytes: 8 * MIB,
                ..run
            },
            PageRun {
                offset: 7 * MIB,
                ..run
            },
            PageRun {
                offset: u64::MAX - 4095,
                ..run
            },
        ] {
            let error = writer.clear(bad).unwrap_err();
            assert!(matches!(error, ContentError::Invalid { .. }), "{error}");
        }
        assert_eq!(resident_bytes(&writer.memory), 0);
        writer.write(good).unwrap();
        assert_eq!(resident_bytes(&writer.memory), 2 * PAGE_BYTES);
    }
}
