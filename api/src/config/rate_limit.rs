//! I/O rate limits of disks and network interfaces.

use api_macros::section;

use crate::options::{KeyGroup, Keys, OptionError, OptionValue, Options, ValueError, parse_bytes};

/// Independent limits on bytes and on operations. Unknown fields are refused, as upstream refuses them.
#[section]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Limit on bytes: those of reads and writes of a disk, or of each direction of a network interface.
    pub bandwidth: Option<TokenBucket>,
    /// Limit on operations: requests of a disk, or frames of each direction of a network interface.
    pub ops: Option<TokenBucket>,
}

/// A rate limit that several disks share.
#[section(option = "rate-limit-group", about = "Rate limit group parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateLimitGroupConfig {
    /// Name of the group, by which disks refer to it.
    #[key("<group_id>", required)]
    pub id: String,
    /// The limit that its disks share.
    #[key(group = RATE_LIMIT_KEYS)]
    pub rate_limiter_config: Option<RateLimiterConfig>,
}

/// A token bucket, refilled at a constant rate.
#[section]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    /// Tokens that the full bucket holds: bytes or operations that can pass in each `refill_time`. If 0, there is no
    /// limit.
    #[key(required)]
    pub size: u64,
    /// Tokens that can be used once, in addition to `size`; 0 when absent.
    pub one_time_burst: Option<u64>,
    /// Time in which an empty bucket fills completely, ms; at most a day. If 0, there is no limit.
    #[key(required)]
    pub refill_time: u64,
}

/// The `bw_*` and `ops_*` keys of a device.
pub(crate) const RATE_LIMIT_KEYS: RateLimitKeys = RateLimitKeys {
    bandwidth: BucketKeys {
        size: "bw_size",
        one_time_burst: "bw_one_time_burst",
        refill_time: "bw_refill_time",
        unit: "<bytes>",
        count: parse_bytes,
        #[cfg(test)]
        tokens: "Bytes",
        #[cfg(test)]
        note: "",
    },
    ops: BucketKeys {
        size: "ops_size",
        one_time_burst: "ops_one_time_burst",
        refill_time: "ops_refill_time",
        unit: "<io_ops>",
        count: u64::read,
        #[cfg(test)]
        tokens: "Operations",
        #[cfg(test)]
        note: " An operation is a request of a disk, or a frame of a network interface.",
    },
};

pub(crate) struct RateLimitKeys {
    bandwidth: BucketKeys,
    ops: BucketKeys,
}

struct BucketKeys {
    size: &'static str,
    one_time_burst: &'static str,
    refill_time: &'static str,
    unit: &'static str,
    /// Reads a number of tokens.
    count: fn(&str) -> Result<u64, ValueError>,
    /// The limited quantity, as the subject of a sentence.
    #[cfg(test)]
    tokens: &'static str,
    /// A sentence that explains them.
    #[cfg(test)]
    note: &'static str,
}

impl KeyGroup<Option<RateLimiterConfig>> for RateLimitKeys {
    fn declare(&self, keys: &mut Keys) {
        for bucket in [&self.bandwidth, &self.ops] {
            keys.shown(bucket.size, bucket.unit);
            keys.shown(bucket.one_time_burst, bucket.unit);
            keys.shown(bucket.refill_time, "<ms>");
        }
    }

    #[cfg(test)]
    fn meaning(&self, key: &str) -> Option<String> {
        let meanings = [&self.bandwidth, &self.ops].map(|bucket| bucket.meaning(key));
        meanings.into_iter().flatten().next()
    }

    /// `None` if neither limit is complete: a bucket needs both its size and its refill time.
    fn read(&self, options: &Options) -> Result<Option<RateLimiterConfig>, OptionError> {
        let bandwidth = self.bandwidth.read(options)?;
        let ops = self.ops.read(options)?;
        let given = bandwidth.is_some() || ops.is_some();
        Ok(given.then_some(RateLimiterConfig { bandwidth, ops }))
    }
}

impl BucketKeys {
    #[cfg(test)]
    fn meaning(&self, key: &str) -> Option<String> {
        let (size, refill_time) = (self.size, self.refill_time);
        let (tokens, note) = (self.tokens, self.note);
        if key == size {
            return Some(format!(
                "{tokens} that can pass in each `{refill_time}`.{note} Without it, or if it is 0, the rate is not limited."
            ));
        }
        if key == self.one_time_burst {
            return Some(format!(
                "{tokens} that can pass once, in addition to `{size}`.{note}"
            ));
        }
        (key == refill_time).then(|| {
            format!(
                "Time after which a used-up `{size}` is available again in full; at most a day. \
                 Without it, or if it is 0, the rate is not limited."
            )
        })
    }

    fn read(&self, options: &Options) -> Result<Option<TokenBucket>, OptionError> {
        let size = options.read(self.size, self.count)?;
        let one_time_burst = options.read(self.one_time_burst, self.count)?;
        let refill_time = options.get(self.refill_time)?;
        Ok(size
            .zip(refill_time)
            .map(|(size, refill_time)| TokenBucket {
                size,
                one_time_burst,
                refill_time,
            }))
    }
}
