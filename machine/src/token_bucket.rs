//! A rate limit that counts what exceeds it.

use std::time::{Duration, Instant};

/// A token bucket: up to a burst at once, then one token per refill interval.
#[derive(Debug)]
pub struct TokenBucket {
    burst: u32,
    refill: Duration,
    tokens: u32,
    /// When the last token was added.
    filled: Instant,
    left_out: u64,
}

impl TokenBucket {
    /// A full bucket of `burst` tokens that gains one per `refill`, which is at least a millisecond.
    #[must_use]
    pub fn new(burst: u32, refill: Duration, now: Instant) -> Self {
        Self {
            burst,
            refill,
            tokens: burst,
            filled: now,
            left_out: 0,
        }
    }

    /// Takes a token and returns the number of failed attempts since the last success. `None`: the bucket is empty, and
    /// this attempt is counted as failed.
    pub fn take(&mut self, now: Instant) -> Option<u64> {
        let passed = now.saturating_duration_since(self.filled).as_millis();
        let fresh = passed / self.refill.as_millis().max(1);
        let fresh = u32::try_from(fresh).unwrap_or(u32::MAX);
        if fresh >= self.burst - self.tokens {
            self.tokens = self.burst;
            self.filled = now;
        } else {
            self.tokens += fresh;
            self.filled += self.refill * fresh;
        }
        let Some(rest) = self.tokens.checked_sub(1) else {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        };
        self.tokens = rest;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_passes_a_burst_and_counts_what_it_leaves_out() {
        const BURST: u32 = 16;
        const REFILL: Duration = Duration::from_millis(250);
        let start = Instant::now();
        let mut bucket = TokenBucket::new(BURST, REFILL, start);
        for _ in 0..BURST {
            assert_eq!(bucket.take(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(bucket.take(start + REFILL / 2), None);
        }
        assert_eq!(bucket.take(start + REFILL), Some(1000));
        assert_eq!(bucket.take(start + REFILL), None);
        // Half an interval is not lost.
        assert_eq!(bucket.take(start + REFILL * 5 / 2), Some(1));
        assert_eq!(bucket.take(start + REFILL * 3), Some(0));
        // However long the pause, a burst is the limit.
        let later = start + REFILL * 10_000;
        let passed = (0..1000).filter(|_| bucket.take(later).is_some()).count();
        assert_eq!(passed, BURST as usize);
    }
}
