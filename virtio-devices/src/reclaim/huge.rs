//! Transparent huge pages of which a part was discarded.
//!
//! The kernel unmaps the part at once, so that residency falls, but frees it only when it splits the huge page: under
//! memory pressure. Until then, the host gets no memory back, and pages that the guest touches again need additional
//! memory. Ageing one page of the rest makes the kernel split the huge page at once (decision 21).

use std::time::{Duration, Instant};

use super::backing::{Backing, RegionLayout};
use super::ranges::Piece;
use super::sys::HostSpan;

/// A transparent huge page of x86-64.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Time in which a block that was split stays so. khugepaged visits a page about every ten seconds, and a page fault makes
/// no huge page in a block that has other pages.
const STAYS_SPLIT: Duration = Duration::from_millis(100);
/// Blocks of one batch that are remembered. An inflation takes its pages from few blocks at a time.
const REMEMBERED_MAX: usize = 16;

/// The rests of huge pages that one batch has partly discarded.
#[derive(Debug, Default)]
pub(super) struct Remainders {
    /// Bytes discarded in blocks of which a rest may remain.
    pub(super) partial_bytes: u64,
    /// A page of the rest of each such block, in ascending order.
    pub(super) pages: Vec<HostSpan>,
    /// The last of these blocks.
    last: Option<usize>,
    /// A block was discarded completely, so that the guest's next access may make a huge page there.
    has_whole_block: bool,
}

/// The blocks that were split a moment ago, so that the batches of an inflation split each block once.
#[derive(Debug, Default)]
pub(super) struct RecentSplits {
    blocks: Vec<usize>,
    until: Option<Instant>,
}

impl RecentSplits {
    /// Leaves the pages whose blocks may still be huge pages.
    pub(super) fn leave_others(&mut self, remainders: &mut Remainders, now: Instant) {
        if remainders.has_whole_block || self.until.is_none_or(|until| until <= now) {
            self.blocks.clear();
            self.until = Some(now + STAYS_SPLIT);
        }
        let is_new = |page: &HostSpan| !self.blocks.contains(&block_of(page.start));
        remainders.pages.retain(is_new);
    }

    /// Records that these blocks were split.
    pub(super) fn add(&mut self, pages: &[HostSpan]) {
        let room = REMEMBERED_MAX.saturating_sub(self.blocks.len());
        let blocks = pages.iter().map(|page| block_of(page.start));
        self.blocks.extend(blocks.take(room));
    }
}

/// Start of the block with this address.
fn block_of(address: usize) -> usize {
    address - address % HUGE_PAGE_BYTES
}

impl Remainders {
    /// Finds the rests for the discarded pieces, which are merged and in ascending order.
    pub(super) fn of(regions: &[RegionLayout], pieces: &[Piece]) -> Self {
        let mut all = Self::default();
        for piece in pieces.iter().filter(|piece| piece.discarded_bytes > 0) {
            let region = &regions[piece.region];
            if region.backing == Backing::AnonymousPrivate {
                all.add(region, region.span(piece.offset, piece.discarded_bytes));
            }
        }
        all
    }

