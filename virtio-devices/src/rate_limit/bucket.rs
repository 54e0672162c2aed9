//! A token bucket. The caller provides the time.

use std::time::{Duration, Instant};

/// Maximum time in which a bucket may fill: one day.
pub const REFILL_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Maximum number of owed tokens: the longest request (64 MiB) on each of the maximum number of queues (256).
pub(super) const DEBT_MAX: u64 = 1 << 34;

/// Size and refill time of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketLimit {
    /// Tokens that the bucket holds; at least one.
    pub size: u64,
    /// Extra tokens that are available once and are used before those of the bucket.
    pub one_time_burst: u64,
    /// Time in which an empty bucket fills: from 1 ms to [`REFILL_MAX`].
    pub refill: Duration,
}

/// The tokens in a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Level {
    /// Negative if tokens are owed.
    pub(super) tokens: i64,
    pub(super) burst: u64,
}

/// A token bucket in use.
#[derive(Debug)]
pub struct Bucket {
    limit: BucketLimit,
    /// In units of `1 / refill in ns` of a token, so that rounding loses nothing. A size below 2^64 times a refill time
    /// below 2^47 ns fits.
    credit: i128,
    burst: u64,
    /// The time at which `credit` was computed.
    at: Instant,
}

impl Bucket {
    /// A full bucket.
    #[must_use]
    pub fn new(limit: BucketLimit, now: Instant) -> Self {
        let limit = BucketLimit {
            size: limit.size.max(1),
            refill: limit.refill.clamp(Duration::from_millis(1), REFILL_MAX),
            ..limit
        };
        let mut bucket = Self {
            limit,
            credit: 0,
            burst: limit.one_time_burst,
            at: now,
        };
        bucket.credit = bucket.capacity();
        bucket
    }

    pub(super) fn limit(&self) -> BucketLimit {
        self.limit
    }

    /// The value of a token in units of `credit`.
    fn token(&self) -> i128 {
        // At most a day, see REFILL_MAX.
        self.limit.refill.as_nanos() as i128
    }

    fn capacity(&self) -> i128 {
        i128::from(self.limit.size) * self.token()
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        let elapsed = i128::try_from(elapsed.as_nanos()).unwrap_or(i128::MAX);
        let earned = elapsed.saturating_mul(i128::from(self.limit.size));
        self.credit = self.credit.saturating_add(earned).min(self.capacity());
    }

