//! Limits the rate at which a pass over RAM is sent while the machine runs.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use super::peer::Peer;

/// The rate of one pass, on all its connections.
pub(super) struct Pace<'a> {
    peer: &'a Peer,
    bytes_per_second_max: NonZeroU64,
    begun: Instant,
    /// Bytes sent before.
    before: u64,
}

impl<'a> Pace<'a> {
    /// A pass that begins now.
    pub(super) fn new(peer: &'a Peer, bytes_per_second_max: NonZeroU64) -> Self {
        Self {
            peer,
            bytes_per_second_max,
            begun: Instant::now(),
            before: peer.written(),
        }
    }

    /// Waits until more may be sent, or the migration ends.
    pub(super) fn wait(&self) {
        let sent = self.peer.written().saturating_sub(self.before);
        let due = self
            .begun
            .checked_add(time_for(sent, self.bytes_per_second_max));
        if let Some(due) = due {
            self.peer.wait_until(due);
        }
    }
}

fn time_for(bytes: u64, bytes_per_second: NonZeroU64) -> Duration {
    let ns = u128::from(bytes) * 1_000_000_000 / u128::from(bytes_per_second.get());
    Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn bytes_take_the_time_of_their_rate() {
        let rate = |rate| NonZeroU64::new(rate).unwrap();
        assert_eq!(time_for(0, rate(1 << 20)), Duration::ZERO);
        assert_eq!(
            time_for(10 << 20, rate(4 << 20)),
            Duration::from_millis(2500)
        );
        assert_eq!(time_for(u64::MAX, rate(1)), Duration::from_nanos(u64::MAX));
        assert_eq!(time_for(1, rate(u64::MAX)), Duration::ZERO);
    }
}
