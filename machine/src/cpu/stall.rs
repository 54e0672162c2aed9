//! Detects a vCPU that waits endlessly for a page that the host cannot provide.
//!
//! A vCPU that accepts interrupts does not wait for a missing page in `KVM_RUN`: KVM has a kernel thread fetch the page (an
//! asynchronous page fault). If that fails, KVM ignores the failure and repeats the instruction. `KVM_RUN` then never
//! returns. Only KVM's counters show the stall: page faults keep starting, and none is resolved.

use std::time::{Duration, Instant};

use hypervisor::{FaultCounts, FaultStats};

/// Time between two looks at the counters.
pub const STALL_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Faults begun per interval, at least. An attempt takes microseconds; a page that is read from a disk or a network
/// needs a few attempts.
const TAKEN_MIN: u64 = 64;
/// At most one of so many is resolved: other tasks of the guest may continue.
const TAKEN_PER_RESOLVED_MIN: u64 = 16;
/// Intervals in a row. While a large range of RAM is being discarded or moved, faults are repeated, too.
const INTERVALS_MIN: u32 = 3;

/// Looks at one vCPU.
#[derive(Debug)]
pub(super) struct StallWatch {
    stats: FaultStats,
    seen: Seen,
}

#[derive(Debug, Default)]
struct Seen {
    last: Option<FaultCounts>,
    in_a_row: u32,
}

impl StallWatch {
    pub(super) fn new(stats: FaultStats) -> Self {
        Self {
            stats,
            seen: Seen::default(),
        }
    }

    /// Called once per interval: whether the vCPU makes no progress.
    pub(super) fn is_stalled(&mut self) -> bool {
        match self.stats.read() {
            Ok(counts) => self.seen.add(counts),
            Err(error) => {
                log::debug!("The page faults of a vCPU cannot be read: {error}");
                false
            }
        }
    }
}

impl Seen {
    fn add(&mut self, now: FaultCounts) -> bool {
        let last = self.last.replace(now).unwrap_or(now);
        let taken = now.taken.saturating_sub(last.taken);
        let resolved = now.resolved.saturating_sub(last.resolved);
        let futile = taken >= TAKEN_MIN && resolved.saturating_mul(TAKEN_PER_RESOLVED_MIN) <= taken;
        self.in_a_row = if futile { self.in_a_row + 1 } else { 0 };
        let stalled = self.in_a_row >= INTERVALS_MIN;
        if stalled {
            // After a pause, the host gets time again.
            self.in_a_row = 0;
        }
        stalled
    }
}

/// When the vCPUs are looked at.
#[derive(Debug, Default)]
pub(super) struct StallClock(Option<Instant>);

impl StallClock {
    /// Whether an interval has passed since this was last true.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let due = self
            .0
            .is_none_or(|last| now.saturating_duration_since(last) >= STALL_CHECK_INTERVAL);
        if due {
            self.0 = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The results of intervals with so many faults (taken, resolved).
    fn results(intervals: &[(u64, u64)]) -> Vec<bool> {
        let mut seen = Seen::default();
        let mut counts = FaultCounts {
            taken: 1_000_000,
            resolved: 5,
        };
        assert!(!seen.add(counts), "counts before the first look");
        let interval = |&(taken, resolved): &(u64, u64)| {
            counts.taken += taken;
            counts.resolved += resolved;
            seen.add(counts)
        };
        intervals.iter().map(interval).collect()
    }

    #[test]
    fn faults_without_result_are_a_stall_after_three_intervals() {
        let intervals = [(5000, 0), (64, 4), (9000, 100), (9000, 0)];
        assert_eq!(results(&intervals), [false, false, true, false]);
    }

    #[test]
    fn progress_is_no_stall() {
        // Idle; a guest that faults in its memory; a slow disk; one interval of repetitions.
        for interval in [(0, 0), (50_000, 50_000), (63, 0), (1600, 101)] {
            assert_eq!(results(&[interval; 5]), [false; 5], "{interval:?}");
        }
        let with_progress = [(5000, 0), (5000, 0), (5000, 400), (5000, 0), (5000, 0)];
        assert_eq!(results(&with_progress), [false; 5]);
    }

    #[test]
    fn clock_is_due_once_per_interval() {
        let start = Instant::now();
        let mut clock = StallClock::default();
        assert!(clock.is_due(start));
        assert!(!clock.is_due(start + STALL_CHECK_INTERVAL / 2));
        assert!(clock.is_due(start + STALL_CHECK_INTERVAL));
    }
}
