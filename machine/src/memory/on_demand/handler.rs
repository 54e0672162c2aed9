//! The thread that handles page faults.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::process;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::super::GuestMemory;
use super::super::checksums::PIECE_BYTES;
use super::super::content::{CHUNK_BYTES, PAGE};
use super::chunks::Chunks;
use super::error::FillError;
use super::orders::{FillOwner, FillReport, Orders, Outcome, TOUCHED_MAX};
use super::uffd::{Filled, Report, Userfaultfd};

const TOKEN_REPORTS: u64 = 0;
const TOKEN_ORDERS: u64 = 1;
/// Pause after a discard has been read, because the thread that discards may not have continued yet.
const DISCARD_PAUSE_MS: i32 = 1;
const FOR_EVER: i32 = -1;
/// Pause of the background fill after a demand. A guest that wakes up has the next one soon, and would wait for the chunk
/// that is being read. A guest can delay the fill by one pause for each of its pages.
const QUIET_MS: i32 = 5;
/// Time for a machine to end if its RAM cannot be filled. A thread that waits for a page cannot be stopped.
const END_DEADLINE: Duration = Duration::from_secs(2);

/// The state of the thread.
pub(super) struct Handler {
    uffd: Arc<Userfaultfd>,
    /// All ranges that were registered at the start.
    watched: Vec<Range<u64>>,
    epoll: Epoll,
    chunks: Chunks,
    orders: Arc<Orders>,
    owner: Box<dyn FillOwner>,
    /// Buffer for a chunk and one more piece, and the number of the chunk in it.
    buffer: Vec<u8>,
    loaded: Option<usize>,
    /// Addresses that threads wait for: at most one per thread, so these are few.
    faults: VecDeque<u64>,
    /// The background fill makes room for demands.
    yields: bool,
    /// It does so now: a page has been filled in on demand since it did anything.
    pauses: bool,
    /// Chunks and pages that the background fill fills in first.
    first: VecDeque<(usize, usize)>,
    /// The guest's pages that were filled in on demand.
    touched: Vec<u32>,
    /// The next chunk of the background fill.
    next: usize,
    report: FillReport,
    /// Keeps the memory mapped.
    memory: GuestMemory,
}

impl Handler {
    pub(super) fn new(
        memory: &GuestMemory,
        uffd: Arc<Userfaultfd>,
        watched: Vec<Range<u64>>,
        chunks: Chunks,
        orders: Arc<Orders>,
        owner: Box<dyn FillOwner>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for (fd, token) in [
            (uffd.as_fd().as_raw_fd(), TOKEN_REPORTS),
            (orders.changed.as_raw_fd(), TOKEN_ORDERS),
        ] {
            let event = EpollEvent::new(EventSet::IN, token);
            epoll.ctl(ControlOperation::Add, fd, event)?;
        }
        Ok(Self {
            uffd,
            watched,
            epoll,
            chunks,
            orders,
            owner,
            buffer: vec![0; CHUNK_BYTES + PIECE_BYTES],
            loaded: None,
            faults: VecDeque::new(),
            yields: false,
            pauses: false,
            first: VecDeque::new(),
            touched: Vec::new(),
            next: 0,
            report: FillReport {
                demanded_pages: 0,
                filled_pages: 0,
            },
            memory: memory.clone(),
        })
    }

    /// Has the background fill begin with these pages.
    pub(super) fn beginning_with(mut self, first: VecDeque<(usize, usize)>) -> Self {
        self.first = first;
        self
    }

    /// Has the background fill pause after each demand, if `yields`.
    pub(super) fn yielding(mut self, yields: bool) -> Self {
        self.yields = yields;
        // The guest has its first demand before it does anything.
        self.pauses = yields;
        self
    }

    /// Runs until all of RAM is complete or no longer in use.
    pub(super) fn run(mut self) {
        let guard = EndsProcess;
        if let Err(error) = self.serve_all() {
            self.owner.failed(&error);
            self.orders.end(Outcome::Failed);
            // Threads still wait for pages. If the descriptor were dropped, they would read zeros.
            if !self.machine_ends() {
                log::error!(
                    "The machine waits for missing RAM and cannot be stopped: this process is aborted"
                );
                return drop(guard);
            }
        } else {
            self.chunks.end();
            self.owner.touched(&self.touched);
        }
        std::mem::forget(guard);
    }

