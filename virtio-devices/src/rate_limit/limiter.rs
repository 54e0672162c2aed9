//! Rate limits shared by several queues, on bytes and on operations.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use state::{Part, StateError, require};

use super::bucket::{Bucket, BucketLimit, Level};
use super::state::{BucketState, RateLimiterState};
use crate::Unpoisoned;

/// Minimum wait. In that time a bucket gains at most its size, and a busy queue wakes up at most 1000 times per second.
const WAIT_MIN: Duration = Duration::from_millis(1);

/// Maximum wait before the buckets are checked again, far below the limit of a timer.
const WAIT_MAX: Duration = Duration::from_secs(60 * 60);

/// Limits on bytes and on operations. An absent limit is unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Limit on bytes of data.
    pub bandwidth: Option<BucketLimit>,
    /// Limit on requests or frames.
    pub ops: Option<BucketLimit>,
}

type Clock = Box<dyn Fn() -> Instant + Send + Sync>;

/// The limits of a disk, of several disks, or of one direction of a network device, with the remaining tokens.
pub struct RateLimiter {
    /// Whether any limit exists; without limits a request takes no lock.
    limited: AtomicBool,
    buckets: Mutex<Buckets>,
    clock: Clock,
}

#[derive(Debug, Default)]
struct Buckets {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
}

crate::debug_fields!(RateLimiter { buckets });

impl Default for RateLimiter {
    /// Without limits.
    fn default() -> Self {
        Self::new(RateLimits::default())
    }
}

impl RateLimiter {
    /// Full buckets.
    #[must_use]
    pub fn new(limits: RateLimits) -> Self {
        Self::with_clock(limits, Box::new(Instant::now))
    }

    pub(crate) fn with_clock(limits: RateLimits, clock: Clock) -> Self {
        let limiter = Self {
            limited: AtomicBool::new(false),
            buckets: Mutex::default(),
            clock,
        };
        limiter.set(limits);
        limiter
    }

    /// Replaces the limits; the new buckets are full. A queue that waits for tokens continues at its next resume.
    pub fn set(&self, limits: RateLimits) {
        let now = (self.clock)();
        let bucket = |limit: Option<BucketLimit>| limit.map(|limit| Bucket::new(limit, now));
        let buckets = Buckets {
            bandwidth: bucket(limits.bandwidth),
            ops: bucket(limits.ops),
        };
        self.limited
            .store(limits != RateLimits::default(), Ordering::Release);
        *self.buckets.lock().unpoisoned() = buckets;
    }

    /// Whether there is a limit.
    fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Acquire)
    }

    /// Time to wait before the next request may start; `None` if it may start now.
    pub(crate) fn wait(&self) -> Option<Duration> {
        if !self.is_limited() {
            return None;
        }
        let mut buckets = self.buckets.lock().unpoisoned();
        let now = (self.clock)();
        let wait = buckets.each().map(|bucket| bucket.wait(now)).max();
        wait.filter(|wait| !wait.is_zero())
            .map(|wait| wait.clamp(WAIT_MIN, WAIT_MAX))
    }

    /// Takes the tokens of a request that starts.
    pub(crate) fn charge(&self, bytes: u64) {
        self.take(bytes, 1);
    }

    /// Takes the tokens of bytes that a request has moved in addition.
    pub(crate) fn charge_bytes(&self, bytes: u64) {
        self.take(bytes, 0);
    }

    fn take(&self, bytes: u64, ops: u64) {
        if !self.is_limited() {
            return;
        }
        let mut buckets = self.buckets.lock().unpoisoned();
        let now = (self.clock)();
        if let Some(bucket) = &mut buckets.bandwidth {
            bucket.charge(now, bytes);
        }
        if let Some(bucket) = &mut buckets.ops {
            bucket.charge(now, ops);
        }
    }

    /// The levels of the buckets.
    pub(crate) fn state(&self) -> RateLimiterState {
        let mut buckets = self.buckets.lock().unpoisoned();
        let now = (self.clock)();
        let level = |bucket: &mut Bucket| {
            let Level { tokens, burst } = bucket.level(now);
            BucketState { tokens, burst }
        };
        RateLimiterState {
            bandwidth: buckets.bandwidth.as_mut().map(level),
            ops: buckets.ops.as_mut().map(level),
        }
    }

    /// Restores the levels of the buckets. Errors name `field` of `part`.
    ///
    /// # Errors
    /// A saved bucket does not exist or cannot have this level.
    pub(crate) fn restore(
        &self,
        state: &RateLimiterState,
        part: Part,
        field: &'static str,
    ) -> Result<(), StateError> {
        let mut buckets = self.buckets.lock().unpoisoned();
        let now = (self.clock)();
        let buckets = &mut *buckets;
        for (bucket, saved) in [
            (&mut buckets.bandwidth, state.bandwidth),
            (&mut buckets.ops, state.ops),
        ] {
            let Some(BucketState { tokens, burst }) = saved else {
                continue;
            };
            let level = Level { tokens, burst };
            let set = |bucket: &mut Bucket| bucket.set_level(level, now);
            let limit = bucket.as_ref().map(Bucket::limit);
            let held = bucket.as_mut().is_some_and(set);
            require(held, part, field, || match limit {
                Some(limit) => format!("has {level:?}, which a bucket of {limit:?} cannot hold"),
                None => "has a bucket for a limit that is not set".to_owned(),
            })?;
        }
        Ok(())
    }
}

