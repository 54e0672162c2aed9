//! Reads sizes, and other numbers with the same suffixes.

/// Parses a number with an optional binary suffix.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    byte_size::parse_bytes(text).map_err(|error| error.to_string())
}
