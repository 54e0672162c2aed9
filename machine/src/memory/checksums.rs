//! Checksums of the pages of a chunk, one for each piece of 16 KiB, so that a page on demand does not wait until the whole
//! chunk has been read.

use state::Bytes;

use super::layout::PAGE_BYTES;

/// Pages of a piece; two pieces have a byte of the bitmap.
pub(super) const PIECE_PAGES: usize = 4;
pub(super) const PIECE_BYTES: usize = PIECE_PAGES * PAGE;
const PAGE: usize = PAGE_BYTES as usize;
const SUM_BYTES: usize = 4;

/// The pieces that have pages in the bitmap `pages`, in ascending order, and these pages: one bit each, the first in bit 0.
fn pieces(pages: &[u8]) -> impl Iterator<Item = (usize, u8)> {
    let halves = pages.iter().flat_map(|byte| [byte & 15, byte >> 4]);
    halves.enumerate().filter(|(_, bits)| *bits != 0)
}

/// The CRC-32 of the pages of each piece that has some, of 4 bytes each, least significant first. `data` returns the pages,
/// in ascending order.
pub(super) fn sums<'a>(pages: &[u8], mut data: impl FnMut(usize) -> &'a [u8]) -> Bytes {
    let sum = |(piece, bits)| {
        let mut crc = crc32fast::Hasher::new();
        for page in (0..PIECE_PAGES).filter(|page| bits & 1 << page != 0) {
            crc.update(data(piece * PIECE_PAGES + page));
        }
        crc.finalize().to_le_bytes()
    };
    Bytes(pieces(pages).flat_map(sum).collect())
}

/// Whether `sums` has as many as [`sums`] returns.
pub(super) fn fit(pages: &[u8], sums: &Bytes) -> bool {
    sums.0.len() == pieces(pages).count() * SUM_BYTES
}

/// The pages of `piece`, and their checksum; none if it has no pages.
pub(super) fn of_piece(pages: &[u8], sums: &Bytes, piece: usize) -> Option<(u8, u32)> {
    let mut all = pieces(pages).zip(sums.0.chunks_exact(SUM_BYTES));
    let ((_, bits), sum) = all.find(|((it, _), _)| *it == piece)?;
    Some((bits, u32::from_le_bytes(sum.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_piece_with_pages_has_a_checksum_of_them() {
        let data: Vec<u8> = (0..16 * PAGE).map(|at| (at / PAGE) as u8).collect();
        let page = |number: usize| &data[number * PAGE..(number + 1) * PAGE];
        // Pages 1 and 3, and page 15.
        let pages = [0b1010, 0b1000_0000];
        let sums = sums(&pages, page);
        let both = [page(1), page(3)].concat();
        assert!(fit(&pages, &sums));
        assert!(!fit(&[0b1010, 0], &sums));
        let piece = |number| of_piece(&pages, &sums, number);
        assert_eq!(piece(0), Some((0b1010, crc32fast::hash(&both))));
        assert_eq!(piece(3), Some((0b1000, crc32fast::hash(page(15)))));
        assert_eq!(piece(1), None);
        assert_eq!(piece(128), None);
    }
}