impl Buckets {
    fn each(&mut self) -> impl Iterator<Item = &mut Bucket> {
        self.bandwidth.iter_mut().chain(&mut self.ops)
    }
}

#[cfg(test)]
pub(crate) mod mock {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    use super::{BucketLimit, RateLimiter, RateLimits};

    /// A clock that a test moves.
    #[derive(Clone, Debug, Default)]
    pub(crate) struct MockClock(Arc<AtomicU64>);

    impl MockClock {
        pub(crate) fn advance(&self, time: Duration) {
            self.0.fetch_add(time.as_millis() as u64, Ordering::SeqCst);
        }

        /// A limiter on this clock.
        pub(crate) fn limiter(&self, limits: RateLimits) -> Arc<RateLimiter> {
            let (clock, start) = (Arc::clone(&self.0), Instant::now());
            let now = move || start + Duration::from_millis(clock.load(Ordering::SeqCst));
            Arc::new(RateLimiter::with_clock(limits, Box::new(now)))
        }
    }

    /// `size` tokens per second.
    pub(crate) fn per_second(size: u64) -> Option<BucketLimit> {
        Some(BucketLimit {
            size,
            one_time_burst: 0,
            refill: Duration::from_secs(1),
        })
    }
}

#[cfg(test)]
mod tests {
    use state::parts;

    use super::mock::{MockClock, per_second};
    use super::*;

    #[test]
    fn request_waits_for_the_emptier_bucket() {
        let clock = MockClock::default();
        let limiter = clock.limiter(RateLimits {
            bandwidth: per_second(1000),
            ops: per_second(2),
        });
        assert_eq!(limiter.wait(), None);
        limiter.charge(1);
        limiter.charge(1);
        assert_eq!(limiter.wait(), Some(Duration::from_millis(500)), "ops");
        clock.advance(Duration::from_secs(1));
        limiter.charge(3000);
        assert_eq!(limiter.wait(), Some(Duration::from_millis(2001)), "bytes");
    }

    #[test]
    fn limits_change_and_vanish() {
        let clock = MockClock::default();
        let limiter = clock.limiter(RateLimits::default());
        limiter.charge(u64::MAX);
        assert_eq!(limiter.wait(), None);
        limiter.set(RateLimits {
            ops: per_second(1),
            ..RateLimits::default()
        });
        limiter.charge(0);
        assert!(limiter.wait().is_some());
        limiter.set(RateLimits::default());
        assert_eq!(limiter.wait(), None);
    }

    #[test]
    fn state_of_buckets_that_do_not_exist_is_refused() {
        let clock = MockClock::default();
        let limits = RateLimits {
            bandwidth: per_second(1000),
            ops: None,
        };
        let saved = clock.limiter(limits);
        saved.charge(5000);
        let state = saved.state();
        let restored = clock.limiter(limits);
        restored.restore(&state, parts::BLOCK, "limit").unwrap();
        assert_eq!(restored.wait(), saved.wait());
        assert_eq!(restored.state(), state);
        let without = clock.limiter(RateLimits::default());
        let error = without.restore(&state, parts::BLOCK, "limit").unwrap_err();
        assert!(
            error.to_string().contains("a limit that is not set"),
            "{error}"
        );
        let small = clock.limiter(RateLimits {
            bandwidth: per_second(1),
            ops: None,
        });
        let full = clock.limiter(limits).state();
        let error = small.restore(&full, parts::BLOCK, "limit").unwrap_err();
        assert!(error.to_string().contains("cannot hold"), "{error}");
    }
}
