//! The discard engine: executes a plan with as few system calls as the kernel allows.
//!
//! | Backing | Call | Calls per batch |
//! | --- | --- | --- |
//! | private, Linux ≥ 6.13 | `process_madvise(MADV_DONTNEED)` | 1 per 1024 pieces or 128 MiB |
//! | private, older | `madvise(MADV_DONTNEED)` | 1 per piece |
//! | shared file | `fallocate(PUNCH_HOLE)` | 1 per piece; no vector form exists |
//!
//! On a shared file, `MADV_DONTNEED` would only unmap: the pages stay in the file. On a private file mapping it drops
//! the pages that the guest has written, and the mapping shows the file again. So it is used there only if the guest
//! expects no particular content ([`Expected::Anything`]). The file itself is never changed.
#![allow(unsafe_code)]
// UNSAFETY: this module decides that memory may be discarded, which the functions in `sys` require their caller to
// guarantee.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

use device_facts::SkipReason;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::backing::{Backing, Expected, RegionLayout, layout_of};
use super::huge::Remainders;
use super::overlay::{Hidden, Overlay};
use super::ranges::{GuestRange, Piece, SkippedBytes, leave_out, plan};
use super::switch::DiscardSwitch;
use super::sys::{self, HostSpan, VECTOR_SPANS_MAX};
use crate::device::GuestRam;
use crate::worker::Turn;

/// Maximum number of bytes discarded by one call, unless a single backing page is larger. The kernel frees resident
/// memory at several GiB per second, and a call cannot be interrupted.
const CALL_BYTES_MAX: u64 = 128 << 20;

/// Huge pages split by one call: some hundred microseconds each.
const SPLITS_AT_ONCE: usize = 16;

/// A number of ranges and the bytes in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// The number of ranges.
    pub ranges: u64,
    /// The number of bytes in all of them.
    pub bytes: u64,
}

impl Extent {
    /// Counts one more range.
    pub fn add(&mut self, bytes: u64) {
        self.add_all(Self { ranges: 1, bytes });
    }

    /// Adds the counts of `other`.
    pub fn add_all(&mut self, other: Self) {
        self.ranges = self.ranges.saturating_add(other.ranges);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// The result of one batch. Every requested byte is in exactly one of `discarded`, `failed` and `skipped`.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The claims, before any check.
    pub requested: Extent,
    /// Memory discarded. Ranges are counted after merging.
    pub discarded: Extent,
    /// Memory for which the system call failed. Ranges are counted after merging.
    pub failed: Extent,
    /// Memory not discarded on purpose.
    pub skipped: SkippedBytes,
    /// The part of `discarded` that did not cover blocks of transparent huge pages completely. It was free once the
    /// kernel had split them.
    pub partial_bytes: u64,
    /// System calls made to discard.
    pub syscalls: u64,
    /// The error of the first failed range.
    pub first_error: Option<io::Error>,
}

/// Discards guest memory. One per worker thread; reuses its buffers across batches.
#[derive(Debug)]
pub struct DiscardEngine {
    /// A descriptor of this process, if the kernel supports vectored discards.
    vectors: Option<BorrowedFd<'static>>,
    switch: Arc<DiscardSwitch>,
    /// Private memory that shows a file in places.
    overlay: Option<Arc<Overlay>>,
    /// The map from which `regions` was derived. The reference is weak: it identifies the map without keeping unplugged
    /// memory mapped, and its address cannot be reused while the reference is held.
    known: Weak<GuestMemoryMmap<()>>,
    regions: Vec<RegionLayout>,
    pieces: Vec<Piece>,
    spans: Vec<HostSpan>,
}

impl DiscardEngine {
    /// An engine that obeys `switch` and uses the best calls this kernel supports.
    #[must_use]
    pub fn new(switch: Arc<DiscardSwitch>) -> Self {
        Self::with_vectors(switch, sys::vector_advice())
    }

    /// An engine that behaves as on a kernel without vectored discards, for tests and comparisons.
    #[must_use]
    pub fn without_vectors(switch: Arc<DiscardSwitch>) -> Self {
        Self::with_vectors(switch, None)
    }

