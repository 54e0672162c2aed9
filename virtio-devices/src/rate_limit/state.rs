//! Saved buckets. They are part of the state of a device.

use serde::{Deserialize, Serialize};
use state::Fields;

/// What is left in the buckets of a limiter; a bucket without a limit does not exist.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterState {
    /// Of the limit on bytes.
    pub bandwidth: Option<BucketState>,
    /// Of the limit on operations.
    pub ops: Option<BucketState>,
}

/// What is left in a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketState {
    /// Negative: owed.
    pub tokens: i64,
    /// Left of the one-time burst.
    pub burst: u64,
}

impl RateLimiterState {
    /// Adds the state of a limiter to the fields of a device that had none.
    pub(crate) fn add_none(fields: &mut Fields, name: &str) {
        let limits = ["bandwidth", "ops"];
        let none: Fields = limits
            .map(|limit| (limit.to_owned(), ().into()))
            .into_iter()
            .collect();
        fields.insert(name.to_owned(), none.into());
    }
}
