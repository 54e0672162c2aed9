//! The zones guest RAM is divided into (`--memory-zone`), and where each lies.
//!
//! RAM without zones is one zone of that name which Cloud Hypervisor gives it too, so
//! everything below knows zones only. They follow one another in the order of the
//! configuration; one that does not fit below 3 GiB goes on at 4 GiB:
//!
//! ```text
//!   zones      │ a 1G │        b 4G          │
//!   addresses  0      1G          3G  hole  4G      6G
//! ```

use std::ops::Range;

use api::config::{MemoryConfig, MemoryZoneConfig};

/// Name of the only zone of RAM that the configuration does not divide.
pub const DEFAULT_ZONE_ID: &str = "mem0";
/// Name of the zone of memory that is plugged in later.
pub const HOTPLUG_ZONE_ID: &str = "mem0-hotplug";

/// One zone of guest RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zone {
    /// Its name.
    pub id: String,
    /// Guest physical addresses it fills, in order.
    pub ranges: Vec<Range<u64>>,
    /// What it is made of, as figures name it.
    pub backing: &'static str,
    /// Size of its pages.
    pub page_bytes: u64,
    /// Whether the guest has of it only what it plugs in.
    pub hotplug: bool,
}

impl Zone {
    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }

    /// Whether a guest physical address lies in it.
    pub fn holds(&self, address: u64) -> bool {
        self.ranges.iter().any(|range| range.contains(&address))
    }
}

/// The zones of a configuration; those of RAM that is not divided are one. What `memory` says of
/// all RAM and a zone can say of itself holds for a zone if either says so.
pub(super) fn zones_of(config: &MemoryConfig) -> Vec<MemoryZoneConfig> {
    let zones = config.zones.as_deref().unwrap_or_default();
    if zones.is_empty() {
        return vec![MemoryZoneConfig {
            id: DEFAULT_ZONE_ID.to_owned(),
            size: config.size,
            shared: config.shared,
            hugepages: config.hugepages,
            hugepage_size: config.hugepage_size,
            prefault: config.prefault,
            reserve: config.reserve,
            mergeable: config.mergeable,
            ..MemoryZoneConfig::default()
        }];
    }
    let zones = zones.iter().map(|zone| MemoryZoneConfig {
        prefault: zone.prefault || config.prefault,
        reserve: zone.reserve || config.reserve,
        mergeable: zone.mergeable || config.mergeable,
        ..zone.clone()
    });
    zones.collect()
}

/// The zone of memory that is plugged in later, as long as all of it; made of what undivided RAM is made of. No page of
/// it is there before the guest plugs it in and touches it.
pub(super) fn hotplug_zone_of(config: &MemoryConfig) -> Option<MemoryZoneConfig> {
    let size = config.hotplug_size.filter(|bytes| *bytes > 0)?;
    let boot = zones_of(config).into_iter().next()?;
    Some(MemoryZoneConfig {
        id: HOTPLUG_ZONE_ID.to_owned(),
        size,
        prefault: false,
        ..boot
    })
}

/// Hands the ranges of `ram` out to zones of these sizes, in order. The sizes add up to no more
/// than `ram` holds.
pub(super) fn place(sizes: &[u64], ram: &[Range<u64>]) -> Vec<Vec<Range<u64>>> {
    let mut free = ram.iter().cloned();
    let mut rest = free.next().unwrap_or(0..0);
    let mut placed = Vec::new();
    for size in sizes {
        let mut wanted = *size;
        let mut ranges = Vec::new();
        while wanted > 0 {
            if rest.is_empty() {
                rest = free
                    .next()
                    .expect("the address map was made for these sizes");
            }
            let bytes = wanted.min(rest.end - rest.start);
            ranges.push(rest.start..rest.start + bytes);
            rest.start += bytes;
            wanted -= bytes;
        }
        placed.push(ranges);
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::{AddressMap, GIB, MIB};
    use proptest::prelude::*;

    #[test]
    fn place_zone_that_meets_the_hole_goes_on_behind_it() {
        let map = AddressMap::new(5 * GIB, 46).unwrap();
        let placed = place(&[GIB, 4 * GIB], &map.ram);
        assert_eq!(placed[0], std::slice::from_ref(&(0..GIB)));
        assert_eq!(placed[1], [GIB..3 * GIB, 4 * GIB..6 * GIB]);
    }

    #[test]
    fn zones_of_undivided_ram_is_one_of_all_its_settings() {
        let config = MemoryConfig {
            size: GIB,
            shared: true,
            prefault: true,
            ..MemoryConfig::default()
        };
        let zones = zones_of(&config);
        assert_eq!(zones.len(), 1);
        assert_eq!((zones[0].id.as_str(), zones[0].size), ("mem0", GIB));
        assert!(zones[0].shared && zones[0].prefault && !zones[0].hugepages);
    }

    #[test]
    fn zones_of_divided_ram_share_what_memory_says_of_all() {
        let zone = |id: &str, prefault| MemoryZoneConfig {
            id: id.to_owned(),
            size: GIB,
            prefault,
            ..MemoryZoneConfig::default()
        };
        let mut config = MemoryConfig {
            size: 0,
            zones: Some(vec![zone("a", true), zone("b", false)]),
            ..MemoryConfig::default()
        };
        let prefaulted =
            |config: &MemoryConfig| zones_of(config).iter().filter(|zone| zone.prefault).count();
        assert_eq!(prefaulted(&config), 1);
        config.prefault = true;
        assert_eq!(prefaulted(&config), 2);
    }

    proptest! {
        #[test]
        fn place_fills_the_map_in_order_without_gap_or_overlap(
            mebibytes in proptest::collection::vec(1..3000_u64, 1..8),
        ) {
            let sizes: Vec<_> = mebibytes.iter().map(|mebibytes| (mebibytes + 2) * MIB).collect();
            let map = AddressMap::new(sizes.iter().sum(), 46).unwrap();
            let placed = place(&sizes, &map.ram);
            for (size, ranges) in sizes.iter().zip(&placed) {
                prop_assert_eq!(ranges.iter().map(|it| it.end - it.start).sum::<u64>(), *size);
            }
            // Joined where they touch they are the map again.
            let mut joined: Vec<Range<u64>> = Vec::new();
            for range in placed.into_iter().flatten() {
                match joined.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => joined.push(range),
                }
            }
            prop_assert_eq!(joined, map.ram);
        }
    }
}
