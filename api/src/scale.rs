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
