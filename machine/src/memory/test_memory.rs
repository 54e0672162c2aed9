//! Guest memory for tests of its content.

use api::config::{MemoryConfig, MemoryZoneConfig};
use vm_memory::GuestAddress;

use super::GuestMemory;
use super::layout::{MIB, PAGE_BYTES};

/// A zone of 7 MiB, which is no multiple of a chunk, for each id; it is shared or not.
pub(super) fn zones(zones: &[(&str, bool)]) -> GuestMemory {
    let zones = zones.iter().map(|&(id, shared)| MemoryZoneConfig {
        id: id.to_owned(),
        size: 7 * MIB,
        shared,
        ..MemoryZoneConfig::default()
    });
    let config = MemoryConfig {
        size: 0,
        zones: Some(zones.collect()),
        ..MemoryConfig::default()
    };
    GuestMemory::new(&config, 46).unwrap()
}

/// Two such zones, the second shared. The last chunk of each has 1 MiB.
pub(super) fn private_and_shared() -> GuestMemory {
    zones(&[("a", false), ("b", true)])
}

/// What a page starts with: its number, and never zero.
pub(super) fn mark(page: u64) -> u64 {
    page | 1 << 63
}

pub(super) fn address(page: u64) -> GuestAddress {
    GuestAddress(page * PAGE_BYTES)
}
