//! The `numa` section.

use std::collections::BTreeMap;

use api::VmConfig;
use api::config::NumaConfig;

use super::error::NumaFault;
use super::pci_devices::pci_segments;
use machine::acpi::{LOCAL_DISTANCE, PROXIMITY_DOMAIN_MAX};
use machine::memory::DEFAULT_ZONE_ID;

pub(super) fn check(config: &VmConfig) -> Result<(), NumaFault> {
    let nodes = config.numa.as_deref().unwrap_or_default();
    let mut known = BTreeMap::new();
    for node in nodes {
        let number = node.guest_numa_id;
        if number > PROXIMITY_DOMAIN_MAX {
            return Err(NumaFault::NodeNumber {
                node: number,
                max: PROXIMITY_DOMAIN_MAX,
            });
        }
        if known.insert(number, node).is_some() {
            return Err(NumaFault::NodeTwice { node: number });
        }
    }
    zones(config, nodes)?;
    vcpus(config.cpus.max_vcpus, nodes)?;
    segments(pci_segments(config), nodes)?;
    for node in nodes {
        distances(node, |destination| known.contains_key(&destination))?;
    }
    Ok(())
}

fn zones(config: &VmConfig, nodes: &[NumaConfig]) -> Result<(), NumaFault> {
    let zones = config.memory.zones.as_deref().unwrap_or_default();
    let exists = |name: &str| match zones {
        [] => name == DEFAULT_ZONE_ID,
        zones => zones.iter().any(|zone| zone.id == name),
    };
    let mut owners = BTreeMap::new();
    for node in nodes {
        for zone in node.memory_zones.iter().flatten() {
            if !exists(zone) {
                return Err(NumaFault::UnknownZone {
                    node: node.guest_numa_id,
                    zone: zone.clone(),
                });
            }
            if let Some(first) = owners.insert(zone, node.guest_numa_id) {
                return Err(NumaFault::ZoneReused {
                    zone: zone.clone(),
                    first,
                    second: node.guest_numa_id,
                });
            }
        }
    }
    Ok(())
}

fn vcpus(max_vcpus: u32, nodes: &[NumaConfig]) -> Result<(), NumaFault> {
    let mut owners = BTreeMap::new();
    for node in nodes {
        for &vcpu in node.cpus.iter().flatten() {
            if vcpu >= max_vcpus {
                return Err(NumaFault::UnknownVcpu {
                    node: node.guest_numa_id,
                    vcpu,
                    last: max_vcpus - 1,
                });
            }
            if let Some(first) = owners.insert(vcpu, node.guest_numa_id) {
                return Err(NumaFault::VcpuReused {
                    vcpu,
                    first,
                    second: node.guest_numa_id,
                });
            }
        }
    }
    Ok(())
}

fn segments(count: u16, nodes: &[NumaConfig]) -> Result<(), NumaFault> {
    let mut owners = BTreeMap::new();
    for node in nodes {
        for &segment in node.pci_segments.iter().flatten() {
            if segment >= count {
                return Err(NumaFault::UnknownSegment {
                    node: node.guest_numa_id,
                    segment,
                    last: count.saturating_sub(1),
                });
            }
            if let Some(first) = owners.insert(segment, node.guest_numa_id) {
                return Err(NumaFault::SegmentReused {
                    segment,
                    first,
                    second: node.guest_numa_id,
                });
            }
        }
    }
    Ok(())
}

/// Linux rejects a table in which another node is as near as the node itself.
fn distances(node: &NumaConfig, exists: impl Fn(u32) -> bool) -> Result<(), NumaFault> {
    for distance in node.distances.iter().flatten() {
        let (node, destination) = (node.guest_numa_id, distance.destination);
        if !exists(destination) {
            return Err(NumaFault::UnknownDestination { node, destination });
        }
        let possible = if destination == node {
            distance.distance == LOCAL_DISTANCE
        } else {
            distance.distance > LOCAL_DISTANCE
        };
        if !possible {
            return Err(NumaFault::Distance {
                node,
                destination,
                distance: distance.distance,
            });
        }
    }
    Ok(())
}
