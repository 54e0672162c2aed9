//! Human-readable sizes: `4096`, `512K`, `700M`, `2G`.

/// Parses a number with an optional binary suffix K, M, G or T into bytes.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.trim_end_matches(['b', 'B']).char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is no size"))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn size_with_suffix_is_binary() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("512K"), Ok(512 << 10));
        assert_eq!(parse("700M"), Ok(700 << 20));
        assert_eq!(parse("2g"), Ok(2 << 30));
    }

    #[test]
    fn size_without_digits_or_too_large_is_refused() {
        for text in ["", "M", "-1", "1.5G", "99999999999T"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
