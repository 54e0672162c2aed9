//! Waits for a condition with a deadline, never for a fixed time.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Error, Result};

/// Polling interval: short compared with any wait, long compared with the cost of a check.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The condition was not met in time.
#[derive(Debug)]
pub struct TooLate {
    what: String,
    deadline: Duration,
}

impl TooLate {
    /// Whether this is why a wait failed, whatever context its error has.
    #[must_use]
    pub fn is_cause_of(error: &Error) -> bool {
        error.downcast_ref::<Self>().is_some()
    }
}

impl fmt::Display for TooLate {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{}: not within {} s",
            self.what,
            self.deadline.as_secs_f32()
        )
    }
}

impl std::error::Error for TooLate {}

/// Calls `condition` until it returns `Some`, for at most `deadline`.
///
/// # Errors
/// The condition failed, or the deadline passed ([`TooLate`]); `what` names it.
pub fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if start.elapsed() > deadline {
            return Err(TooLate {
                what: what.to_owned(),
                deadline,
            }
            .into());
        }
        std::thread::park_timeout(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};

    use super::*;

    #[test]
    fn deadline_is_told_from_other_failures() {
        let late = wait_for("rain", Duration::ZERO, || Ok(None::<()>));
        let late = late.context("the weather").unwrap_err();
        assert!(TooLate::is_cause_of(&late), "{late:#}");
        let failed = wait_for("rain", Duration::ZERO, || {
            Err::<Option<()>, _>(anyhow!("fog"))
        });
        assert!(!TooLate::is_cause_of(&failed.unwrap_err()));
    }
}
