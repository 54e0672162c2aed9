//! Waits for a condition with a deadline, never for a fixed time.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Polling interval: short compared with any wait, long compared with the cost of a check.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Calls `condition` until it returns `Some`, for at most `deadline`.
///
/// # Errors
/// The condition failed, or the deadline passed; `what` names it.
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
            bail!("{what}: not within {} s", deadline.as_secs_f32());
        }
        std::thread::park_timeout(POLL_INTERVAL);
    }
}
