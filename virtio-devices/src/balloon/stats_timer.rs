//! The timer that asks for statistics.
//!
//! Only the worker touches it. It is set anew after each expiry, which also makes
//! its descriptor unreadable again: reading it could block, as the expiry it
//! announced may have been undone since.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

/// Longest interval: a year, far from what a timer cannot hold.
const POLL_MS_MAX: u64 = 365 * 24 * 60 * 60 * 1000;

#[derive(Debug)]
pub(super) struct StatsTimer {
    timer: TimerFd,
    poll_ms: u64,
}

impl StatsTimer {
    /// Standing still.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            timer: TimerFd::new()?,
            poll_ms: 0,
        })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Takes up a new interval; one that is the same leaves the timer running.
    pub(super) fn set(&mut self, poll_ms: u64) {
        if self.poll_ms != poll_ms {
            self.poll_ms = poll_ms;
            self.restart();
        }
    }

    /// Runs for another interval, or stands still if that is zero.
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
