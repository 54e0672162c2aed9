//! SRAT and SLIT: the nodes of vCPUs and RAM, and the distances between nodes (ACPI 6.5 §5.2.16, §5.2.17). A machine
//! without NUMA nodes has neither table.

use std::ops::Range;

use super::table::table;

/// A node's distance to itself; all others are larger.
pub const LOCAL_DISTANCE: u8 = 10;
/// The distance between nodes if none is configured, as ACPI suggests.
const REMOTE_DISTANCE: u8 = 20;
/// The table of distances has one byte per pair: 64 KiB, which fit below SMBIOS.
pub const PROXIMITY_DOMAIN_MAX: u32 = 255;

/// One NUMA node as described to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NumaNode {
    /// Its proximity domain, at most [`PROXIMITY_DOMAIN_MAX`].
    pub domain: u32,
    /// Local APIC ids of its vCPUs.
    pub apic_ids: Vec<u32>,
    /// Its RAM.
    pub ram: Vec<Range<u64>>,
    /// Regions in which it gets more RAM.
    pub hotplug: Vec<Range<u64>>,
    /// Distances to other domains, where known.
    pub distances: Vec<(u32, u8)>,
}

const SRAT_REVISION: u8 = 3;
const SRAT_MEMORY: u8 = 1;
const SRAT_X2APIC: u8 = 2;
const SRAT_ENABLED: u32 = 1 << 0;
const SRAT_HOT_PLUGGABLE: u32 = 1 << 1;

/// System resource affinity table.
pub(super) fn srat(nodes: &[NumaNode]) -> Vec<u8> {
    // A field that must be one, and a reserved one.
    let mut entries = Vec::from(1_u32.to_le_bytes());
    entries.extend([0; 8]);
    for node in nodes {
        for apic_id in &node.apic_ids {
            entries.extend([SRAT_X2APIC, 24, 0, 0]);
            entries.extend(node.domain.to_le_bytes());
            entries.extend(apic_id.to_le_bytes());
            entries.extend(SRAT_ENABLED.to_le_bytes());
            // Clock domain, reserved.
            entries.extend([0; 8]);
        }
        let ram = node.ram.iter().map(|range| (range, SRAT_ENABLED));
        let hotplug = node.hotplug.iter();
        let hotplug = hotplug.map(|range| (range, SRAT_ENABLED | SRAT_HOT_PLUGGABLE));
        for (range, flags) in ram.chain(hotplug) {
            entries.extend([SRAT_MEMORY, 40]);
            entries.extend(node.domain.to_le_bytes());
            entries.extend([0; 2]);
            entries.extend(range.start.to_le_bytes());
            entries.extend((range.end - range.start).to_le_bytes());
            entries.extend([0; 4]);
            entries.extend(flags.to_le_bytes());
            entries.extend([0; 8]);
        }
    }
    table(*b"SRAT", SRAT_REVISION, *b"CHSRAT  ", &entries)
}

const SLIT_REVISION: u8 = 1;

/// System locality information table: the distances between all domains. A distance that is known in only one direction
/// applies to both.
pub(super) fn slit(nodes: &[NumaNode]) -> Vec<u8> {
    let domains = nodes.iter().map(|node| node.domain + 1).max().unwrap_or(0);
    let known = |from: u32, to: u32| {
        let node = nodes.iter().find(|node| node.domain == from)?;
        let distance = node.distances.iter().find(|(domain, _)| *domain == to)?;
        Some(distance.1)
    };
    let mut entries = Vec::from(u64::from(domains).to_le_bytes());
    for from in 0..domains {
        for to in 0..domains {
            entries.push(if from == to {
                LOCAL_DISTANCE
            } else {
                known(from, to)
                    .or_else(|| known(to, from))
                    .unwrap_or(REMOTE_DISTANCE)
            });
        }
    }
    table(*b"SLIT", SLIT_REVISION, *b"CHSLIT  ", &entries)
}
