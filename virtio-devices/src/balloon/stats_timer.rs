//! The timer that requests statistics.
//!
//! Only the worker uses it. The worker rearms it after each expiry, which also makes its descriptor unreadable again.
//! Reading the descriptor instead could block, because the expiry may have been cancelled in the meantime.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

/// Maximum interval: one year, far below the timer's limit.
const POLL_MS_MAX: u64 = 365 * 24 * 60 * 60 * 1000;

#[derive(Debug)]
pub(super) struct StatsTimer {
    timer: TimerFd,
    poll_ms: u64,
}

impl StatsTimer {
    /// Creates a stopped timer.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            timer: TimerFd::new()?,
            poll_ms: 0,
        })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Sets a new interval; an unchanged one leaves the timer running.
    pub(super) fn set(&mut self, poll_ms: u64) {
        if self.poll_ms != poll_ms {
            self.poll_ms = poll_ms;
            self.restart();
        }
    }

    /// Starts another interval, or stops if the interval is zero.
    pub(super) fn restart(&mut self) {
        let done = match self.poll_ms.min(POLL_MS_MAX) {
            0 => self.timer.clear(),
            poll_ms => self.timer.reset(Duration::from_millis(poll_ms), None),
        };
        if let Err(e) = done {
            // Neither call can fail on a timer with a valid time.
            log::error!("balloon: statistics timer: {e}");
        }
    }
}
