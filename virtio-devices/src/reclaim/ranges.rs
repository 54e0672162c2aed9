//! The pure half of the discard engine: converts claimed ranges to pieces that may be discarded.
//!
//! The rule, in terms of sets: intersect the union of all claimed bytes with each RAM region, and keep the backing
//! pages that are *completely* inside. A page that was released only in part still holds the guest's data. Merging
//! comes before trimming, so 512 adjacent 4 KiB claims free one 2 MiB page. A claim that crosses a region boundary is
//! served in both regions.

use std::ops::Range;

use device_facts::SkipReason;

use super::backing::{Backing, Expected, RegionLayout};
use crate::dma_mapped::MappedRanges;

/// A range of guest physical memory that is claimed to be free. It is not checked: it may be empty, wrap around or be
/// outside of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First guest physical address.
    pub start: u64,
    /// Length; zero claims nothing.
    pub bytes: u64,
}

/// Bytes not discarded, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SkippedBytes([u64; SkipReason::COUNT]);

impl SkippedBytes {
    /// Bytes skipped for `reason`.
    #[must_use]
    pub fn get(&self, reason: SkipReason) -> u64 {
        self.0[reason as usize]
    }

    /// Bytes skipped for any reason.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, b| sum.saturating_add(*b))
    }

    /// Every reason with its bytes, zeros included.
    pub fn iter(&self) -> impl Iterator<Item = (SkipReason, u64)> + '_ {
        SkipReason::ALL.iter().map(|r| (*r, self.get(*r)))
    }

    /// Adds `bytes` for `reason`.
    pub fn add(&mut self, reason: SkipReason, bytes: u64) {
        let slot = &mut self.0[reason as usize];
        *slot = slot.saturating_add(bytes);
    }

    /// Adds the counts of `other`.
    pub fn add_all(&mut self, other: &Self) {
        for (reason, bytes) in other.iter() {
            self.add(reason, bytes);
        }
    }
}

/// Whole backing pages inside one region, ready to be discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Index of the region in the layout.
    pub(super) region: usize,
    /// Offset from the start of the region; a multiple of its page size.
    pub(super) offset: u64,
    /// Length; not zero, a multiple of the region's page size.
    pub(super) bytes: u64,
    /// The number of bytes that system calls have freed.
    pub(super) discarded_bytes: u64,
}

/// The smallest unit that a guest can release (virtio 1.2 §5.5.6: balloon pages are 4 KiB).
const GUEST_PAGE_BYTES: u64 = 4096;

/// Fills `pieces` with the parts of `claims` that may be discarded, and returns the skipped bytes by reason.
///
/// `claims` is sorted in place. `regions` must be in ascending order without overlaps, as in guest memory maps.
/// Invariant: Σ claims = Σ pieces + Σ skipped (saturating at `u64::MAX`).
pub(super) fn plan(
    regions: &[RegionLayout],
    claims: &mut [GuestRange],
    expected: Expected,
    pieces: &mut Vec<Piece>,
) -> SkippedBytes {
    pieces.clear();
    claims.sort_unstable_by_key(|claim| claim.start);
    let mut planner = Planner {
        regions,
        expected,
        first_region: 0,
        pieces,
        skipped: SkippedBytes::default(),
    };
    let mut united: Option<(u64, u64)> = None;
    for claim in claims.iter().filter(|claim| claim.bytes > 0) {
        let end = claim.start.saturating_add(claim.bytes);
        // The part above the last address.
        planner
            .skipped
            .add(SkipReason::OutsideRam, claim.bytes - (end - claim.start));
        united = Some(match united {
            Some((start, known_end)) if claim.start <= known_end => {
                let again = known_end.min(end) - claim.start;
                planner.skipped.add(SkipReason::Duplicate, again);
                (start, known_end.max(end))
            }
            Some((start, known_end)) => {
                planner.place(start, known_end);
                (claim.start, end)
            }
            None => (claim.start, end),
        });
    }
    if let Some((start, end)) = united {
        planner.place(start, end);
    }
    planner.skipped
}