    fn with_vectors(switch: Arc<DiscardSwitch>, vectors: Option<BorrowedFd<'static>>) -> Self {
        Self {
            vectors,
            switch,
            overlay: None,
            known: Weak::new(),
            regions: Vec::new(),
            pieces: Vec::new(),
            spans: Vec::with_capacity(VECTOR_SPANS_MAX),
        }
    }

    /// The same engine for memory that shows a file in places.
    #[must_use]
    pub fn over(self, overlay: Option<Arc<Overlay>>) -> Self {
        Self { overlay, ..self }
    }

    /// Whether one call can discard many ranges on this kernel.
    #[must_use]
    pub fn has_vectors(&self) -> bool {
        self.vectors.is_some()
    }

    /// Discards the whole pages of guest RAM in `claims`, and reports exactly which. Sorts `claims`. After it returns,
    /// discarded memory uses no host memory until it is touched again, and then reads as `expected`.
    pub fn discard(
        &mut self,
        ram: &GuestRam,
        claims: &mut [GuestRange],
        expected: Expected,
    ) -> Outcome {
        self.discard_unless_called(ram, claims, expected, &mut Turn::default())
            .expect("a turn of one's own has no commands")
    }

    /// As [`DiscardEngine::discard`], but stops between two system calls if a command arrives; it then returns `None`.
    /// Any part of the memory may be discarded in this case. Because no request was completed, all of it can be
    /// discarded again.
    pub fn discard_unless_called(
        &mut self,
        ram: &GuestRam,
        claims: &mut [GuestRange],
        expected: Expected,
        turn: &mut Turn,
    ) -> Option<Outcome> {
        let mut outcome = Outcome {
            requested: requested(claims),
            ..Outcome::default()
        };
        // A separate reference, so that the map and the switch can be borrowed along with `self`.
        let switch = Arc::clone(&self.switch);
        let Ok(_batch) = switch.begin() else {
            self.pieces.clear();
            outcome
                .skipped
                .add(SkipReason::Inhibited, outcome.requested.bytes);
            return Some(outcome);
        };
        // Held until the last system call: it keeps mappings and files open.
        let mem = ram.memory().into_inner();
        self.refresh(&mem);
        outcome.skipped = plan(&self.regions, claims, expected, &mut self.pieces);
        // Until the last system call, no device gets access to what is left.
        let _discards = ram.dma_mapped().begin(|mapped| {
            let skipped = leave_out(&self.regions, &mut self.pieces, mapped);
            outcome.skipped.add(SkipReason::DmaMapped, skipped);
            let regions = &self.regions;
            let left = self.pieces.iter();
            left.map(|piece| regions[piece.region].guest_range(piece))
                .collect()
        });
        self.hide_files(&mut outcome, turn);
        let is_whole = self.carry_out(&mut outcome, turn);
        self.log(ram);
        if !is_whole {
            self.pieces.clear();
            return None;
        }
        self.settle(&mut outcome);
        let remainders = Remainders::of(&self.regions, &self.pieces);
        outcome.partial_bytes = remainders.partial_bytes;
        self.split(&remainders.pages, turn);
        Some(outcome)
    }

    /// Makes the kernel split the huge pages of these pages. It may fail, for example for a pinned page: the kernel tries
    /// again under memory pressure. So may a command end it.
    fn split(&self, pages: &[HostSpan], turn: &mut Turn) {
        for pages in pages.chunks(SPLITS_AT_ONCE) {
            if turn.is_called() {
                return;
            }
            turn.charge_call(pages.len() as u64, 0);
            match self.vectors {
                Some(pidfd) => {
                    sys::cool_vector(pidfd, pages).ok();
                }
                None => pages.iter().for_each(|page| {
                    sys::cool_span(*page).ok();
                }),
            }
        }
    }