    fn serve_all(&mut self) -> Result<(), FillError> {
        let total: u64 = self
            .memory
            .zones()
            .iter()
            .map(super::super::Zone::bytes)
            .sum();
        let chunks = (0..self.chunks.count()).map(|at| self.chunks.get(at).bytes() as u64);
        self.owner.progress(total - chunks.sum::<u64>());
        while self.next < self.chunks.count() {
            if self.orders.ends.load(Ordering::Acquire) {
                return Ok(());
            }
            let fills = self.orders.fills.load(Ordering::Acquire);
            let timeout_ms = match self.faults.is_empty() {
                // The background fill may have recorded faults.
                false => 0,
                true if !fills => FOR_EVER,
                true if self.pauses => QUIET_MS,
                true => 0,
            };
            let reported = self.wait(timeout_ms);
            let reported = reported.map_err(FillError::Faults)?;
            if reported {
                self.take_reports().map_err(FillError::Faults)?;
            }
            match self.faults.pop_front() {
                Some(address) => {
                    self.answer(address)?;
                    // The pages that are known to be needed are better in memory before the guest demands them.
                    self.pauses = self.yields && self.first.is_empty();
                }
                None if fills && !reported => {
                    self.pauses = false;
                    match self.first.pop_front() {
                        Some((at, page)) => self.fill_page(at, page)?,
                        None => self.fill_next()?,
                    }
                }
                None => {}
            }
        }
        for range in &self.watched {
            self.uffd.unregister(range).map_err(FillError::Faults)?;
        }
        self.owner.filled(self.report);
        self.orders.end(Outcome::Filled);
        Ok(())
    }

    /// Waits with a deadline until the memory is no longer in use.
    fn machine_ends(&self) -> bool {
        let reports = self.uffd.as_fd().as_raw_fd();
        let ignored = EpollEvent::default();
        let removed = self.epoll.ctl(ControlOperation::Delete, reports, ignored);
        let ended = || self.orders.ends.load(Ordering::Acquire);
        let deadline = Instant::now() + END_DEADLINE;
        while removed.is_ok() && !ended() {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = i32::try_from(left.as_millis()).unwrap_or(FOR_EVER);
            if left == 0 || self.wait(left).is_err() {
                break;
            }
        }
        ended()
    }

