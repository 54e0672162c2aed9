//! The rate of this machine's time stamp counter, which emulated processors show as theirs.
#![allow(unsafe_code)]
// UNSAFETY: the counter is read by an intrinsic.

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// Long enough that reading both clocks, some microseconds apart at worst, changes the result by less than
/// [`STEP_KHZ`].
const WINDOW: Duration = Duration::from_millis(200);
/// Attempts to read both clocks without an interruption.
const ATTEMPTS: usize = 16;
/// The result is a multiple of this, so that it is the same each time; Linux tolerates 250 ppm.
const STEP_KHZ: u64 = 100;

/// The rate in kHz, measured for a fifth of a second.
pub(super) fn khz() -> u64 {
    let (begin, begin_ticks) = read();
    thread::sleep(WINDOW);
    let (end, end_ticks) = read();
    let ticks = u128::from(end_ticks.wrapping_sub(begin_ticks));
    let ns = (end - begin).as_nanos().max(1);
    let khz = u64::try_from(ticks * 1_000_000 / ns).unwrap_or(u64::MAX);
    khz.saturating_add(STEP_KHZ / 2) / STEP_KHZ * STEP_KHZ
}

/// Time and counter of the same moment.
fn read() -> (Instant, u64) {
    let tries = (0..ATTEMPTS).map(|_| {
        let before = Instant::now();
        // SAFETY: every processor that runs this program has the counter.
        let ticks = unsafe { _rdtsc() };
        (before.elapsed(), before, ticks)
    });
    let (_, time, ticks) = tries.min_by_key(|(took, ..)| *took).expect("some tries");
    (time, ticks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_that_of_a_processor_and_the_same_each_time() {
        let (first, second) = (khz(), khz());
        assert!((500_000..10_000_000).contains(&first), "{first}");
        assert!(first.abs_diff(second) <= 2 * STEP_KHZ, "{first} {second}");
    }
}