    /// Removes the file from the pieces that show one. A piece that cannot be freed of it is not discarded, because it
    /// would show the file's content again.
    fn hide_files(&mut self, outcome: &mut Outcome, turn: &mut Turn) {
        let Some(overlay) = &self.overlay else {
            return;
        };
        let regions = &self.regions;
        self.pieces.retain(|piece| {
            let region = &regions[piece.region];
            if region.backing != Backing::AnonymousPrivate {
                return true;
            }
            let HostSpan { start, bytes } = region.span(piece.offset, piece.bytes);
            // SAFETY: the planner has checked that the piece is whole pages of guest RAM that the guest has released;
            // `discard` keeps the mapping alive.
            match unsafe { overlay.hide(start, bytes) } {
                Ok(Hidden::All(calls)) => {
                    outcome.syscalls += calls;
                    turn.charge_call(calls, 0);
                    true
                }
                Ok(Hidden::TooManyPieces) => {
                    outcome.skipped.add(SkipReason::PrivateFile, piece.bytes);
                    false
                }
                Err(error) => {
                    outcome.failed.add(piece.bytes);
                    outcome.first_error.get_or_insert(error);
                    false
                }
            }
        });
    }

    /// Records the batch: its memory has other content now.
    fn log(&self, ram: &GuestRam) {
        if !ram.writes().is_on() {
            return;
        }
        for piece in &self.pieces {
            let start = self.regions[piece.region].guest_start + piece.offset;
            ram.writes().record(start, piece.bytes);
        }
    }

    fn refresh(&mut self, mem: &Arc<GuestMemoryMmap<()>>) {
        if !std::ptr::eq(self.known.as_ptr(), Arc::as_ptr(mem)) {
            self.known = Arc::downgrade(mem);
            self.regions = layout_of(mem);
        }
    }

    /// Discards all pieces, private ones in vectors. False: a command arrived.
    fn carry_out(&mut self, outcome: &mut Outcome, turn: &mut Turn) -> bool {
        let mut at = 0;
        // Spans that a vector did not reach are discarded individually, starting at the first one that failed.
        let mut one_by_one_until = 0;
        while at < self.pieces.len() {
            if outcome.syscalls > 0 && turn.is_called() {
                return false;
            }
            if at >= one_by_one_until
                && let Some(pidfd) = self.vectors
                && self.collect_vector(at)
            {
                let end = at + self.spans.len();
                at += self.discard_by_vector(pidfd, at, outcome, turn);
                one_by_one_until = end;
            } else if self.discard_one(at, outcome, turn) {
                at += 1;
            }
        }
        true
    }

    /// Fills `self.spans` with private pieces starting at `first`. False: too few for a vector, because the plain call
    /// is slightly cheaper.
    fn collect_vector(&mut self, first: usize) -> bool {
        self.spans.clear();
        let mut left = CALL_BYTES_MAX;
        for piece in &self.pieces[first..] {
            let region = &self.regions[piece.region];
            if self.spans.len() == VECTOR_SPANS_MAX || !region.is_private() || piece.bytes > left {
                break;
            }
            left -= piece.bytes;
            self.spans.push(region.span(piece.offset, piece.bytes));
        }
        self.spans.len() > 1
    }

    /// Discards `self.spans` in one call; returns the number of completely discarded spans.
    fn discard_by_vector(
        &mut self,
        pidfd: BorrowedFd<'_>,
        first: usize,
        outcome: &mut Outcome,
        turn: &mut Turn,
    ) -> usize {
        let pieces = &mut self.pieces[first..first + self.spans.len()];
        let asked = pieces.iter().map(|piece| piece.bytes).sum();
        outcome.syscalls += 1;
        turn.charge_call(pieces.len() as u64, asked);
        // SAFETY: the planner has checked that every span is whole pages of guest RAM that the guest has released;
        // `discard` keeps the mapping alive.
        let advised = match unsafe { sys::discard_vector(pidfd, &self.spans) } {
            Ok(bytes) => bytes as u64,
            Err(e) => {
                // The call is forbidden or no longer available, so it is not tried again.
                if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) {
                    self.vectors = None;
                }
                0
            }
        };
        let mut left = advised;
        for (done, piece) in pieces.iter_mut().enumerate() {
            piece.discarded_bytes = left.min(piece.bytes);
            left -= piece.discarded_bytes;
            if piece.discarded_bytes < piece.bytes {
                return done;
            }
        }
        self.spans.len()
    }

