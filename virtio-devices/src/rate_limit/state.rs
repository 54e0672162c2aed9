//! Saved buckets, which are part of the state of a device.

use serde::{Deserialize, Serialize};
use state::Fields;

/// The levels of a limiter's buckets; absent for a bucket without a limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterState {
    /// The bucket of bytes.
    pub bandwidth: Option<BucketState>,
    /// The bucket of operations.
    pub ops: Option<BucketState>,
}

/// The level of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketState {
    /// Negative if tokens are owed.
    pub tokens: i64,
    /// Remaining tokens of the one-time burst.
    pub burst: u64,
}

impl RateLimiterState {
    /// Adds the state of a limiter to the fields of a device that was saved without one.
    pub(crate) fn add_none(fields: &mut Fields, name: &str) {
        let limits = ["bandwidth", "ops"];
        let none: Fields = limits
            .map(|limit| (limit.to_owned(), ().into()))
            .into_iter()
            .collect();
        fields.insert(name.to_owned(), none.into());
    }
}
