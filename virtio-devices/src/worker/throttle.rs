//! A queue half that waits for the tokens of a rate limiter, with a timer and without busy waiting.
//!
//! ```text
//!            admits: no token, timer set
//!   free ─────────────────────────────────► waiting (takes no requests, does not watch the back end)
//!    ▲                                        │
//!    └──── release: timer, resume, reset ─────┘
//! ```

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::timerfd::TimerFd;

use crate::rate_limit::RateLimiter;

/// The limiter of a queue half, and its timer. The handler adds the timer to its event sources. When the timer wakes
/// the handler, and when it is resumed or reset, it calls [`Throttle::release`].
#[derive(Debug)]
pub(crate) struct Throttle {
    limiter: Arc<RateLimiter>,
    timer: TimerFd,
    waiting: bool,
}

impl Throttle {
    /// # Errors
    /// No descriptor is left.
    pub(crate) fn new(limiter: Arc<RateLimiter>) -> io::Result<Self> {
        Ok(Self {
            limiter,
            timer: TimerFd::new()?,
            waiting: false,
        })
    }

    /// Whether a request may start now. If not, the timer is started.
    pub(crate) fn admits(&mut self) -> bool {
        if self.waiting {
            return false;
        }
        let Some(wait) = self.limiter.wait() else {
            return true;
        };
        match self.timer.reset(wait, None) {
            Ok(()) => {
                self.waiting = true;
                false
            }
            // Cannot fail on a timer with a valid time. A device without its limit is better than one that hangs.
            Err(error) => {
                log::error!("timer of a rate limiter: {error}");
                true
            }
        }
    }

    /// Takes the tokens of a request of `bytes` that starts.
    pub(crate) fn charge(&self, bytes: u64) {
        self.limiter.charge(bytes);
    }

    /// Takes the tokens of bytes that a request has moved in addition.
    pub(crate) fn charge_bytes(&self, bytes: u64) {
        self.limiter.charge_bytes(bytes);
    }

    /// Whether the handler waits for the timer.
    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Ends the wait. The timer's descriptor is not readable afterwards.
    pub(crate) fn release(&mut self) {
        if std::mem::take(&mut self.waiting)
            && let Err(error) = self.timer.clear()
        {
            // As above.
            log::error!("timer of a rate limiter: {error}");
        }
    }
}

impl AsRawFd for Throttle {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
