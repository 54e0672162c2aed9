//! The pages of RAM that follow the machine: sent by the source when the target asks for them.
//!
//! ```text
//!  target                                source
//!  Fetch ──────────────────────────────► reads RAM of the paused machine
//!        ◄──────────────────────── Pages those with data
//!  Complete ───────────────────────────► the source ends
//! ```

use std::error::Error;
use std::fmt::Debug;
use std::io::{Read, Write};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use machine::memory::on_demand::PageSource;
use machine::memory::{GuestMemory, PageReader, Pages};

use super::peer::Peer;
use super::wire::{Channel, Kind, Reader, WireError, Writer};
use super::{MigrationError, SendProgress};
use crate::threads::MIGRATION_THREAD;

const PAGE: usize = 4096;

/// The target's side of the connection on which it asks.
#[derive(Debug)]
pub(super) struct Fetches<R, W> {
    reader: Reader<R>,
    writer: Writer<W>,
}

impl<R: Read + Channel, W: Write + Channel> Fetches<R, W> {
    pub(super) fn new(reader: Reader<R>, writer: Writer<W>) -> Self {
        Self { reader, writer }
    }

    fn try_fetch(
        &mut self,
        wanted: Pages<'_>,
        put: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), WireError> {
        self.writer.pages(Kind::Fetch, wanted)?;
        let message = self
            .reader
            .next(&[Kind::Pages], "the pages that were asked for")?;
        let Pages {
            zone,
            offset,
            bits,
            data,
        } = message.pages()?;
        let is_set = |bits: &[u8], page: usize| bits[page / 8] & 1 << (page % 8) != 0;
        let invalid = |reason| {
            let kind = Kind::Pages;
            Err(WireError::Invalid { kind, reason })
        };
        if (zone, offset, bits.len()) != (wanted.zone, wanted.offset, wanted.bits.len()) {
            return invalid("these are other pages than asked for");
        }
        let pages = (0..bits.len() * 8).filter(|page| is_set(bits, *page));
        if pages.clone().any(|page| !is_set(wanted.bits, page)) {
            return invalid("these are more pages than asked for");
        }
        if pages.clone().count() * PAGE != data.len() {
            return invalid("its bitmap has another number of pages than the data");
        }
        for (page, data) in pages.zip(data.chunks_exact(PAGE)) {
            put(page, data);
        }
        Ok(())
    }
}

impl<R, W> PageSource for Fetches<R, W>
where
    R: Read + Channel + Send + Debug,
    W: Write + Channel + Send + Debug,
{
    fn fetch(
        &mut self,
        zone: usize,
        offset: u64,
        bits: &[u8],
        put: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let wanted = Pages {
            zone: zone as u32,
            offset,
            bits,
            data: &[],
        };
        Ok(self.try_fetch(wanted, put)?)
    }

    fn end(&mut self) {
        if let Err(error) = self.writer.send(Kind::Complete, &[]) {
            let error = api::error_line(&error);
            log::warn!(
                "The source of the VM cannot be told that all of its memory is here: {error}"
            );
        }
    }
}

/// The thread of the source that answers.
#[derive(Debug)]
pub(super) struct PageServer {
    peer: Peer,
    thread: JoinHandle<Result<u64, MigrationError>>,
}

impl PageServer {
    /// Answers on the connection `asked`, on which a request comes at least every `limit`.
    pub(super) fn start(
        memory: GuestMemory,
        mut asked: Writer<Peer>,
        limit: Duration,
        progress: Arc<SendProgress>,
    ) -> Result<Self, MigrationError> {
        asked.get_mut().set_end(None);
        asked.get_mut().set_limit(limit);
        let peer = asked.get_mut().clone();
        let thread = std::thread::Builder::new()
            .name(MIGRATION_THREAD.to_owned())
            .spawn(move || serve(memory, asked, &progress))
            .map_err(MigrationError::Thread)?;
        Ok(Self { peer, thread })
    }

    /// Waits until the target has all pages. Returns the bytes of data.
    pub(super) fn finish(self) -> Result<u64, MigrationError> {
        self.thread
            .join()
            .expect("a thread that panics ends the process")
    }

    /// The target does not get the machine.
    pub(super) fn abandon(self) {
        self.peer.break_others();
        self.finish().ok();
    }
}

fn serve(
    memory: GuestMemory,
    mut writer: Writer<Peer>,
    progress: &SendProgress,
) -> Result<u64, MigrationError> {
    let peer = writer.get_mut().clone();
    let mut reader = Reader::new(peer.clone());
    let mut pages = PageReader::new(memory)?;
    let mut data_bytes = 0;
    loop {
        let expected = "a request for pages, or that there is none";
        let message = reader.next(&[Kind::Fetch, Kind::Complete], expected)?;
        if message.kind == Kind::Complete {
            return Ok(data_bytes);
        }
        let read = pages.read(message.pages()?)?;
        data_bytes += read.data.len() as u64;
        writer.pages(Kind::Pages, read)?;
        progress.set_wire_bytes(peer.written());
    }
}
