//! The agent's clocks: a monotonic one for every decision, the wall clock for people.

use std::time::{Instant, SystemTime};

use rustix::time::{ClockId, clock_gettime};

use crate::reservations::Moment;

/// The planner's clock. It begins at 0 when the agent starts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    zero: Instant,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self {
            zero: Instant::now(),
        }
    }

    pub(super) fn zero(self) -> Instant {
        self.zero
    }

    pub(super) fn now_ms(self) -> u64 {
        u64::try_from(self.zero.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Now, for what outlives the agent.
pub(super) fn moment() -> Moment {
    let since_boot = clock_gettime(ClockId::Boottime);
    let ms =
        since_boot.tv_sec.unsigned_abs() * 1000 + since_boot.tv_nsec.unsigned_abs() / 1_000_000;
    Moment {
        ms,
        unix_ms: unix_ms(),
    }
}

/// Wall time, ms since the Unix epoch.
pub(super) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}