    /// Waits for reports. Returns whether there are any.
    fn wait(&self, timeout_ms: i32) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); 2];
        let count = match self.epoll.wait(timeout_ms, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let has = |token| events[..count].iter().any(|event| event.data() == token);
        if has(TOKEN_ORDERS) {
            // If there is nothing to read, the discard has been read.
            self.orders.changed.read().ok();
        }
        Ok(has(TOKEN_REPORTS))
    }

    /// Applies discards immediately and only records faults: the kernel returns a fault before an older discard.
    fn take_reports(&mut self) -> io::Result<()> {
        let mut reports = Vec::new();
        self.uffd.read(&mut reports)?;
        for report in reports {
            match report {
                Report::Removed(start, end) => self.chunks.forget(start, end),
                Report::Fault(address) => self.faults.push_back(address),
            }
        }
        Ok(())
    }

    /// Waits while memory is being discarded: nothing can be filled in until shortly after that has been read.
    fn let_discard(&mut self) -> Result<(), FillError> {
        self.wait(DISCARD_PAUSE_MS)
            .and_then(|_| self.take_reports())
            .map_err(FillError::Faults)
    }

    /// Fills in the page at `address`.
    fn answer(&mut self, address: u64) -> Result<(), FillError> {
        let start = address - address % PAGE as u64;
        loop {
            let found = self.chunks.find(start);
            let found = found.and_then(|at| {
                let chunk = self.chunks.get(at);
                let page = (start - chunk.host.start) as usize / PAGE;
                chunk.is_left(page).then_some((at, page))
            });
            let filled = match found {
                Some((at, page)) => {
                    let data = self.load_page(at, page)?;
                    self.uffd.copy(start, &self.buffer[data..data + PAGE])
                }
                None => match self.uffd.zero(start, PAGE as u64) {
                    // Meanwhile, the background fill has made this ordinary memory.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Filled::Present),
                    filled => filled,
                },
            };
            match filled.map_err(FillError::Faults)? {
                Filled::Bytes(0) => self.let_discard()?,
                Filled::Bytes(_) => {
                    if let Some((at, page)) = found {
                        self.chunks.done(at, page..page + 1);
                        self.report.demanded_pages += 1;
                        self.record(at, page);
                    }
                    return Ok(());
                }
                // Several threads waited for this page.
                Filled::Present => {
                    let woken = self.uffd.wake(start, PAGE as u64);
                    return woken.map_err(FillError::Faults);
                }
            }
        }
    }

    fn record(&mut self, at: usize, page: usize) {
        if self.touched.len() < TOUCHED_MAX {
            self.touched.extend(self.chunks.get(at).guest_page(page));
        }
    }

    /// Fills in a page that no thread waits for, unless it is no longer missing.
    fn fill_page(&mut self, at: usize, page: usize) -> Result<(), FillError> {
        while self.chunks.get(at).is_left(page) {
            let data = self.load_page(at, page)?;
            let start = self.chunks.get(at).host.start + (page * PAGE) as u64;
            let filled = self.uffd.copy(start, &self.buffer[data..data + PAGE]);
            match filled.map_err(FillError::Faults)? {
                Filled::Bytes(0) => self.let_discard()?,
                Filled::Bytes(_) => {
                    self.chunks.done(at, page..page + 1);
                    self.report.filled_pages += 1;
                }
                // Never overwrites: a present page is newer.
                Filled::Present => self.chunks.done(at, page..page + 1),
            }
        }
        Ok(())
    }

    /// Reads one page into the buffer; returns its place there.
    fn load_page(&mut self, at: usize, page: usize) -> Result<usize, FillError> {
        if self.loaded != Some(at) {
            let buffer = &mut self.buffer[CHUNK_BYTES..];
            if self.chunks.get(at).is_checked(page) {
                let read = self.chunks.read_page(at, page, &mut buffer[..PAGE]);
                return read.map(|()| CHUNK_BYTES);
            }
            if let Some(place) = self.chunks.read_piece(at, page, buffer)? {
                return Ok(CHUNK_BYTES + place);
            }
        }
        self.load(at)?;
        Ok(page * PAGE)
    }

    /// Reads a chunk into the buffer.
    fn load(&mut self, at: usize) -> Result<(), FillError> {
        if self.loaded != Some(at) {
            self.loaded = None;
            self.chunks.read(at, &mut self.buffer)?;
            self.loaded = Some(at);
        }
        Ok(())
    }

    /// Fills in the rest of the next chunk, which becomes ordinary memory.
    fn fill_next(&mut self) -> Result<(), FillError> {
        let at = self.next;
        while self.chunks.get(at).next_left(0).is_some() {
            self.load(at)?;
            let Some(pages) = self.chunks.get(at).next_left(0) else {
                break;
            };
            let start = self.chunks.get(at).host.start + (pages.start * PAGE) as u64;
            let data = &self.buffer[pages.start * PAGE..pages.end * PAGE];
            match self.uffd.copy(start, data).map_err(FillError::Faults)? {
                Filled::Bytes(bytes) => {
                    let count = bytes / PAGE;
                    self.chunks.done(at, pages.start..pages.start + count);
                    self.report.filled_pages += count as u64;
                    if count < pages.len() {
                        self.let_discard()?;
                    }
                }
                Filled::Present => {
                    // Never overwrites: a present page is newer.
                    self.chunks.done(at, pages.start..pages.start + 1);
                }
            }
        }
        let chunk = self.chunks.get(at);
        let bytes = chunk.bytes() as u64;
        if let Err(error) = self.uffd.unregister(&chunk.host) {
            // Until the end, its faults are resolved with zeros.
            log::debug!("A part of guest RAM keeps its watch: {error}");
        }
        self.next += 1;
        self.owner.progress(bytes);
        Ok(())
    }
}

/// Ends the process when it is dropped, which a panic of the thread does.
struct EndsProcess;

impl Drop for EndsProcess {
    fn drop(&mut self) {
        process::abort();
    }
}
