//! Formats numbers with units.

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
