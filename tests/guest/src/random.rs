//! Random choices that are reproducible from their seed.

use crate::pattern;

/// A repeatable stream of choices.
pub(crate) struct Random {
    seed: u64,
    taken: u64,
}

impl Random {
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        Self {
            seed: pattern::word(seed, stream),
            taken: 0,
        }
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.taken += 1;
        pattern::word(self.seed, self.taken)
    }

    /// Less than `bound`, which is not zero.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        // The remainder fits: it is less than a usize.
        (self.next() % bound as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn choices_of_one_seed_repeat_and_those_of_two_streams_differ() {
        let some = |seed, stream| {
            let mut random = Random::new(seed, stream);
            [(); 8].map(|()| random.below(1000))
        };
        assert_eq!(some(7, 1), some(7, 1));
        assert_ne!(some(7, 1), some(7, 2));
        assert_ne!(some(7, 1), some(8, 1));
    }
}
