//! I/O rate limits of disks and network interfaces.

use serde::{Deserialize, Serialize};

use crate::options::{OptionError, Options};

/// Independent limits on bytes and on operations. The one type that refuses unknown fields, as upstream's does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Limit on bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Limit on operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A token bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct TokenBucket {
    /// Tokens the bucket holds.
    pub size: u64,
    /// Extra tokens that can be used once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket fills.
    pub refill_time: u64,
}

impl RateLimiterConfig {
    /// Reads the `bw_*` and `ops_*` keys of a device. `None` when neither limit is given in full: a bucket needs both
    /// its size and its refill time.
    pub(super) fn from_options(options: &Options) -> Result<Option<Self>, OptionError> {
        let bandwidth =
            TokenBucket::from_options(options, ["bw_size", "bw_one_time_burst", "bw_refill_time"])?;
        let ops = TokenBucket::from_options(
            options,
            ["ops_size", "ops_one_time_burst", "ops_refill_time"],
        )?;
        Ok((bandwidth.is_some() || ops.is_some()).then_some(Self { bandwidth, ops }))
    }
}

impl TokenBucket {
    fn from_options(
        options: &Options,
        keys: [&'static str; 3],
    ) -> Result<Option<Self>, OptionError> {
        let [size, one_time_burst, refill_time] = keys;
        let size = options.parsed(size)?;
        let one_time_burst = options.parsed(one_time_burst)?;
        let refill_time = options.parsed(refill_time)?;
        Ok(match (size, refill_time) {
            (Some(size), Some(refill_time)) => Some(Self {
                size,
                one_time_burst,
                refill_time,
            }),
            _ => None,
        })
    }
}
