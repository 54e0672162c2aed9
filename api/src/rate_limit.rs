//! Body of `PUT /vm.update-rate-limiter`.

use api_macros::section;

use crate::config::{RATE_LIMIT_KEYS, RateLimiterConfig};

/// A new rate limit. It replaces the old one with full buckets; without a new limit, the old one is removed.
#[section(option = "update-rate-limiter", about = "New rate limit")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmUpdateRateLimiter {
    /// Name of a disk, a network interface or a rate limit group. Devices come first.
    #[key("<device_or_group_id>", required)]
    pub id: String,
    /// The limit; none when absent.
    #[key(group = RATE_LIMIT_KEYS)]
    pub rate_limiter_config: Option<RateLimiterConfig>,
}
