//! Measures how much callable memory guests take simultaneously.
//!
//! Each entry is the growth of resident memory in one window, summed over the VMs of one host. Unlike averages, the sum
//! shows VMs that burst together. The counts are halved regularly, so that old peaks lose their weight.

use serde::{Deserialize, Serialize};

use super::Bytes;

/// Four buckets per power of two from 1 MiB up, so an upper bound is at most a quarter too high.
const BUCKETS_PER_OCTAVE: u32 = 4;
/// All growth below this is in one bucket.
const SMALLEST: u64 = 1 << 20;
/// 1 MiB · 2^24 = 16 TiB is the largest growth with its own bucket.
const BUCKETS: usize = 24 * BUCKETS_PER_OCTAVE as usize + 1;
/// Entries after which all counts are halved: about three hours of windows of ten seconds.
const HALVING: u32 = 1024;

/// A histogram of growth per window with a fixed size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BurstHistogram {
    counts: Vec<u32>,
    total: u32,
}

impl BurstHistogram {
    /// Number of windows that count, after halving.
    pub fn windows(&self) -> u32 {
        self.total
    }

    /// Counts one window in which guests grew by `growth`.
    pub fn record(&mut self, growth: Bytes) {
        let bucket = bucket_of(growth);
        if self.counts.len() <= bucket {
            // Buckets are created as needed: most of ten thousand hosts in a simulation have short histograms.
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.total += 1;
        if self.total >= HALVING {
            for count in &mut self.counts {
                // Rounded down: a single event in so many windows is beyond any requested quantile, and rounded up it
                // would never disappear.
                *count /= 2;
            }
            self.total = self.counts.iter().sum();
        }
    }

    /// An upper bound of the growth that this fraction of the windows did not exceed. `None` before the first window.
    pub fn quantile(&self, quantile: f64) -> Option<Bytes> {
        let wanted = (f64::from(self.total) * quantile).ceil() as u32;
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted.max(1) {
                return Some(upper_bound(bucket));
            }
        }
        None
    }
}

fn bucket_of(growth: Bytes) -> usize {
    if growth.0 == 0 {
        return 0;
    }
    let octave = (growth.0.max(SMALLEST) / SMALLEST).ilog2();
    // The two bits below the leading one select the quarter of the octave.
    let quarter = (growth.0.max(SMALLEST) >> (octave + SMALLEST.ilog2() - 2)) & 3;
    (1 + octave as usize * BUCKETS_PER_OCTAVE as usize + quarter as usize).min(BUCKETS - 1)
}

fn upper_bound(bucket: usize) -> Bytes {
    if bucket == 0 {
        return Bytes::ZERO;
    }
    let (octave, quarter) = ((bucket - 1) / 4, (bucket - 1) % 4);
    Bytes((SMALLEST << octave) / 4 * (5 + quarter as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantile_without_windows_is_unknown() {
        assert_eq!(BurstHistogram::default().quantile(0.99), None);
    }

    #[test]
    fn quantile_is_an_upper_bound_at_most_a_quarter_too_high() {
        for mib in [1, 2, 3, 5, 17, 100, 1000, 123_456] {
            let mut histogram = BurstHistogram::default();
            histogram.record(Bytes::mib(mib));
            let bound = histogram.quantile(0.99).unwrap();
            assert!(bound > Bytes::mib(mib), "{mib} MiB: {bound}");
            assert!(bound <= Bytes::mib(mib).scale(1.25), "{mib} MiB: {bound}");
        }
    }

    #[test]
    fn quantile_tells_the_rare_from_the_common() {
        let mut histogram = BurstHistogram::default();
        (0..98).for_each(|_| histogram.record(Bytes::ZERO));
        (0..2).for_each(|_| histogram.record(Bytes::gib(1)));
        assert_eq!(histogram.quantile(0.5), Some(Bytes::ZERO));
        assert!(histogram.quantile(0.99).unwrap() >= Bytes::gib(1));
    }

    #[test]
    fn histogram_forgets_a_burst_in_time() {
        let mut histogram = BurstHistogram::default();
        (0..20).for_each(|_| histogram.record(Bytes::gib(1)));
        (0..20 * HALVING).for_each(|_| histogram.record(Bytes::ZERO));
        assert_eq!(histogram.quantile(0.99), Some(Bytes::ZERO));
        assert!(histogram.windows() < HALVING);
    }
}
