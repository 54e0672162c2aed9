//! The deadline of one request.

use std::time::{Duration, Instant};

use super::error::ClientError;

/// The deadline of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    at: Instant,
    timeout: Duration,
}

impl Deadline {
    pub(super) fn after(timeout: Duration) -> Self {
        Self {
            at: Instant::now() + timeout,
            timeout,
        }
    }

    /// The remaining time, never zero, because a socket interprets a timeout of zero as no timeout.
    pub(super) fn remaining(self) -> Result<Duration, ClientError> {
        let left = self.at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Err(self.missed())
        } else {
            Ok(left)
        }
    }

    pub(super) fn missed(self) -> ClientError {
        ClientError::TimedOut {
            timeout: self.timeout,
        }
    }
}
