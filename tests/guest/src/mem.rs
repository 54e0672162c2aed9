//! Allocates, touches, verifies and frees guest memory when a test requests it.
//!
//! Fresh memory must read as zeros. Memory with a seed is checked before it is filled, except for the one byte of each
//! page that is written first: a page that was only read need not be allocated, and would fault twice.

use std::ops::Range;

use crate::blocks::{self, PAGE_BYTES, Picked};
use crate::pattern;
use crate::sys::{HugePages, Mapping};

/// Words in a 4 KiB page: without a seed only the first word of each page is written.
const PAGE_WORDS: usize = 512;

/// The allocation to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allocation {
    pub(crate) bytes: u64,
    /// With a seed every word is filled; without, one word in each page, which is enough to
    /// make it resident and much quicker.
    pub(crate) seed: Option<u64>,
    pub(crate) huge: HugePages,
}

/// One allocation.
#[derive(Debug)]
pub(crate) struct Region {
    mapping: Mapping,
    allocation: Allocation,
    picked: Picked,
}

impl Region {
    /// Allocates and touches every page.
    pub(crate) fn new(allocation: Allocation) -> Result<Self, String> {
        let bytes = usize::try_from(allocation.bytes).map_err(|_| "too large".to_string())?;
        if bytes == 0 {
            return Err("zero bytes".into());
        }
        let mut mapping = Mapping::new(bytes, allocation.huge)
            .map_err(|error| format!("mapping {bytes} bytes: {error}"))?;
        let pages = 0..mapping.words().len() / PAGE_WORDS;
        fill_fresh(&mut mapping, pages, allocation.seed)?;
        Ok(Self {
            mapping,
            allocation,
            picked: Picked::default(),
        })
    }

    /// Chooses the memory that [`Region::give_back`] returns: every other block of this many bytes of physical memory,
    /// or all if `None`.
    pub(crate) fn pick(&mut self, block_bytes: Option<u64>) -> Result<&Picked, String> {
        let words = self.mapping.words();
        let pages = words.len() / PAGE_WORDS;
        self.picked = match block_bytes {
            None => Picked::all(pages),
            Some(block_bytes) => {
                let frames = blocks::frames(words.as_ptr() as usize, pages)
                    .map_err(|error| format!("/proc/self/pagemap: {error}"))?;
                Picked::every_other(&frames, block_bytes)?
            }
        };
        Ok(&self.picked)
    }

    /// Returns the picked memory to the kernel.
    pub(crate) fn give_back(&mut self) -> Result<u64, String> {
        for run in &self.picked.runs {
            let bytes = run.len() * PAGE_BYTES as usize;
            self.mapping
                .discard(run.start * PAGE_BYTES as usize, bytes)
                .map_err(|error| format!("giving back {bytes} bytes: {error}"))?;
        }
        Ok(self.picked.bytes())
    }

    /// Touches the returned memory, and writes its previous contents.
    pub(crate) fn refill(&mut self) -> Result<u64, String> {
        for run in &self.picked.runs {
            fill_fresh(&mut self.mapping, run.clone(), self.allocation.seed)?;
        }
        Ok(self.picked.bytes())
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.allocation.bytes
    }

    /// Where its first page is: in this process, and in the guest's physical memory.
    pub(crate) fn first_page(&self) -> Result<(usize, u64), String> {
        let address = self.mapping.words().as_ptr() as usize;
        let frames = blocks::frames(address, 1);
        let frames = frames.map_err(|error| format!("/proc/self/pagemap: {error}"))?;
        match frames.first() {
            Some(frame) if *frame != 0 => Ok((address, frame * PAGE_BYTES)),
            _ => Err("the page is not in memory".into()),
        }
    }

    /// The first word, which a device may have changed.
    pub(crate) fn first_word(&self) -> u64 {
        self.mapping.volatile_word()
    }

    /// Checks the contents; the error contains the first wrong offset.
    pub(crate) fn verify(&self) -> Result<(), String> {
        let words = self.mapping.words();
        let wrong = match self.allocation.seed {
            Some(seed) => pattern::first_difference(words, seed, 0),
            None => (0..)
                .zip(words.chunks(PAGE_WORDS))
                .find(|(page, words)| words[0] != pattern::word(0, *page))
                .map(|(page, _)| page * PAGE_WORDS as u64),
        };
        match wrong {
            Some(word) => Err(format!("wrong contents at byte {}", word * 8)),
            None => Ok(()),
        }
    }
}

/// Fills pages that were never written to, and checks that what it overwrites is zero.
fn fill_fresh(mapping: &mut Mapping, pages: Range<usize>, seed: Option<u64>) -> Result<(), String> {
    for page in pages {
        let first = page * PAGE_WORDS;
        let Some(seed) = seed else {
            mapping.words_mut()[first] = pattern::word(0, page as u64);
            continue;
        };
        // Another byte in another page and with another seed.
        let start = first * 8;
        let written = start + (page + usize::try_from(seed).unwrap_or(0)) % PAGE_BYTES as usize;
        mapping.write_byte(written, 0);
        let words = &mut mapping.words_mut()[first..first + PAGE_WORDS];
        if let Some(at) = words.iter().position(|word| *word != 0) {
            let (byte, value) = (start + at * 8, words[at]);
            return Err(format!("fresh memory reads {value:#x} at byte {byte}"));
        }
        pattern::fill(words, seed, first as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn region_after_allocation_verifies() {
        for seed in [None, Some(3)] {
            let allocation = Allocation {
                bytes: 1 << 20,
                seed,
                huge: HugePages::Default,
            };
            let mut region = Region::new(allocation).unwrap();
            region.verify().unwrap();
            region.mapping.words_mut()[PAGE_WORDS * 5] = 1;
            assert_eq!(region.verify().unwrap_err(), "wrong contents at byte 20480");
        }
    }

    #[test]
    fn region_given_back_is_empty_until_it_is_refilled() {
        for seed in [None, Some(3)] {
            let allocation = Allocation {
                bytes: 1 << 20,
                seed,
                huge: HugePages::Never,
            };
            let mut region = Region::new(allocation).unwrap();
            region.picked.runs = vec![3..5, 9..10];
            assert_eq!(region.give_back(), Ok(3 * PAGE_BYTES));
            assert_eq!(region.verify().unwrap_err(), "wrong contents at byte 12288");
            assert_eq!(region.refill(), Ok(3 * PAGE_BYTES));
            region.verify().unwrap();
        }
    }

    #[test]
    fn fresh_memory_that_is_not_zero_is_found() {
        for word in [PAGE_WORDS * 3 + 5, PAGE_WORDS * 3 + 511] {
            let mut mapping = Mapping::new(1 << 20, HugePages::Never).unwrap();
            mapping.words_mut()[word] = 0xab;
            fill_fresh(&mut mapping, 0..3, Some(3)).unwrap();
            let error = fill_fresh(&mut mapping, 3..4, Some(3)).unwrap_err();
            let wanted = format!("fresh memory reads 0xab at byte {}", word * 8);
            assert_eq!(error, wanted);
        }
    }

    #[test]
    fn region_of_no_bytes_is_refused() {
        let allocation = Allocation {
            bytes: 0,
            seed: None,
            huge: HugePages::Never,
        };
        assert!(Region::new(allocation).is_err());
    }
}