/// Takes the backing pages that devices can access, even in part, out of the pieces. Returns their bytes.
pub(super) fn leave_out(
    regions: &[RegionLayout],
    pieces: &mut Vec<Piece>,
    mapped: &MappedRanges,
) -> u64 {
    let mut left_out = 0;
    let cut = |piece: Piece| {
        let region = &regions[piece.region];
        let page = region.page_bytes;
        let end = piece.offset + piece.bytes;
        let mut left = Vec::new();
        let mut at = piece.offset;
        let mut keep = |from: u64, to: u64| {
            if from < to {
                left.push(Piece {
                    offset: from,
                    bytes: to - from,
                    ..piece
                });
            }
        };
        for part in mapped.within(region.guest_range(&piece)) {
            // The piece is whole pages, so these stay inside. A page can contain several parts.
            let first = (part.start - region.guest_start) / page * page;
            let last = (part.end - region.guest_start).next_multiple_of(page);
            keep(at, first);
            left_out += last - first.max(at);
            at = last;
        }
        keep(at, end);
        left
    };
    *pieces = std::mem::take(pieces).into_iter().flat_map(cut).collect();
    left_out
}

impl RegionLayout {
    /// The guest addresses of a piece of this region.
    pub(super) fn guest_range(&self, piece: &Piece) -> Range<u64> {
        let start = self.guest_start + piece.offset;
        start..start + piece.bytes
    }
}

/// One pass over the regions, in parallel with ascending ranges.
struct Planner<'a> {
    regions: &'a [RegionLayout],
    expected: Expected,
    /// Regions before this one end before all further ranges.
    first_region: usize,
    pieces: &'a mut Vec<Piece>,
    skipped: SkippedBytes,
}

impl Planner<'_> {
    /// Places `[start, end)`, which must begin after all ranges placed before.
    fn place(&mut self, start: u64, end: u64) {
        while self
            .regions
            .get(self.first_region)
            .is_some_and(|region| region.guest_end() <= start)
        {
            self.first_region += 1;
        }
        let mut outside = end - start;
        for (at, region) in self.regions.iter().enumerate().skip(self.first_region) {
            if region.guest_start >= end {
                break;
            }
            let low = start.max(region.guest_start);
            let high = end.min(region.guest_end());
            outside -= high - low;
            self.cut(at, low - region.guest_start, high - region.guest_start);
        }
        self.skipped.add(SkipReason::OutsideRam, outside);
    }

    /// Trims `[low, high)` of a region, in offsets, to whole backing pages.
    fn cut(&mut self, at: usize, low: u64, high: u64) {
        let region = &self.regions[at];
        let wrong_backing = match region.backing {
            Backing::PrivateFile if self.expected == Expected::Zeros => {
                Some(SkipReason::PrivateFile)
            }
            Backing::Unsupported => Some(SkipReason::UnsupportedBacking),
            Backing::PrivateFile | Backing::AnonymousPrivate | Backing::SharedFile { .. } => None,
        };
        if let Some(reason) = wrong_backing {
            self.skipped.add(reason, high - low);
            return;
        }
        let Some((low, high)) = self.align(low, high, GUEST_PAGE_BYTES, SkipReason::Unaligned)
        else {
            return;
        };
        let Some((low, high)) =
            self.align(low, high, region.page_bytes, SkipReason::BackingPageLarger)
        else {
            return;
        };
        self.pieces.push(Piece {
            region: at,
            offset: low,
            bytes: high - low,
            discarded_bytes: 0,
        });
    }

    /// The whole pages in `[low, high)`; the remainder is counted for `reason`.
    fn align(
        &mut self,
        low: u64,
        high: u64,
        page_bytes: u64,
        reason: SkipReason,
    ) -> Option<(u64, u64)> {
        // Page sizes are powers of two: a mask is practically free, while two divisions per page of an inflation took
        // longer than the rest of the planner.
        let inside = page_bytes - 1;
        let first = low.checked_add(inside).map_or(u64::MAX, |at| at & !inside);
        let last = high & !inside;
        if first >= last {
            self.skipped.add(reason, high - low);
            return None;
        }
        self.skipped.add(reason, (high - low) - (last - first));
        Some((first, last))
    }
}
