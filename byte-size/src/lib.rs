//! Reads and formats numbers of bytes with binary units.
//!
//! Every program reads sizes with [`parse_bytes`]: options, settings files, and the arguments of test programs. The crate
//! has no dependencies, so that programs in guests can use it.

use std::fmt;

/// Units in lower case, longest first, each with its power of two. `MB` is missing, because it can also mean 10^6.
const UNITS: [(&str, u32); 9] = [
    ("kib", 10),
    ("mib", 20),
    ("gib", 30),
    ("tib", 40),
    ("k", 10),
    ("m", 20),
    ("g", 30),
    ("t", 40),
    ("b", 0),
];
/// Decimal places that are read. One in 10^18 of the largest unit is far below a byte.
const DECIMALS: usize = 18;

/// Reasons why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// The text does not have the format.
    Format(String),
    /// The number exceeds 64 bits.
    TooLarge(String),
}

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format(text) => write!(
                f,
                "{text:?} is not a size; use a number of bytes, or one with the unit K, M, G, T, KiB, MiB, GiB or TiB, \
                 such as 512M or 1.5GiB"
            ),
            Self::TooLarge(text) => write!(f, "the size {text:?} does not fit in 64 bits"),
        }
    }
}

impl std::error::Error for SizeError {}

/// A number of bytes: decimal digits with an optional binary unit, `K` or `KiB` up to `T` or `TiB`, or `B`, in any case.
/// Before a unit, spaces and a decimal point are accepted; parts of a byte are dropped.
///
/// # Errors
/// [`SizeError`] if the text does not have this format or the number exceeds 64 bits.
pub fn parse_bytes(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    let malformed = || SizeError::Format(text.to_owned());
    let lower = text.to_ascii_lowercase();
    let (number, shift) = UNITS
        .iter()
        .find_map(|(unit, shift)| Some((lower.strip_suffix(unit)?.trim_end(), *shift)))
        .unwrap_or((&lower, 0));
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    let digits = || whole.bytes().chain(decimals.bytes());
    // The standard parser would accept a plus sign.
    if digits().next().is_none() || !digits().all(|digit| digit.is_ascii_digit()) {
        return Err(malformed());
    }
    // Without a unit, a decimal point is a mistake: there is no part of a byte.
    if shift == 0 && number.contains('.') {
        return Err(malformed());
    }
    let unit = 1 << shift;
    let whole = if whole.is_empty() { "0" } else { whole };
    let whole = whole.parse::<u64>().ok();
    whole
        .and_then(|whole| whole.checked_mul(unit))
        .and_then(|bytes| bytes.checked_add(part(decimals, unit)))
        .ok_or_else(|| SizeError::TooLarge(text.to_owned()))
}

/// The decimal places, as a part of `unit`.
fn part(decimals: &str, unit: u64) -> u64 {
    let (mut part, mut scale) = (0, 1);
    for digit in decimals.bytes().take(DECIMALS) {
        part = part * 10 + u128::from(digit - b'0');
        scale *= 10;
    }
    // Below `unit`, because the part is below the scale.
    (part * u128::from(unit) / scale) as u64
}

/// `bytes` in the smallest of `units` that leaves at most three digits before the decimal point after rounding, or in
/// the last unit. The first unit is the byte; each is 1024 times the previous one.
#[must_use]
pub fn scale_bytes<'a>(bytes: u64, units: &[&'a str]) -> (f64, &'a str) {
    let mut amount = bytes as f64;
    let mut unit = 0;
    while amount >= 999.5 && unit + 1 < units.len() {
        amount /= 1024.0;
        unit += 1;
    }
    (amount, units[unit])
}

