//! The zones of guest RAM (`--memory-zone`) and their addresses.
//!
//! Undivided RAM is one zone with the name that Cloud Hypervisor uses, so all other code handles only zones. Zones
//! follow one another in the order of the configuration. A zone that does not fit below 3 GiB continues at 4 GiB:
//!
//! ```text
//!   zones      │ a 1G │        b 4G          │
//!   addresses  0      1G          3G  hole  4G      6G
//! ```

use std::ops::Range;

use api::config::{HotplugMethod, MemoryConfig, MemoryZoneConfig};
use serde::{Deserialize, Serialize};

use super::source::{ANONYMOUS, MEMFD};

/// Name of the only zone if RAM is not divided.
pub const DEFAULT_ZONE_ID: &str = "mem0";
/// Suffix of the name of a zone for virtio-mem.
const HOTPLUG_SUFFIX: &str = "-hotplug";

/// When the guest has the RAM of a zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ZoneKind {
    /// From the start.
    Boot,
    /// Only the part that it plugs.
    VirtioMem,
    /// Since it was added to the running guest.
    Dimm,
}

/// One zone of guest RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zone {
    /// Its name.
    pub id: String,
    /// Guest physical addresses of the zone, in order.
    pub ranges: Vec<Range<u64>>,
    /// The kind of its backing, as named in statistics.
    pub backing: &'static str,
    /// Size of its pages.
    pub page_bytes: u64,
    /// When the guest has it.
    pub kind: ZoneKind,
}

impl Zone {
    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }

    /// Whether the host may fail to provide a page while the guest runs. Without a file, the host's swap and its OOM
    /// killer see to it.
    pub fn may_run_out(&self) -> bool {
        self.backing != ANONYMOUS && self.backing != MEMFD
    }

    /// The name of the configured zone that it is, or that it lets grow.
    pub fn configured_id(&self) -> &str {
        let name = match self.kind {
            ZoneKind::VirtioMem => self.id.strip_suffix(HOTPLUG_SUFFIX),
            ZoneKind::Boot | ZoneKind::Dimm => None,
        };
        name.unwrap_or(&self.id)
    }

    /// Whether the zone contains a guest physical address.
    pub fn holds(&self, address: u64) -> bool {
        self.ranges.iter().any(|range| range.contains(&address))
    }
}

/// The zones of a configuration; RAM that is not divided is one zone. A setting that exists both for all of RAM and per
/// zone applies to a zone if either enables it.
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
            hotplug_size: config.hotplug_size,
            hotplugged_size: config.hotplugged_size,
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

/// Whether other processes can map all of RAM. Huge pages always come from a memory file; a file may be mapped private.
pub fn all_shared(config: &MemoryConfig) -> bool {
    let shared = |zone: &MemoryZoneConfig| zone.shared || zone.hugepages && zone.file.is_none();
    zones_of(config).iter().all(shared)
}

/// The zones that grow by virtio-mem, in the order of the configuration. Each has a device of its name.
pub fn growing_zones(config: &MemoryConfig) -> Vec<MemoryZoneConfig> {
    if config.hotplug_method != HotplugMethod::VirtioMem {
        return Vec::new();
    }
    let mut zones = zones_of(config);
    zones.retain(|zone| zone.hotplug_size.is_some_and(|bytes| bytes > 0));
    zones
}

/// The name of the zone for virtio-mem by which the zone `id` grows.
pub fn hotplug_zone_id(id: &str) -> String {
    format!("{id}{HOTPLUG_SUFFIX}")
}

/// The zones for virtio-mem, at their maximum sizes, with the backings of the zones that grow. None of their pages exists
/// before the guest plugs and touches it.
pub(super) fn hotplug_zones_of(config: &MemoryConfig) -> Vec<MemoryZoneConfig> {
    let zones = growing_zones(config).into_iter();
    let zones = zones.map(|zone| MemoryZoneConfig {
        id: hotplug_zone_id(&zone.id),
        size: zone.hotplug_size.unwrap_or(0),
        prefault: false,
        ..zone
    });
    zones.collect()
}

/// Assigns the ranges of `ram` to zones of these sizes, in order. The sum of the sizes is at most the size of `ram`.
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
            // Joined where they are adjacent, the ranges form the map again.
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
