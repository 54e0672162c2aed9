//! JSON in pure ASCII.
//!
//! Upstream's client reads a response in 256-byte blocks and decodes each block as UTF-8 separately. It panics at a
//! multi-byte character that spans two blocks. Every body the VMM sends is therefore written with `\uXXXX` escapes
//! instead of raw non-ASCII characters. Any JSON parser decodes them to the same strings.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::Formatter;

/// Serializes `value` as compact JSON that contains only ASCII bytes.
///
/// # Errors
/// The type's `Serialize` fails; those of this crate never do.
pub fn to_ascii_json<T: Serialize + ?Sized>(value: &T) -> serde_json::Result<String> {
    let mut bytes = Vec::with_capacity(256);
    value.serialize(&mut serde_json::Serializer::with_formatter(
        &mut bytes,
        AsciiFormatter,
    ))?;
    // ASCII is valid UTF-8, so the lossy conversion replaces nothing and avoids a second error path.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The compact formatter, with non-ASCII characters escaped.
struct AsciiFormatter;

impl Formatter for AsciiFormatter {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut units = [0u16; 2];
        for character in fragment.chars() {
            if character.is_ascii() {
                writer.write_all(&[character as u8])?;
                continue;
            }
            // A character outside the basic plane becomes a surrogate pair, as RFC 8259 section 7 requires.
            for unit in character.encode_utf16(&mut units) {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ascii_json_non_ascii_text_is_escaped_and_reads_back_equal() {
        let text = "gr\u{fc}n \u{20ac} \u{1f388} \"q\" \\ \n";
        let json = to_ascii_json(&vec![text]).unwrap();
        assert!(json.is_ascii(), "{json}");
        assert!(json.contains("\\ud83c\\udf88"), "{json}");
        assert_eq!(serde_json::from_str::<Vec<String>>(&json).unwrap(), [text]);
    }
}
