//! Numbers of bytes in a unit that people can read.

/// `bytes` in the smallest of `units` that leaves three digits before the point, rounding included, or else in the last.
/// Each unit is 1024 times the one before; the first is the byte.
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
