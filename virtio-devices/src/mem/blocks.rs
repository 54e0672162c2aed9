//! A bitmap of the plugged blocks.

use std::ops::Range;

const WORD_BITS: u64 = u64::BITS as u64;

/// The state of every block of a region.
#[derive(Debug)]
pub(super) struct Blocks {
    words: Vec<u64>,
    count: u64,
}

impl Blocks {
    /// `count` blocks, none of them plugged.
    pub(super) fn new(count: u64) -> Self {
        let words = usize::try_from(count.div_ceil(WORD_BITS))
            .expect("a region that this process maps has fewer blocks than it has addresses");
        Self {
            words: vec![0; words],
            count,
        }
    }

    fn is_plugged(&self, block: u64) -> bool {
        let (word, mask) = place(block);
        self.words[word] & mask != 0
    }

    /// The number of plugged blocks in this range, which must exist.
    pub(super) fn plugged_in(&self, blocks: Range<u64>) -> u64 {
        blocks.map(|block| u64::from(self.is_plugged(block))).sum()
    }

    /// Plugs or unplugs the blocks in this range, which must exist.
    pub(super) fn set(&mut self, blocks: Range<u64>, plugged: bool) {
        for block in blocks {
            let (word, mask) = place(block);
            if plugged {
                self.words[word] |= mask;
            } else {
                self.words[word] &= !mask;
            }
        }
    }

    /// The runs of plugged blocks, in order.
    pub(super) fn plugged_runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in (0..self.count).filter(|block| self.is_plugged(*block)) {
            match runs.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }
}

/// Word and mask of a block.
fn place(block: u64) -> (usize, u64) {
    let word = usize::try_from(block / WORD_BITS).expect("the block exists, so its word does");
    (word, 1 << (block % WORD_BITS))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_are_what_was_last_said_of_them(
            changes in proptest::collection::vec((0..200_u64, 0..70_u64, any::<bool>()), 0..40),
        ) {
            let mut blocks = Blocks::new(200);
            let mut model = [false; 200];
            for (start, length, plugged) in changes {
                let range = start..(start + length).min(200);
                blocks.set(range.clone(), plugged);
                model[start as usize..range.end as usize].fill(plugged);
                let expected = model[start as usize..range.end as usize].iter().filter(|it| **it);
                prop_assert_eq!(blocks.plugged_in(range), expected.count() as u64);
            }
            let runs = blocks.plugged_runs();
            let apart = runs.windows(2).all(|pair| pair[0].end < pair[1].start);
            prop_assert!(apart, "{:?}", runs);
            let plugged: Vec<u64> = runs.into_iter().flatten().collect();
            let expected = (0..200_u64).filter(|block| model[*block as usize]);
            prop_assert_eq!(plugged, expected.collect::<Vec<_>>());
        }
    }
}
