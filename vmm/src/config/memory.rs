//! The `memory` section and its zones.

use api::config::{HotplugMethod, MemoryConfig, MemoryZoneConfig};

use super::error::MemoryFault;
use machine::memory::layout::{MIN_RAM_BYTES, SECTION_BYTES};
use machine::memory::{HOST_NUMA_NODE_MAX, hotplug_block_bytes};

const PAGE_BYTES: u64 = 4 << 10;
/// The two sizes of huge pages of x86-64.
const HUGE_PAGE_BYTES: [u64; 2] = [2 << 20, 1 << 30];
/// RAM above 3 GiB is placed above 4 GiB, and devices need addresses after it, which RAM cannot use.
const RESERVED_BYTES: u64 = 2 << 30;

pub(super) fn check(memory: &MemoryConfig, address_bits: u8) -> Result<(), MemoryFault> {
    let beyond = |bytes| MemoryFault::BeyondAddressSpace {
        bytes,
        address_bits,
    };
    let zones = memory.zones.as_deref().unwrap_or_default();
    match (memory.size, zones) {
        (0, []) => return Err(MemoryFault::Zero),
        (0, _) | (_, []) => {}
        (bytes, _) => return Err(MemoryFault::SizeAndZones { bytes }),
    }
    check_zones(memory, zones)?;
    if memory.mergeable && (memory.shared || zones.iter().any(|zone| zone.shared)) {
        return Err(MemoryFault::MergeableShared);
    }
    let bytes = memory.total_bytes().ok_or_else(|| beyond(u64::MAX))?;
    let in_zones = zones.iter().filter_map(|zone| zone.hotplugged_size);
    // `bytes` includes hot-plugged memory; the difference is RAM at boot.
    let bytes = bytes - memory.hotplugged_size.unwrap_or(0) - in_zones.sum::<u64>();
    if bytes < MIN_RAM_BYTES {
        return Err(MemoryFault::TooSmall {
            bytes,
            min_bytes: MIN_RAM_BYTES,
        });
    }
    if zones.is_empty() {
        pages(bytes, memory.hugepages, memory.hugepage_size)?;
    }
    let hotplug_bytes = hotplug(memory, zones)?;
    let bytes = bytes.saturating_add(hotplug_bytes);
    let room = 1u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX);
    if bytes > room.saturating_sub(RESERVED_BYTES) {
        return Err(beyond(bytes));
    }
    Ok(())
}

fn check_zones(memory: &MemoryConfig, zones: &[MemoryZoneConfig]) -> Result<(), MemoryFault> {
    for zone in zones {
        // Each zone has its own settings, so a setting for all of RAM would be ignored.
        if memory.shared && !zone.shared
            || memory.hugepages && !zone.hugepages
            || memory.hugepage_size.is_some() && memory.hugepage_size != zone.hugepage_size
        {
            return Err(MemoryFault::KindBesideZones);
        }
        zone_of(zone).map_err(|fault| in_zone(zone, fault))?;
    }
    Ok(())
}

fn in_zone(zone: &MemoryZoneConfig, fault: MemoryFault) -> MemoryFault {
    MemoryFault::Zone {
        id: zone.id.clone(),
        fault: Box::new(fault),
    }
}

fn zone_of(zone: &MemoryZoneConfig) -> Result<(), MemoryFault> {
    if zone.size == 0 {
        return Err(MemoryFault::Zero);
    }
    pages(zone.size, zone.hugepages, zone.hugepage_size)?;
    match zone.host_numa_node {
        Some(node) if node > HOST_NUMA_NODE_MAX => Err(MemoryFault::HostNumaNode { node }),
        // The file's pages may exist already, and other users may share them.
        Some(_) if zone.shared && zone.file.is_some() => Err(MemoryFault::HostNumaNodeOfSharedFile),
        _ => Ok(()),
    }
}

/// Checks the maximum of hot-plugged memory and its amount at boot, and returns the maximum.
fn hotplug(memory: &MemoryConfig, zones: &[MemoryZoneConfig]) -> Result<u64, MemoryFault> {
    let bytes = memory.hotplug_size.unwrap_or(0);
    let added_bytes = memory.hotplugged_size.unwrap_or(0);
    if memory.hotplug_method == HotplugMethod::Acpi {
        let grows = |zone: &&MemoryZoneConfig| zone.hotplug_size.is_some_and(|bytes| bytes > 0);
        if let Some(zone) = zones.iter().find(grows) {
            return Err(in_zone(zone, MemoryFault::ZoneGrowsByAcpi));
        }
        let mut in_zones = zones.iter().filter_map(|zone| zone.hotplugged_size);
        // Memory devices become part of `size`. As upstream, only their sizes must be whole.
        return match added_bytes > 0 || in_zones.any(|bytes| bytes > 0) {
            false => Ok(bytes),
            true => Err(MemoryFault::HotpluggedByAcpi),
        };
    }
    let all_bytes = memory.room_bytes(HotplugMethod::VirtioMem);
    if zones.is_empty() {
        let huge_page_bytes = memory.hugepage_size.filter(|_| memory.hugepages);
        region(bytes, added_bytes, huge_page_bytes, all_bytes)?;
    } else if bytes > 0 || added_bytes > 0 {
        return Err(MemoryFault::HotplugBesideZones);
    }
    for zone in zones {
        let bytes = zone.hotplug_size.unwrap_or(0);
        let added_bytes = zone.hotplugged_size.unwrap_or(0);
        let huge_page_bytes = zone.hugepage_size.filter(|_| zone.hugepages);
        let checked = region(bytes, added_bytes, huge_page_bytes, all_bytes);
        checked.map_err(|fault| in_zone(zone, fault))?;
    }
    Ok(all_bytes)
}

/// Checks the region of virtio-mem by which RAM or a zone grows. All regions together have `all_bytes`.
fn region(
    bytes: u64,
    added_bytes: u64,
    huge_page_bytes: Option<u64>,
    all_bytes: u64,
) -> Result<(), MemoryFault> {
    let block_bytes = hotplug_block_bytes(all_bytes, huge_page_bytes.unwrap_or(PAGE_BYTES));
    let whole = |field, bytes: u64, unit_bytes| match bytes.is_multiple_of(unit_bytes) {
        true => Ok(()),
        false => Err(MemoryFault::HotplugNotWhole {
            field,
            bytes,
            unit_bytes,
        }),
    };
    whole("hotplug_size", bytes, block_bytes.max(SECTION_BYTES))?;
    whole("hotplugged_size", added_bytes, block_bytes)?;
    if added_bytes > bytes {
        return Err(MemoryFault::HotpluggedBeyondRoom {
            added_bytes,
            room_bytes: bytes,
        });
    }
    Ok(())
}

/// Whether `bytes` is a multiple of the configured page size.
fn pages(bytes: u64, hugepages: bool, hugepage_bytes: Option<u64>) -> Result<(), MemoryFault> {
    let page_bytes = match (hugepages, hugepage_bytes) {
        (false, None) => PAGE_BYTES,
        (false, Some(_)) => return Err(MemoryFault::HugePageSizeWithoutHugePages),
        // The host's default is at least 2 MiB.
        (true, None) => HUGE_PAGE_BYTES[0],
        (true, Some(bytes)) if HUGE_PAGE_BYTES.contains(&bytes) => bytes,
        (true, Some(bytes)) => return Err(MemoryFault::HugePageSize { bytes }),
    };
    if !bytes.is_multiple_of(page_bytes) {
        return Err(MemoryFault::NotWholePages { bytes, page_bytes });
    }
    Ok(())
}
