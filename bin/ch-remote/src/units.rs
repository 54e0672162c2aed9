//! Formats numbers with units.

use api::scale_bytes;

/// `bytes` with a binary unit and three significant digits or more, `1.50 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
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

/// `us` microseconds in a suitable unit.
pub(crate) fn micros(us: u64) -> String {
    match us {
        ..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.2} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

/// Formats `ms` milliseconds as an age.
pub(crate) fn age(ms: u64) -> String {
    match ms {
        ..1_000 => format!("{ms} ms ago"),
        1_000..60_000 => format!("{:.1} s ago", ms as f64 / 1e3),
        _ => format!("{} min ago", ms / 60_000),
    }
}

/// `part` of `whole` in percent; 0 if both are 0.
pub(crate) fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 * 100.0 / whole as f64
    }
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
            assert_eq!(bytes(number), text);
        }
    }

    #[test]
    fn durations_are_shown_in_a_fitting_unit() {
        assert_eq!(
            (
                micros(999).as_str(),
                micros(1_500).as_str(),
                micros(2_000_000).as_str()
            ),
            ("999 µs", "1.50 ms", "2.00 s")
        );
        assert_eq!(
            (age(5).as_str(), age(1_500).as_str(), age(120_000).as_str()),
            ("5 ms ago", "1.5 s ago", "2 min ago")
        );
    }

    #[test]
    fn percent_of_nothing_is_nothing() {
        assert!((percent(1, 4) - 25.0).abs() < 1e-9);
        assert!(percent(0, 0).abs() < 1e-9);
    }
}
