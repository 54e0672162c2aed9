//! Memory that a test has the guest allocate, touch, verify and free.

use crate::pattern;
use crate::sys::{HugePages, Mapping};

/// Words in a 4 KiB page: without a seed only the first word of each page is written.
const PAGE_WORDS: usize = 512;

/// What to allocate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wish {
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
    wish: Wish,
}

impl Region {
    /// Allocates and touches every page.
    pub(crate) fn new(wish: Wish) -> Result<Self, String> {
        let bytes = usize::try_from(wish.bytes).map_err(|_| "too large".to_string())?;
        if bytes == 0 {
            return Err("zero bytes".into());
        }
        let mut mapping = Mapping::new(bytes, wish.huge)
            .map_err(|error| format!("mapping {bytes} bytes: {error}"))?;
        let words = mapping.words_mut();
        match wish.seed {
            Some(seed) => pattern::fill(words, seed, 0),
            None => {
                for (page, words) in (0..).zip(words.chunks_mut(PAGE_WORDS)) {
                    words[0] = pattern::word(0, page);
                }
            }
        }
        Ok(Self { mapping, wish })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.wish.bytes
    }

    /// Checks what was written; the error tells the first wrong offset.
    pub(crate) fn verify(&self) -> Result<(), String> {
        let words = self.mapping.words();
        let wrong = match self.wish.seed {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn region_after_allocation_verifies() {
        for seed in [None, Some(3)] {
            let wish = Wish {
                bytes: 1 << 20,
                seed,
                huge: HugePages::Default,
            };
            let mut region = Region::new(wish).unwrap();
            region.verify().unwrap();
            region.mapping.words_mut()[PAGE_WORDS * 5] = 1;
            assert_eq!(region.verify().unwrap_err(), "wrong contents at byte 20480");
        }
    }

    #[test]
    fn region_of_no_bytes_is_refused() {
        let wish = Wish {
            bytes: 0,
            seed: None,
            huge: HugePages::Never,
        };
        assert!(Region::new(wish).is_err());
    }
}