/// `bytes` with a binary unit and three significant digits or more, `1.50 GiB`.
#[must_use]
pub fn format_bytes(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (amount, unit) = scale_bytes(bytes, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"]);
    let decimals = match amount {
        ..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{amount:.decimals$} {unit}")
}

/// The exact number of bytes in the syntax of options and files: in the largest of `units` that divides it. The first
/// unit is the byte; each is 1024 times the previous one.
#[must_use]
pub fn exact_bytes(bytes: u64, units: &[&str]) -> String {
    let mut amount = bytes;
    let mut unit = 0;
    while amount > 0 && amount.is_multiple_of(1024) && unit + 1 < units.len() {
        amount /= 1024;
        unit += 1;
    }
    format!("{amount}{}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_every_accepted_form() {
        for (text, bytes) in [
            ("0", 0),
            ("7", 7),
            ("7B", 7),
            ("7 b", 7),
            (" 4096 ", 4096),
            ("1K", 1 << 10),
            ("3M", 3 << 20),
            ("2G", 2 << 30),
            ("1T", 1 << 40),
            ("1k", 1 << 10),
            ("512m", 512 << 20),
            ("1g", 1 << 30),
            ("1KiB", 1 << 10),
            ("64MiB", 64 << 20),
            ("1GIB", 1 << 30),
            ("2tib", 2 << 40),
            ("512 MiB", 512 << 20),
            ("1.5GiB", 3 << 29),
            ("1.5 G", 3 << 29),
            ("4.5g", 9 << 29),
            (".5G", 1 << 29),
            ("1.G", 1 << 30),
            ("1.0001K", 1024),
            ("0.3G", 322_122_547),
            ("0.99999999999999999999T", (1 << 40) - 1),
            ("16777215.9999T", 18_446_744_073_599_600_453),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn text_that_is_not_a_size_is_rejected_with_the_accepted_forms() {
        for text in [
            "", "K", "KiB", "1Ki", "4ib", "1MB", "1GB", "1KiBiB", "1KKiB", "-1", "-1G", "+1",
            "0x10", "1.5", "1.5B", ".", ".G", "1.2.3G", "1e3G", "1,5G", "1KM", "G1", "1ſ", "1 2G",
            "4 apples",
        ] {
            assert_eq!(
                parse_bytes(text),
                Err(SizeError::Format(text.to_owned())),
                "{text}"
            );
        }
        let error = parse_bytes("12Q").map_err(|error| error.to_string());
        assert_eq!(
            error,
            Err(
                "\"12Q\" is not a size; use a number of bytes, or one with the unit K, M, G, T, KiB, MiB, GiB or TiB, \
                 such as 512M or 1.5GiB"
                    .to_owned()
            )
        );
    }

    #[test]
    fn size_above_64_bits_is_rejected() {
        for text in [
            "18446744073709551616",
            "18446744073709551615K",
            "16777216T",
            "16777216.0T",
            "99999999999999999999999G",
        ] {
            assert_eq!(
                parse_bytes(text),
                Err(SizeError::TooLarge(text.to_owned())),
                "{text}"
            );
        }
    }

    #[test]
    fn exact_size_reads_back() {
        for bytes in [0, 1, 1025, 64 << 20, 1536 << 20, 4 << 40, u64::MAX] {
            for units in [["", "K", "M", "G", "T"], ["B", "KiB", "MiB", "GiB", "TiB"]] {
                assert_eq!(parse_bytes(&exact_bytes(bytes, &units)), Ok(bytes));
            }
        }
    }

    #[test]
    fn bytes_are_shown_with_three_digits() {
        for (number, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536 << 20, "1.50 GiB"),
            (109 << 20, "109 MiB"),
            ((1 << 30) - 1, "1.00 GiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(format_bytes(number), text);
        }
    }

    #[test]
    fn exact_bytes_lose_nothing() {
        for (number, text) in [
            (0, "0"),
            (1, "1"),
            (1025, "1025"),
            (64 << 20, "64M"),
            (1536 << 20, "1536M"),
            (4 << 30, "4G"),
            (2048 << 30, "2048G"),
        ] {
            assert_eq!(exact_bytes(number, &["", "K", "M", "G"]), text);
        }
    }
}
