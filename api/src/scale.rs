//! Formats numbers of bytes with a readable unit.

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
