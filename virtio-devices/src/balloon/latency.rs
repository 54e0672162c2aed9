//! A fixed-size latency histogram.
//!
//! The buckets are log-linear, eight per power of two. A few hundred counters thus resolve each value to within an
//! eighth, from 1 µs to over an hour.

/// Sub-buckets per power of two, as a power of two.
const SUB_BITS: u32 = 3;
const SUBS: usize = 1 << SUB_BITS;
/// Values of this size and above share the last bucket: 2³² µs is 71 minutes.
const VALUE_BITS: u32 = 32;
const BUCKETS: usize = SUBS * (VALUE_BITS - SUB_BITS + 1) as usize;

/// Counts of values in microseconds.
#[derive(Clone, Debug)]
pub struct LatencyHistogram {
    counts: [u64; BUCKETS],
    count: u64,
    max_us: u64,
}

/// A non-empty bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatencyBucket {
    /// Largest value of this bucket.
    pub le_us: u64,
    /// Number of values in this bucket.
    pub count: u64,
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self {
            counts: [0; BUCKETS],
            count: 0,
            max_us: 0,
        }
    }
}

impl LatencyHistogram {
    /// Counts one value.
    pub fn record(&mut self, value_us: u64) {
        self.counts[bucket_of(value_us)] += 1;
        self.count += 1;
        self.max_us = self.max_us.max(value_us);
    }

    /// Number of values counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The exact largest value.
    #[must_use]
    pub fn max_us(&self) -> u64 {
        self.max_us
    }

    /// A value that at least `percent` of all values do not exceed, at most an eighth too high. Zero if no value was
    /// counted.
    #[must_use]
    pub fn percentile_us(&self, percent: u64) -> u64 {
        let rank = (u128::from(self.count) * u128::from(percent)).div_ceil(100);
        let mut seen = 0_u128;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += u128::from(*count);
            if seen >= rank && seen > 0 {
                return last_value_of(bucket).min(self.max_us);
            }
        }
        0
    }

    /// The non-empty buckets, ascending.
    #[must_use]
    pub fn buckets(&self) -> Vec<LatencyBucket> {
        let used = self
            .counts
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0);
        used.map(|(bucket, count)| LatencyBucket {
            le_us: last_value_of(bucket),
            count: *count,
        })
        .collect()
    }
}

fn bucket_of(value: u64) -> usize {
    let value = value.min((1 << VALUE_BITS) - 1);
    // Below 2^SUB_BITS every value has its own bucket.
    let Some(shift) = value
        .checked_ilog2()
        .and_then(|log| log.checked_sub(SUB_BITS))
    else {
        return usize::try_from(value).expect("less than eight");
    };
    let sub = usize::try_from(value >> shift).expect("less than sixteen") - SUBS;
    (shift as usize + 1) * SUBS + sub
}

fn last_value_of(bucket: usize) -> u64 {
    let (group, sub) = (bucket / SUBS, (bucket % SUBS) as u64);
    if group == 0 {
        return sub;
    }
    ((SUBS as u64 + sub + 1) << (group - 1)) - 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn histogram_without_values_answers_zero() {
        let empty = LatencyHistogram::default();
        assert_eq!((empty.percentile_us(50), empty.max_us()), (0, 0));
        assert_eq!(empty.buckets(), []);
    }

    #[test]
    fn histogram_with_one_outlier_shows_it_in_max_only() {
        let mut histogram = LatencyHistogram::default();
        for _ in 0..999 {
            histogram.record(40);
        }
        histogram.record(1_000_000);
        assert!((40..=45).contains(&histogram.percentile_us(50)));
        assert!((40..=45).contains(&histogram.percentile_us(99)));
        assert_eq!(histogram.max_us(), 1_000_000);
        assert_eq!(histogram.percentile_us(100), 1_000_000);
    }

    proptest! {
        #[test]
        fn bucket_of_any_value_bounds_it_within_an_eighth(value in 0_u64..1 << VALUE_BITS) {
            let bucket = bucket_of(value);
            prop_assert!(bucket < BUCKETS);
            prop_assert!(value <= last_value_of(bucket));
            prop_assert!(last_value_of(bucket) - value <= value / SUBS as u64);
            if bucket > 0 {
                prop_assert!(last_value_of(bucket - 1) < value);
            }
        }
    }

    #[test]
    fn value_beyond_the_range_lands_in_the_last_bucket() {
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }
}
