//! The agent's clocks: a monotonic one for decisions, the wall clock for display.

use std::time::{Duration, Instant, SystemTime};

use rustix::time::{ClockId, clock_gettime};

use crate::reservations::Moment;

/// The planner's clock. It begins at 0 when the machine starts, so that what one agent learned is valid for the next
/// one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    zero: Instant,
    /// When the agent started.
    start: Instant,
    #[cfg(test)]
    script: Option<&'static script::ScriptedTime>,
}

impl Clock {
    pub(super) fn start() -> Self {
        let start = Instant::now();
        // The clock of `Instant` on Linux.
        let up = clock_gettime(ClockId::Monotonic);
        let up = Duration::new(up.tv_sec.unsigned_abs(), up.tv_nsec.unsigned_abs() as u32);
        Self {
            zero: start.checked_sub(up).unwrap_or(start),
            start,
            #[cfg(test)]
            script: None,
        }
    }

    pub(super) fn zero(self) -> Instant {
        self.zero
    }

    pub(super) fn now(self) -> Instant {
        #[cfg(test)]
        if let Some(script) = self.script {
            return script.now();
        }
        Instant::now()
    }

    pub(super) fn now_ms(self) -> u64 {
        let since = self.now().saturating_duration_since(self.zero);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    /// How long the agent has run, ms.
    pub(super) fn running_ms(self) -> u64 {
        let since = self.now().saturating_duration_since(self.start);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    /// The current time, for data that outlives the agent.
    pub(super) fn moment(self) -> Moment {
        #[cfg(test)]
        if let Some(script) = self.script {
            return script.moment();
        }
        let since_boot = clock_gettime(ClockId::Boottime);
        let ms =
            since_boot.tv_sec.unsigned_abs() * 1000 + since_boot.tv_nsec.unsigned_abs() / 1_000_000;
        Moment {
            ms,
            unix_ms: unix_ms(),
        }
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

#[cfg(test)]
pub(super) mod script {
    //! A clock that advances only when a test requests it, with a wall clock that can jump.

    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// One machine's time.
    #[derive(Debug)]
    pub(in crate::agent) struct ScriptedTime {
        origin: Instant,
        ms: AtomicU64,
        unix_ms: AtomicU64,
    }

    impl ScriptedTime {
        /// A machine that has just started. It exists as long as the process, as clocks do.
        pub(in crate::agent) fn begin() -> &'static Self {
            Box::leak(Box::new(Self {
                origin: Instant::now(),
                ms: AtomicU64::new(0),
                unix_ms: AtomicU64::new(1_700_000_000_000),
            }))
        }

        pub(in crate::agent) fn ms(&self) -> u64 {
            self.ms.load(Ordering::Relaxed)
        }

        pub(in crate::agent) fn pass(&self, ms: u64) {
            self.ms.fetch_add(ms, Ordering::Relaxed);
            self.unix_ms.fetch_add(ms, Ordering::Relaxed);
        }

        /// Moves only the wall clock.
        pub(in crate::agent) fn jump(&self, by_ms: i64) {
            let add = |unix_ms: u64| Some(unix_ms.saturating_add_signed(by_ms));
            // The closure always succeeds.
            let _ = self
                .unix_ms
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        }

        /// The clock of an agent that starts now.
        pub(in crate::agent) fn clock(&'static self) -> Clock {
            Clock {
                zero: self.origin,
                start: self.now(),
                script: Some(self),
            }
        }

        pub(super) fn now(&self) -> Instant {
            self.origin + Duration::from_millis(self.ms())
        }

        pub(super) fn moment(&self) -> Moment {
            Moment {
                ms: self.ms(),
                unix_ms: self.unix_ms.load(Ordering::Relaxed),
            }
        }
    }
}
