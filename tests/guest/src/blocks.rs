//! Finds the pages of a region that fill aligned blocks of the guest's physical memory
//! (`Documentation/admin-guide/mm/pagemap.rst`). Blocks of one size can then be freed while their neighbours stay.
//!
//! Free blocks merge with their buddies. To free blocks of 2 MiB but not of 4, the caller must know where its pages
//! are, and keep a page in each buddy.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

pub(crate) const PAGE_BYTES: u64 = 4096;
const ENTRY_BYTES: u64 = 8;
/// Bit 63: the page is in memory, and bits 0 to 54 are its frame number.
const PRESENT: u64 = 1 << 63;
const FRAME_BITS: u64 = (1 << 55) - 1;

/// Pages to return and to touch again.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Picked {
    /// Blocks of physical memory they fill.
    pub(crate) blocks: u64,
    /// Their numbers in the region, ascending, none adjacent.
    pub(crate) runs: Vec<Range<usize>>,
}

impl Picked {
    /// All pages of a region, wherever they are.
    pub(crate) fn all(pages: usize) -> Self {
        Self {
            blocks: 1,
            runs: std::iter::once(0..pages).collect(),
        }
    }

    /// Every other block of `block_bytes`: those with an even number that lie wholly in the
    /// region and whose buddy has a page there. `frames` has each page's frame number, or 0.
    pub(crate) fn every_other(frames: &[u64], block_bytes: u64) -> Result<Self, String> {
        if block_bytes < PAGE_BYTES || !block_bytes.is_power_of_two() {
            return Err(format!("no block has {block_bytes} bytes"));
        }
        let block_frames = block_bytes / PAGE_BYTES;
        let mut owned: Vec<(u64, usize)> = frames
            .iter()
            .enumerate()
            .filter(|(_, frame)| **frame != 0)
            .map(|(page, frame)| (*frame, page))
            .collect();
        if owned.is_empty() {
            return Err("the kernel does not tell where pages lie".into());
        }
        owned.sort_unstable();
        let groups: Vec<&[(u64, usize)]> = owned
            .chunk_by(|a, b| a.0 / block_frames == b.0 / block_frames)
            .collect();
        let mut pages = Vec::new();
        let mut blocks = 0;
        for pair in groups.windows(2) {
            let number = |group: &[(u64, usize)]| group[0].0 / block_frames;
            let whole = pair[0].len() as u64 == block_frames;
            if whole && number(pair[0]) % 2 == 0 && number(pair[1]) == number(pair[0]) + 1 {
                pages.extend(pair[0].iter().map(|(_, page)| *page));
                blocks += 1;
            }
        }
        pages.sort_unstable();
        let runs = pages
            .chunk_by(|a, b| a + 1 == *b)
            .map(|run| run[0]..run[0] + run.len())
            .collect();
        Ok(Self { blocks, runs })
    }

    /// Their size.
    pub(crate) fn bytes(&self) -> u64 {
        let pages: usize = self.runs.iter().map(ExactSizeIterator::len).sum();
        pages as u64 * PAGE_BYTES
    }
}

/// The frame number of each page from this address of the process on, 0 for one not in memory.
pub(crate) fn frames(address: usize, pages: usize) -> io::Result<Vec<u64>> {
    let map = File::open("/proc/self/pagemap")?;
    let mut bytes = vec![0; pages * ENTRY_BYTES as usize];
    map.read_exact_at(&mut bytes, address as u64 / PAGE_BYTES * ENTRY_BYTES)?;
    let (entries, _) = bytes.as_chunks::<{ ENTRY_BYTES as usize }>();
    let frame = |entry: u64| match entry & PRESENT {
        0 => 0,
        _ => entry & FRAME_BITS,
    };
    Ok(entries
        .iter()
        .map(|entry| frame(u64::from_ne_bytes(*entry)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picked(frames: &[u64], pages: u64) -> (u64, Vec<Range<usize>>) {
        let picked = Picked::every_other(frames, pages * PAGE_BYTES).unwrap();
        (picked.blocks, picked.runs)
    }

    #[test]
    fn picked_blocks_are_even_whole_and_have_a_buddy_that_stays() {
        // Blocks 4 to 7 of two frames each; the last has no buddy here.
        let frames = [8, 9, 10, 11, 12, 13, 14, 16, 17];
        assert_eq!(picked(&frames, 2), (2, vec![0..2, 4..6]));
        // Block 2 lacks a frame.
        assert_eq!(picked(&[4, 8, 10, 9, 11], 2), (1, vec![1..2, 3..4]));
        // Another process has the buddy.
        assert_eq!(picked(&[8, 9, 14, 15], 2), (0, vec![]));
    }

    #[test]
    fn picked_pages_in_any_order_make_runs_of_the_region() {
        // 8 to 11 are one block of four frames, scattered and in reverse order.
        let frames = [9, 8, 12, 0, 10, 11];
        assert_eq!(picked(&frames, 4), (1, vec![0..2, 4..6]));
        let picked = Picked::every_other(&frames, 4 * PAGE_BYTES).unwrap();
        assert_eq!(picked.bytes(), 4 * PAGE_BYTES);
    }

    #[test]
    fn picked_from_nothing_known_or_of_no_block_size_is_an_error() {
        assert!(Picked::every_other(&[0, 0], 2 * PAGE_BYTES).is_err());
        for bytes in [0, 2048, 3 * PAGE_BYTES] {
            assert!(Picked::every_other(&[1], bytes).is_err(), "{bytes}");
        }
    }

    #[test]
    fn frames_of_pages_not_touched_are_none() {
        let mapping = crate::sys::Mapping::new(1 << 20, crate::sys::HugePages::Never).unwrap();
        let address = mapping.words().as_ptr() as usize;
        assert_eq!(frames(address, 256).unwrap(), vec![0; 256]);
    }
}
