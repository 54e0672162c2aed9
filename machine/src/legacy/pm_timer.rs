//! ACPI's power management timer: a free-running counter (ACPI 6.5 §4.8.3.3).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use state::{Part, State, parts};

use crate::bus::BusDevice;

const PM_TIMER_FREQUENCY_HZ: u128 = 3_579_545;
const NANOSECONDS_PER_SECOND: u128 = 1_000_000_000;

/// The saved state of the timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmTimerState {
    /// Time counted so far. Any value is possible, because the counter wraps.
    pub elapsed_ns: u64,
}

impl State for PmTimerState {
    const PART: Part = parts::PM_TIMER;
}

impl PmTimerState {
    /// The state after more time has passed.
    #[must_use]
    pub fn after(self, passed_ns: u64) -> Self {
        Self {
            elapsed_ns: self.elapsed_ns.wrapping_add(passed_ns),
        }
    }
}

/// A 32-bit counter at 3.579545 MHz.
#[derive(Debug)]
pub struct PmTimer {
    start: Instant,
    /// Added to the time since the start; wraps.
    offset_ns: AtomicU64,
}

impl Default for PmTimer {
    fn default() -> Self {
        Self::new()
    }
}

impl PmTimer {
    /// Starts counting.
    #[must_use]
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            offset_ns: AtomicU64::new(0),
        }
    }

    /// Continues from a saved state.
    pub fn restore(&self, state: PmTimerState) {
        let offset_ns = state.elapsed_ns.wrapping_sub(self.running_ns());
        self.offset_ns.store(offset_ns, Ordering::Relaxed);
    }

    /// The count so far; 2^64 ns are 584 years.
    pub fn state(&self) -> PmTimerState {
        let offset_ns = self.offset_ns.load(Ordering::Relaxed);
        PmTimerState {
            elapsed_ns: offset_ns.wrapping_add(self.running_ns()),
        }
    }

    fn running_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The counter's value after that time; it wraps every 20 minutes.
fn ticks(elapsed_ns: u128) -> u32 {
    (elapsed_ns * PM_TIMER_FREQUENCY_HZ / NANOSECONDS_PER_SECOND) as u32
}

impl BusDevice for PmTimer {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = ticks(u128::from(self.state().elapsed_ns)).to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timer_counts_at_its_frequency_and_wraps() {
        assert_eq!(ticks(0), 0);
        assert_eq!(ticks(1_000_000_000), 3_579_545);
        let wrap_ns = (1_u128 << 32) * NANOSECONDS_PER_SECOND / PM_TIMER_FREQUENCY_HZ;
        assert_eq!(ticks(wrap_ns), u32::MAX);
        assert_eq!(ticks(wrap_ns + 1_000), 3);
    }

    #[test]
    fn timer_counts_on_from_its_state() {
        const HOUR_NS: u64 = 3_600_000_000_000;
        let timer = PmTimer::new();
        timer.restore(PmTimerState {
            elapsed_ns: HOUR_NS,
        });
        let elapsed_ns = timer.state().elapsed_ns;
        assert!((HOUR_NS..2 * HOUR_NS).contains(&elapsed_ns), "{elapsed_ns}");
        let last = PmTimerState {
            elapsed_ns: u64::MAX,
        };
        assert_eq!(last.after(HOUR_NS).elapsed_ns, HOUR_NS - 1, "it wraps");
        timer.restore(last);
        timer.read(0, &mut [0; 4]);
    }

    #[test]
    fn timer_goes_on() {
        let timer = PmTimer::new();
        let read = || {
            let mut data = [0; 4];
            timer.read(0, &mut data);
            u32::from_le_bytes(data)
        };
        let first = read();
        while read() == first {}
        assert!(read() > first);
    }
}
