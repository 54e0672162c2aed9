//! A rate limit that counts the rejected attempts.

use std::time::{Duration, Instant};

use virtio_devices::rate_limit::{Bucket, BucketLimit};

/// A token bucket: up to a burst at once, then one token per refill interval.
#[derive(Debug)]
pub struct AttemptLimit {
    bucket: Bucket,
    left_out: u64,
}

impl AttemptLimit {
    /// A full bucket of `burst` tokens that gains one per `refill`.
    #[must_use]
    pub fn new(burst: u32, refill: Duration, now: Instant) -> Self {
        let limit = BucketLimit {
            size: burst.into(),
            one_time_burst: 0,
            refill: refill * burst,
        };
        Self {
            bucket: Bucket::new(limit, now),
            left_out: 0,
        }
    }

    /// Takes a token and returns the number of failed attempts since the last success. `None`: the bucket is empty, and
    /// this attempt is counted as failed.
    pub fn take(&mut self, now: Instant) -> Option<u64> {
        if !self.bucket.wait(now).is_zero() {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.bucket.charge(now, 1);
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
        let mut bucket = AttemptLimit::new(BURST, REFILL, start);
        for _ in 0..BURST {
            assert_eq!(bucket.take(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(bucket.take(start + REFILL / 2), None);
        }
        assert_eq!(bucket.take(start + REFILL), Some(1000));
        assert_eq!(bucket.take(start + REFILL), None);
        // Half an interval is carried over.
        assert_eq!(bucket.take(start + REFILL * 5 / 2), Some(1));
        assert_eq!(bucket.take(start + REFILL * 3), Some(0));
        // Even after a long pause, the bucket holds at most a burst.
        let later = start + REFILL * 10_000;
        let passed = (0..1000).filter(|_| bucket.take(later).is_some()).count();
        assert_eq!(passed, BURST as usize);
    }
}