    /// Discards the rest of a piece, up to the limit of one call. False: more of it remains.
    fn discard_one(&mut self, at: usize, outcome: &mut Outcome, turn: &mut Turn) -> bool {
        let piece = &mut self.pieces[at];
        let region = &self.regions[piece.region];
        let offset = piece.offset + piece.discarded_bytes;
        // Both are powers of two, so no backing page is split.
        let bytes_max = CALL_BYTES_MAX.max(region.page_bytes);
        let bytes = (piece.bytes - piece.discarded_bytes).min(bytes_max);
        outcome.syscalls += 1;
        turn.charge_call(1, bytes);
        let result = match region.backing {
            Backing::AnonymousPrivate | Backing::PrivateFile => {
                // SAFETY: whole pages of guest RAM that the guest has released; `discard` keeps the mapping alive.
                unsafe { sys::discard_span(region.span(offset, bytes)) }
            }
            Backing::SharedFile { fd, file_start } => {
                // SAFETY: the planner has checked that the piece consists of whole pages of this region that the guest
                // has released; `discard` keeps the file open.
                unsafe { sys::punch_hole(fd, file_start + offset, bytes) }
            }
            // The planner makes no pieces of such a region.
            Backing::Unsupported => Err(io::ErrorKind::Unsupported.into()),
        };
        match result {
            Ok(()) => {
                piece.discarded_bytes += bytes;
                piece.discarded_bytes == piece.bytes
            }
            Err(e) => {
                outcome.first_error.get_or_insert(e);
                true
            }
        }
    }

    fn settle(&self, outcome: &mut Outcome) {
        for piece in &self.pieces {
            if piece.discarded_bytes > 0 {
                outcome.discarded.add(piece.discarded_bytes);
            }
            if piece.discarded_bytes < piece.bytes {
                outcome.failed.add(piece.bytes - piece.discarded_bytes);
            }
        }
    }

    /// The parts of `claim` from its start on that the last batch discarded, and that read as zeros until they are
    /// written. Memory that shows a file again does not count.
    #[must_use]
    pub fn zeroed_prefix(&self, claim: GuestRange) -> u64 {
        let mut at = claim.start;
        let end = claim.start.saturating_add(claim.bytes);
        let first = self.pieces.partition_point(|piece| {
            self.regions[piece.region].guest_range(piece).end <= claim.start
        });
        for piece in &self.pieces[first..] {
            let region = &self.regions[piece.region];
            let start = region.guest_start + piece.offset;
            if at >= end || start > at || region.backing == Backing::PrivateFile {
                break;
            }
            at = start + piece.discarded_bytes;
            if piece.discarded_bytes < piece.bytes {
                break;
            }
        }
        at.clamp(claim.start, end) - claim.start
    }

    /// The ranges that the last batch discarded, as guest addresses in ascending order.
    pub fn discarded_ranges(&self) -> impl Iterator<Item = GuestRange> + '_ {
        self.pieces
            .iter()
            .filter(|piece| piece.discarded_bytes > 0)
            .map(|piece| GuestRange {
                start: self.regions[piece.region].guest_start + piece.offset,
                bytes: piece.discarded_bytes,
            })
    }
}

impl RegionLayout {
    pub(super) fn span(&self, offset: u64, bytes: u64) -> HostSpan {
        HostSpan {
            start: self.host_start + to_usize(offset),
            bytes: to_usize(bytes),
        }
    }
}

fn requested(claims: &[GuestRange]) -> Extent {
    let mut requested = Extent::default();
    for claim in claims {
        requested.add(claim.bytes);
    }
    requested
}

/// Converts to `usize`: pieces are inside mappings of this process, so they fit.
fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a mapped length is an address")
}
