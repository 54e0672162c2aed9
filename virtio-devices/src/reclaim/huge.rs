//! Makes the kernel split transparent huge pages of which a part was discarded.
//!
//! The kernel unmaps the part immediately, so that residency falls. It frees the part only when it splits the huge
//! page, under memory pressure. Until then, no memory returns to the host, and pages that the guest touches again need
//! additional memory. Ageing one page of the rest makes the kernel split the huge page immediately (decision 21).

use super::backing::{Backing, RegionLayout};
use super::ranges::Piece;
use super::sys::HostSpan;

/// A transparent huge page of x86-64.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// The rests of huge pages that one batch has partly discarded.
#[derive(Debug, Default)]
pub(super) struct Remainders {
    /// Bytes discarded in blocks of which a rest may remain.
    pub(super) partial_bytes: u64,
    /// A page of the rest of each such block, in ascending order.
    pub(super) pages: Vec<HostSpan>,
    /// The last of these blocks.
    last: Option<usize>,
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
        let first = start - start % HUGE_PAGE_BYTES;
        let last = end - end % HUGE_PAGE_BYTES;
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

    fn remainders(ranges: &[(usize, usize)]) -> (u64, Vec<usize>) {
        let region = RegionLayout {
            guest_start: 0,
            bytes: 8 << 20,
            host_start: BASE,
            page_bytes: PAGE as u64,
            backing: Backing::AnonymousPrivate,
        };
        let pieces: Vec<_> = ranges
            .iter()
            .map(|(first, pages)| Piece {
                region: 0,
                offset: (first * PAGE) as u64,
                bytes: (pages * PAGE) as u64,
                discarded_bytes: (pages * PAGE) as u64,
            })
            .collect();
        let all = Remainders::of(&[region], &pieces);
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
}