    /// Time until there is a token; zero if there is one.
    pub fn wait(&mut self, now: Instant) -> Duration {
        self.refill(now);
        let missing = self.token() - self.credit;
        if self.burst > 0 || missing <= 0 {
            return Duration::ZERO;
        }
        let nanos = missing.unsigned_abs().div_ceil(u128::from(self.limit.size));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes tokens, those of the burst first. Missing tokens become debt.
    pub fn charge(&mut self, now: Instant, tokens: u64) {
        self.refill(now);
        let of_burst = tokens.min(self.burst);
        self.burst -= of_burst;
        let cost = i128::from(tokens - of_burst) * self.token();
        let least = -(i128::from(DEBT_MAX) * self.token());
        self.credit = (self.credit - cost).max(least);
    }

    /// The level in whole tokens.
    pub(super) fn level(&mut self, now: Instant) -> Level {
        self.refill(now);
        let tokens = self.credit.div_euclid(self.token());
        Level {
            // Never below the maximum debt.
            tokens: i64::try_from(tokens).unwrap_or(i64::MAX),
            burst: self.burst,
        }
    }

    /// Sets the level. False if the bucket cannot have that level.
    pub(super) fn set_level(&mut self, level: Level, now: Instant) -> bool {
        let Level { tokens, burst } = level;
        let possible = -i128::from(DEBT_MAX)..=i128::from(self.limit.size);
        if burst > self.limit.one_time_burst || !possible.contains(&i128::from(tokens)) {
            return false;
        }
        self.credit = i128::from(tokens) * self.token();
        self.burst = burst;
        self.at = now;
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn bucket(size: u64, one_time_burst: u64, refill: Duration) -> (Bucket, Instant) {
        let limit = BucketLimit {
            size,
            one_time_burst,
            refill,
        };
        let start = Instant::now();
        (Bucket::new(limit, start), start)
    }

    /// Takes one token at a time while there is one.
    fn drain(bucket: &mut Bucket, now: Instant) -> u64 {
        let mut taken = 0;
        while bucket.wait(now).is_zero() {
            bucket.charge(now, 1);
            taken += 1;
        }
        taken
    }

    #[test]
    fn bucket_gives_what_it_holds_and_then_its_rate() {
        let (mut bucket, start) = bucket(10, 5, SECOND);
        assert_eq!(drain(&mut bucket, start), 15, "with the burst");
        assert_eq!(bucket.wait(start), SECOND / 10);
        assert_eq!(drain(&mut bucket, start + SECOND / 2), 5);
        assert_eq!(drain(&mut bucket, start + 100 * SECOND), 10, "no burst");
        // A clock that runs backwards adds no tokens.
        assert_eq!(drain(&mut bucket, start), 0);
    }

    #[test]
    fn request_longer_than_the_bucket_passes_and_is_paid_for_afterwards() {
        let (mut bucket, start) = bucket(1 << 20, 0, SECOND);
        assert!(bucket.wait(start).is_zero());
        bucket.charge(start, 64 << 20);
        let wait = bucket.wait(start);
        assert!(wait >= 63 * SECOND && wait < 64 * SECOND, "{wait:?}");
        assert!(bucket.wait(start + wait).is_zero());
        let almost = start + wait - Duration::from_nanos(1000);
        let (mut again, _) = self::bucket(1 << 20, 0, SECOND);
        again.charge(almost, u64::MAX);
        assert_eq!(again.level(almost).tokens, -(DEBT_MAX as i64), "a bound");
    }

    #[test]
    fn extreme_limits_neither_overflow_nor_stop_the_clock() {
        for size in [0, 1, u64::MAX] {
            for refill in [Duration::ZERO, Duration::MAX] {
                let (mut bucket, start) = bucket(size, u64::MAX, refill);
                bucket.charge(start, u64::MAX);
                bucket.charge(start, u64::MAX);
                assert!(!bucket.wait(start).is_zero());
                let owed = bucket.level(start).tokens;
                let later = bucket.level(start + REFILL_MAX).tokens;
                assert!(later > owed, "{size} {refill:?}: {owed} to {later}");
                bucket.wait(start + Duration::from_secs(1 << 40));
            }
        }
    }

    #[test]
    fn level_is_kept_and_an_impossible_one_is_refused() {
        let (mut saved, start) = bucket(10, 5, SECOND);
        saved.charge(start, 40);
        let level = saved.level(start);
        assert_eq!(
            level,
            Level {
                tokens: -25,
                burst: 0
            }
        );
        let (mut restored, _) = bucket(10, 5, SECOND);
        assert!(restored.set_level(level, start));
        assert_eq!(restored.wait(start), saved.wait(start));
        for (tokens, burst) in [(11, 0), (0, 6), (i64::MIN, 0), (i64::MAX, 0)] {
            assert!(!restored.set_level(Level { tokens, burst }, start));
        }
    }

    proptest! {
        /// For any requests, the amount passed before the last one never exceeds bucket, burst and refill.
        #[test]
        fn rate_holds_whatever_is_asked(
            size in 1_u64..10_000,
            burst in 0_u64..10_000,
            requests in prop::collection::vec((0_u64..20_000, 0_u64..3_000), 1..50),
        ) {
            let (mut bucket, start) = bucket(size, burst, SECOND);
            let (mut now, mut passed) = (start, 0_u64);
            for (tokens, idle_ms) in requests {
                now += Duration::from_millis(idle_ms);
                now += bucket.wait(now);
                let earned = (now - start).as_nanos() * u128::from(size) / SECOND.as_nanos();
                prop_assert!(u128::from(passed) <= earned + u128::from(size + burst));
                bucket.charge(now, tokens);
                passed += tokens;
            }
        }
    }
}
