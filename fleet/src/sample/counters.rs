//! Counts requests to VMMs by endpoint and result, with their durations.

use std::collections::BTreeMap;
use std::time::Duration;

use parking_lot::Mutex;

/// Upper bounds of the duration buckets, seconds.
pub const DURATION_BUCKETS_SECONDS: [f64; 9] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 0.5, 1.0];

/// Requests of one endpoint with one result.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RequestCount {
    /// Number of requests.
    pub count: u64,
    /// Their total duration, seconds.
    pub sum_seconds: f64,
    /// Number of requests with a duration of at most each of [`DURATION_BUCKETS_SECONDS`].
    pub buckets: [u64; DURATION_BUCKETS_SECONDS.len()],
}

/// Counts of all requests, shared by every VM's thread.
#[derive(Debug, Default)]
pub struct RequestCounters {
    // Locked only for a few additions, never during a request. Keys come from the code, so the map stays small.
    counts: Mutex<BTreeMap<(&'static str, &'static str), RequestCount>>,
}

impl RequestCounters {
    /// Counts one request; `failure` is a word for the error.
    pub(crate) fn record(
        &self,
        op: &'static str,
        failure: Option<&'static str>,
        duration: Duration,
    ) {
        let seconds = duration.as_secs_f64();
        let mut counts = self.counts.lock();
        let count = counts.entry((op, failure.unwrap_or("ok"))).or_default();
        count.count += 1;
        count.sum_seconds += seconds;
        for (bucket, bound) in count.buckets.iter_mut().zip(DURATION_BUCKETS_SECONDS) {
            *bucket += u64::from(seconds <= bound);
        }
    }

    /// All counts by endpoint and result.
    pub fn snapshot(&self) -> BTreeMap<(&'static str, &'static str), RequestCount> {
        self.counts.lock().clone()
    }
}
