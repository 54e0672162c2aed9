//! Memory statistics that a balloon driver sends (virtio 1.2 §5.5.6.3; `VIRTIO_BALLOON_S_*` of
//! `include/uapi/linux/virtio_balloon.h`).
//!
//! A row is `constant = tag, field, meaning`. The tag constant, the field of the reply with its serde attributes, the
//! access by tag, and the schema are generated from it.

use serde::{Deserialize, Serialize};

/// One statistic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistic {
    /// Tag on the statistics queue.
    pub tag: u16,
    /// The tag's name in the Linux header.
    pub constant: &'static str,
    /// Name in the API.
    pub name: &'static str,
    /// The quantity it counts, with its unit.
    pub meaning: &'static str,
}

macro_rules! statistics {
    ($(#[$doc:meta])* $table:ident { $($constant:ident = $tag:literal, $name:ident, $meaning:literal;)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        pub struct $table {
            $(
                #[doc = $meaning]
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub $name: Option<u64>,
            )+
        }

        $(#[doc = concat!("Tag of `", stringify!($name), "`.")] pub const $constant: u16 = $tag;)+

        impl $table {
            /// Every statistic, ascending by tag.
            pub const TABLE: &'static [Statistic] = &[
                $(Statistic {
                    tag: $tag,
                    constant: stringify!($constant),
                    name: stringify!($name),
                    meaning: $meaning,
                },)+
            ];

            /// Stores `value` under `tag`. For a tag that is not in the table it stores nothing and returns false: a
            /// newer guest may send unknown tags.
            pub fn set(&mut self, tag: u16, value: u64) -> bool {
                match tag {
                    $($tag => self.$name = Some(value),)+
                    _ => return false,
                }
                true
            }

            /// The value last stored under `tag`.
            #[must_use]
            pub fn get(&self, tag: u16) -> Option<u64> {
                match tag {
                    $($tag => self.$name,)+
                    _ => None,
                }
            }

            /// Every statistic with its value, ascending by tag.
            pub fn iter(&self) -> impl Iterator<Item = (&'static Statistic, Option<u64>)> + use<> {
                let values = *self;
                Self::TABLE.iter().map(move |it| (it, values.get(it.tag)))
            }

            /// Whether the guest has sent no statistic.
            #[must_use]
            pub fn is_empty(&self) -> bool {
                *self == Self::default()
            }
        }
    };
}

statistics! {
    /// The guest's memory statistics. A statistic the guest did not send is absent. Counts and sums begin when the
    /// guest boots.
    BalloonStats {
        VIRTIO_BALLOON_S_SWAP_IN = 0, swap_in, "Bytes swapped in";
        VIRTIO_BALLOON_S_SWAP_OUT = 1, swap_out, "Bytes swapped out";
        VIRTIO_BALLOON_S_MAJFLT = 2, major_faults, "Page faults that needed I/O";
        VIRTIO_BALLOON_S_MINFLT = 3, minor_faults, "Page faults that needed no I/O";
        VIRTIO_BALLOON_S_MEMFREE = 4, free_memory, "Unused bytes";
        VIRTIO_BALLOON_S_MEMTOT = 5, total_memory,
            "Bytes of RAM as the guest sees it. Without deflate-on-OOM, the balloon is subtracted";
        VIRTIO_BALLOON_S_AVAIL = 6, available_memory, "Bytes a new application could get without swapping";
        VIRTIO_BALLOON_S_CACHES = 7, disk_caches, "Bytes of page cache that can be dropped";
        VIRTIO_BALLOON_S_HTLB_PGALLOC = 8, hugetlb_allocations, "Huge pages allocated";
        VIRTIO_BALLOON_S_HTLB_PGFAIL = 9, hugetlb_failures, "Huge pages requested but not allocated";
        VIRTIO_BALLOON_S_OOM_KILL = 10, oom_kills, "Processes killed because memory ran out";
        VIRTIO_BALLOON_S_ALLOC_STALL = 11, alloc_stalls, "Allocations that had to wait for reclaim";
        VIRTIO_BALLOON_S_ASYNC_SCAN = 12, async_scans, "Bytes scanned by background reclaim";
        VIRTIO_BALLOON_S_DIRECT_SCAN = 13, direct_scans, "Bytes scanned by reclaim in the allocating task";
        VIRTIO_BALLOON_S_ASYNC_RECLAIM = 14, async_reclaims, "Bytes freed by background reclaim";
        VIRTIO_BALLOON_S_DIRECT_RECLAIM = 15, direct_reclaims, "Bytes freed by reclaim in the allocating task";
    }
}

statistics! {
    /// Reporting statistics of a guest with our kernel patches. Only drivers that accept a reporting policy send them.
    GuestReporting {
        VIRTIO_BALLOON_S_REPORTING_PENDING = 0x8000, pending_bytes, "Bytes that are free and not yet reported";
        VIRTIO_BALLOON_S_REPORTING_REPORTED = 0x8001, reported_bytes, "Bytes that are reported and still free";
        VIRTIO_BALLOON_S_REPORTING_BATCHES = 0x8002, batches, "Batches sent since the guest booted";
        VIRTIO_BALLOON_S_REPORTING_ISOLATION_FAILURES = 0x8003, isolation_failures,
            "Blocks not reported because their pageblock is isolated";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tag_is_stored_under_its_own_name() {
        for (position, it) in BalloonStats::TABLE.iter().enumerate() {
            assert_eq!(usize::from(it.tag), position);
            let mut stats = BalloonStats::default();
            assert!(stats.set(it.tag, 7));
            assert_eq!(stats.get(it.tag), Some(7));
            let json = serde_json::to_string(&stats).expect("numbers");
            assert_eq!(json, format!("{{\"{}\":7}}", it.name));
            assert_eq!(stats.iter().filter(|(_, value)| value.is_some()).count(), 1);
        }
        assert_eq!(BalloonStats::TABLE.len(), 16);
        for (it, tag) in GuestReporting::TABLE.iter().zip(0x8000..) {
            assert_eq!(it.tag, tag);
        }
    }

    #[test]
    fn unknown_tag_is_refused_and_changes_nothing() {
        let mut stats = BalloonStats::default();
        let unknown = BalloonStats::TABLE.len() as u16;
        assert!(!stats.set(unknown, 1));
        assert!(!stats.set(0x8000, 1));
        assert!(stats.is_empty());
        assert_eq!(stats.get(unknown), None);
    }
}
