//! Rate limits: validation, changes, and conversion to the device type.

use std::collections::BTreeSet;
use std::time::Duration;

use api::VmConfig;
use api::config::{RateLimitGroupConfig, RateLimiterConfig, TokenBucket};
use virtio_devices::rate_limit::{BucketLimit, REFILL_MAX, RateLimits};

use super::devices::at;
use super::error::{DeviceFault, ValidationError};

/// Reasons why there is no limit to change.
#[derive(Debug, thiserror::Error)]
pub enum RateLimiterError {
    /// No device and no group of this name.
    #[error("There is no disk, network device or rate limit group {id}")]
    Unknown {
        /// The name.
        id: String,
    },
    /// The disk shares its limit with a group.
    #[error(
        "Disk {id} shares the limit of rate limit group {group}: change the limit of the group"
    )]
    InGroup {
        /// The disk.
        id: String,
        /// Its group.
        group: String,
    },
}

/// Checks every rate limit, and that each disk's group exists.
///
/// # Errors
/// The first problem found.
pub fn validate_rate_limits(config: &VmConfig) -> Result<(), ValidationError> {
    let mut groups = BTreeSet::new();
    for (index, group) in config.rate_limit_groups.iter().flatten().enumerate() {
        let RateLimitGroupConfig {
            id,
            rate_limiter_config,
        } = group;
        let named = if id.is_empty() || !groups.insert(id) {
            Err(DeviceFault::LimitGroupId { group: id.clone() })
        } else {
            check(rate_limiter_config.as_ref())
        };
        named.map_err(|fault| at("rate_limit_group", index, Some(id), fault))?;
    }
    for (index, disk) in config.disks.iter().flatten().enumerate() {
        let own = disk.rate_limiter_config.as_ref();
        let checked = match disk.rate_limit_group.clone() {
            Some(group) if own.is_some() => Err(DeviceFault::LimitBesideGroup { group }),
            Some(group) if !groups.contains(&group) => {
                Err(DeviceFault::UnknownLimitGroup { group })
            }
            _ => check(own),
        };
        checked.map_err(|fault| at("disk", index, disk.id.as_deref(), fault))?;
    }
    for (index, net) in config.net.iter().flatten().enumerate() {
        check(net.rate_limiter_config.as_ref())
            .map_err(|fault| at("net", index, net.id.as_deref(), fault))?;
    }
    Ok(())
}

fn check(limiter: Option<&RateLimiterConfig>) -> Result<(), DeviceFault> {
    let Some(RateLimiterConfig { bandwidth, ops }) = limiter else {
        return Ok(());
    };
    for (bucket, limit) in [("bandwidth", bandwidth), ("ops", ops)] {
        let refill_ms = limit.map_or(0, |limit| limit.refill_time);
        if Duration::from_millis(refill_ms) > REFILL_MAX {
            return Err(DeviceFault::RefillTime {
                bucket,
                refill_ms,
                max_ms: REFILL_MAX.as_secs() * 1000,
            });
        }
    }
    Ok(())
}

/// The limits in the device type. As in upstream, a size or a refill time of 0 means no limit.
pub fn rate_limits(limiter: Option<&RateLimiterConfig>) -> RateLimits {
    let bucket = |limit: Option<TokenBucket>| {
        let limit = limit.filter(|limit| limit.size > 0 && limit.refill_time > 0)?;
        Some(BucketLimit {
            size: limit.size,
            one_time_burst: limit.one_time_burst.unwrap_or(0),
            refill: Duration::from_millis(limit.refill_time),
        })
    };
    RateLimits {
        bandwidth: bucket(limiter.and_then(|limiter| limiter.bandwidth)),
        ops: bucket(limiter.and_then(|limiter| limiter.ops)),
    }
}

/// Returns the configuration with a new limit for the disk, network device or group of this name. A device takes
/// precedence over a group of the same name.
///
/// # Errors
/// Nothing has this name, or it is a disk in a group.
pub fn with_rate_limit(
    config: &VmConfig,
    id: &str,
    limit: Option<RateLimiterConfig>,
) -> Result<VmConfig, RateLimiterError> {
    let mut config = config.clone();
    let mut disks = config.disks.iter_mut().flatten();
    let disk = disks.find(|disk| disk.id.as_deref() == Some(id));
    let own_group = disk.as_ref().and_then(|disk| disk.rate_limit_group.clone());
    let mut nets = config.net.iter_mut().flatten();
    let net = nets.find(|net| net.id.as_deref() == Some(id));
    let mut groups = config.rate_limit_groups.iter_mut().flatten();
    let group = groups.find(|group| group.id == id);
    let slot = match (own_group, disk, net, group) {
        (None, Some(disk), ..) => &mut disk.rate_limiter_config,
        (_, _, Some(net), _) => &mut net.rate_limiter_config,
        (_, _, _, Some(group)) => &mut group.rate_limiter_config,
        (Some(group), ..) => {
            let id = id.to_owned();
            return Err(RateLimiterError::InGroup { id, group });
        }
        (None, None, None, None) => return Err(RateLimiterError::Unknown { id: id.to_owned() }),
    };
    *slot = limit;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config() -> VmConfig {
        serde_json::from_value(json!({
            "payload": {"kernel": "/k"},
            "rate_limit_groups": [{"id": "g"}, {"id": "d"}],
            "disks": [{"path": "/a", "id": "d"}, {"path": "/b", "id": "e", "rate_limit_group": "g"}],
            "net": [{"id": "n", "mac": "12:34:56:78:90:ab"}],
        }))
        .expect("it is a configuration")
    }

    fn limit() -> RateLimiterConfig {
        let ops = TokenBucket {
            size: 5,
            one_time_burst: None,
            refill_time: 100,
        };
        RateLimiterConfig {
            bandwidth: None,
            ops: Some(ops),
        }
    }

    #[test]
    fn limit_changes_where_it_is_and_nowhere_else() {
        let changed = |id| -> Vec<String> {
            let changed = with_rate_limit(&config(), id, Some(limit())).expect("it exists");
            let back = with_rate_limit(&changed, id, None).expect("as before");
            assert_eq!(back, config());
            let changed = serde_json::to_value(changed).expect("it is JSON");
            let sections = ["disks", "net", "rate_limit_groups"];
            let limited = sections.into_iter().flat_map(|section| {
                let items = changed[section].as_array().cloned().unwrap_or_default();
                let limited = |item: &Value| !item["rate_limiter_config"].is_null();
                let limited: Vec<_> = items.into_iter().filter(limited).collect();
                limited
                    .into_iter()
                    .map(move |item| format!("{section} {}", item["id"]))
            });
            limited.collect()
        };
        assert_eq!(changed("d"), [r#"disks "d""#], "not the group");
        assert_eq!(changed("n"), [r#"net "n""#]);
        assert_eq!(changed("g"), [r#"rate_limit_groups "g""#]);
        for (id, text) in [("e", "the limit of the group"), ("x", "There is no disk")] {
            let error = with_rate_limit(&config(), id, None).expect_err(id);
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn bucket_without_size_or_time_is_no_limit() {
        for (size, refill_time, there) in [(0, 1, false), (1, 0, false), (1, 1, true)] {
            let ops = Some(TokenBucket {
                size,
                one_time_burst: Some(3),
                refill_time,
            });
            let limits = rate_limits(Some(&RateLimiterConfig {
                bandwidth: None,
                ops,
            }));
            assert_eq!(limits.ops.is_some(), there);
            assert!(limits.ops.is_none_or(|limit| limit.one_time_burst == 3));
        }
    }
}