    fn add(&mut self, region: &RegionLayout, discarded: HostSpan) {
        let (start, end) = (discarded.start, discarded.start + discarded.bytes);
        let whole = region.span(0, region.bytes);
        let page_bytes = usize::try_from(region.page_bytes).unwrap_or(usize::MAX);
        let (first, last) = (block_of(start), block_of(end));
        self.has_whole_block |= start.next_multiple_of(HUGE_PAGE_BYTES) < last;
        // The page before it in its first block, the page after it in its last.
        let before = (start > first && start > whole.start).then(|| (first, start - page_bytes));
        let after = (end > last && end < whole.start + whole.bytes).then_some((last, end));
        let mut partial = 0;
        if before.is_some() {
            partial += end.min(first + HUGE_PAGE_BYTES) - start;
        }
        if after.is_some() && !(before.is_some() && first == last) {
            partial += end - start.max(last);
        }
        self.partial_bytes += partial as u64;
        for (block, page) in [before, after].into_iter().flatten() {
            if self.last != Some(block) {
                self.last = Some(block);
                self.pages.push(HostSpan {
                    start: page,
                    bytes: page_bytes,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: usize = 1 << 30;
    const PAGE: usize = 4096;

    fn region() -> RegionLayout {
        RegionLayout {
            guest_start: 0,
            bytes: 8 << 20,
            host_start: BASE,
            page_bytes: PAGE as u64,
            backing: Backing::AnonymousPrivate,
        }
    }

    /// Discarded pieces: their first pages and their numbers of pages.
    fn pieces(ranges: &[(usize, usize)]) -> Vec<Piece> {
        let piece = |(first, pages): &(usize, usize)| Piece {
            region: 0,
            offset: (first * PAGE) as u64,
            bytes: (pages * PAGE) as u64,
            discarded_bytes: (pages * PAGE) as u64,
        };
        ranges.iter().map(piece).collect()
    }

    fn remainders(ranges: &[(usize, usize)]) -> (u64, Vec<usize>) {
        let all = Remainders::of(&[region()], &pieces(ranges));
        let pages = all.pages.iter().map(|span| (span.start - BASE) / PAGE);
        (all.partial_bytes / PAGE as u64, pages.collect())
    }

    #[test]
    fn each_block_that_is_left_in_part_has_one_page_of_the_rest() {
        for (ranges, partial, pages) in [
            // Whole blocks leave nothing.
            (&[(0, 512)][..], 0, &[][..]),
            (&[(512, 1024)], 0, &[]),
            // At the beginning, in the middle and at the end of a block.
            (&[(512, 1)], 1, &[513]),
            (&[(600, 10)], 10, &[599]),
            (&[(1023, 1)], 1, &[1022]),
            // Across blocks: the first one and the last one in part, one between them whole.
            (&[(500, 600)], 12 + 76, &[499, 1100]),
            (&[(500, 524)], 12, &[499]),
            (&[(512, 600)], 88, &[1112]),
            // One page for a block, however often.
            (&[(1, 1), (3, 1), (510, 4)], 1 + 1 + 2 + 2, &[0, 514]),
            // Nothing lies before and behind the region.
            (&[(0, 2048)], 0, &[]),
        ] {
            assert_eq!(remainders(ranges), (partial, pages.to_vec()), "{ranges:?}");
        }
    }

    #[test]
    fn block_is_split_once_in_a_moment() {
        let mut recent = RecentSplits::default();
        let start = Instant::now();
        let mut due = |ranges: &[(usize, usize)], ms| {
            let region = region();
            let mut all = Remainders::of(&[region], &pieces(ranges));
            recent.leave_others(&mut all, start + Duration::from_millis(ms));
            recent.add(&all.pages);
            all.pages.len()
        };
        assert_eq!(due(&[(1, 1), (600, 1)], 0), 2);
        assert_eq!(due(&[(3, 1), (602, 1), (1100, 1)], 1), 1);
        assert_eq!(due(&[(5, 1), (1102, 1)], 99), 0);
        assert_eq!(due(&[(7, 1)], 100), 1, "khugepaged may have been there");
        assert_eq!(
            due(&[(512, 512), (1104, 1)], 101),
            1,
            "another block is whole"
        );
        assert_eq!(due(&[(9, 1)], 102), 1);
    }

    #[test]
    fn blocks_beyond_those_that_are_remembered_are_split_again() {
        let blocks = REMEMBERED_MAX + 4;
        let page = |at: usize| HostSpan {
            start: BASE + at * HUGE_PAGE_BYTES,
            bytes: PAGE,
        };
        let pages: Vec<_> = (0..blocks).map(page).collect();
        let mut recent = RecentSplits::default();
        for expected in [blocks, 4] {
            let mut all = Remainders {
                pages: pages.clone(),
                ..Remainders::default()
            };
            recent.leave_others(&mut all, Instant::now());
            assert_eq!(all.pages.len(), expected);
            recent.add(&all.pages);
        }
    }
}
