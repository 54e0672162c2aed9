//! Repeatable contents: a word stream in which every word can be computed separately, so that any part can be checked
//! without the parts before it.

/// Word number `index` of the stream `seed` (the finaliser of SplitMix64). Two neighbouring words are never both zero,
/// so zeroed memory cannot pass.
pub(crate) fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `words`, of which the first is number `first` of the stream.
pub(crate) fn fill(words: &mut [u64], seed: u64, first: u64) {
    for (index, slot) in (first..).zip(words) {
        *slot = word(seed, index);
    }
}

/// The number of the first word that differs from the stream.
pub(crate) fn first_difference(words: &[u64], seed: u64, first: u64) -> Option<u64> {
    (first..)
        .zip(words)
        .find(|&(index, &found)| found != word(seed, index))
        .map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pattern_filled_in_parts_equals_whole() {
        let mut whole = [0; 64];
        fill(&mut whole, 7, 0);
        let mut part = [0; 32];
        fill(&mut part, 7, 32);
        assert_eq!(whole[32..], part);
        assert_eq!(first_difference(&part, 7, 32), None);
    }

    #[test]
    fn pattern_with_one_changed_word_is_found() {
        let mut words = [0; 64];
        fill(&mut words, 7, 100);
        words[9] ^= 1;
        assert_eq!(first_difference(&words, 7, 100), Some(109));
        assert_eq!(first_difference(&words[..9], 8, 100), Some(100));
    }
}
