//! `GET /vm.balloon-stats`: what the guest says about its own memory.
//!
//! The sixteen statistics of virtio-balloon (virtio 1.4 section 5.5.6.3, and Linux `include/uapi/linux/virtio_balloon.h`
//! for the tags from 10 on) are written once, in the table below. From it come the struct, its JSON fields, the tag
//! numbers and the access by tag, so that a statistic is added in one line.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

macro_rules! balloon_stats {
    ($($(#[$doc:meta])* $name:ident = $tag:literal,)*) => {
        /// The guest's memory statistics. A statistic the guest did not send is absent.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
        pub struct BalloonStats {
            $(
                $(#[$doc])*
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub $name: Option<u64>,
            )*
        }

        /// Name in the API and tag on the statistics queue of every known statistic, ascending by tag.
        pub const BALLOON_STAT_TAGS: &[(&str, u16)] = &[$((stringify!($name), $tag)),*];

        impl BalloonStats {
            /// Stores `value` under `tag`. Returns false, and stores nothing, for a tag that is not in the table: a
            /// newer guest may send more than we know, and that is no fault of its own.
            pub fn set(&mut self, tag: u16, value: u64) -> bool {
                match tag {
                    $($tag => self.$name = Some(value),)*
                    _ => return false,
                }
                true
            }

            /// The value last stored under `tag`.
            pub fn get(&self, tag: u16) -> Option<u64> {
                match tag {
                    $($tag => self.$name,)*
                    _ => None,
                }
            }
        }
    };
}

balloon_stats! {
    /// Memory swapped in, bytes since the guest booted.
    swap_in = 0,
    /// Memory swapped out, bytes since the guest booted.
    swap_out = 1,
    /// Page faults that needed I/O, since the guest booted.
    major_faults = 2,
    /// Page faults that needed none, since the guest booted.
    minor_faults = 3,
    /// Memory not used at all, bytes.
    free_memory = 4,
    /// Memory the guest sees as its own, bytes. Without deflate-on-OOM the balloon is already taken off.
    total_memory = 5,
    /// Memory a new application could get without swapping, bytes.
    available_memory = 6,
    /// Page cache that could be dropped, bytes.
    disk_caches = 7,
    /// Huge pages handed out, since the guest booted.
    hugetlb_allocations = 8,
    /// Huge pages asked for and refused, since the guest booted.
    hugetlb_failures = 9,
    /// Processes killed for lack of memory, since the guest booted.
    oom_kills = 10,
    /// Allocations that had to wait for reclaim, since the guest booted.
    alloc_stalls = 11,
    /// Memory looked at by background reclaim, bytes since the guest booted.
    async_scans = 12,
    /// Memory looked at by reclaim in the allocating task, bytes since the guest booted.
    direct_scans = 13,
    /// Memory freed by background reclaim, bytes since the guest booted.
    async_reclaims = 14,
    /// Memory freed by reclaim in the allocating task, bytes since the guest booted.
    direct_reclaims = 15,
}

impl BalloonStats {
    /// Every known statistic with its name, ascending by tag.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, Option<u64>)> {
        let stats = *self;
        BALLOON_STAT_TAGS
            .iter()
            .map(move |&(name, tag)| (name, stats.get(tag)))
    }

    /// True when the guest has sent nothing.
    pub fn is_empty(&self) -> bool {
        self.iter().all(|(_, value)| value.is_none())
    }
}

/// The guest's view of its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({
    "balloon_actual": 0, "last_update": 1_700_000_000_000_u64, "age_ms": 120, "stats": {"free_memory": 400_000_000}
})))]
pub struct BalloonStatsResponse {
    /// Bytes the guest says are in the balloon.
    pub balloon_actual: u64,
    /// When the guest last sent statistics: milliseconds since the Unix epoch on the host's clock; 0 before the first.
    #[serde(default)]
    pub last_update: u64,
    /// Milliseconds since the guest last sent statistics, on a clock that cannot be set; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// The statistics of that sample.
    #[serde(default)]
    pub stats: BalloonStats,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn balloon_stats_every_tag_is_stored_under_its_own_name() {
        for (position, &(name, tag)) in BALLOON_STAT_TAGS.iter().enumerate() {
            assert_eq!(usize::from(tag), position);
            let mut stats = BalloonStats::default();
            assert!(stats.set(tag, 7));
            assert_eq!(stats.get(tag), Some(7));
            assert_eq!(
                serde_json::to_string(&stats).unwrap(),
                format!("{{\"{name}\":7}}")
            );
        }
        assert_eq!(BALLOON_STAT_TAGS.len(), 16);
    }

    #[test]
    fn balloon_stats_unknown_tag_is_refused_and_changes_nothing() {
        let mut stats = BalloonStats::default();
        assert!(!stats.set(16, 1));
        assert!(!stats.set(0x8000, 1));
        assert!(stats.is_empty());
        assert_eq!(stats.get(16), None);
    }

    #[test]
    fn balloon_stats_response_without_a_sample_has_no_age() {
        let json = serde_json::to_string(&BalloonStatsResponse::default()).unwrap();
        assert_eq!(json, r#"{"balloon_actual":0,"last_update":0,"stats":{}}"#);
    }
}
