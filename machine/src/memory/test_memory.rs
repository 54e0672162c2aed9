//! Guest memory for tests of its content.

use std::cell::RefCell;
use std::fs::File;

use api::config::{MemoryConfig, MemoryZoneConfig};
use vm_memory::GuestAddress;

use super::layout::{MIB, PAGE_BYTES};
use super::{ContentError, ContentFiles, GuestMemory, ZoneContentState};

/// A zone of 7 MiB, which is not a multiple of a chunk, for each id; it is shared or not.
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

/// The start of a page: its number, and never zero.
pub(super) fn mark(page: u64) -> u64 {
    page | 1 << 63
}

pub(super) fn address(page: u64) -> GuestAddress {
    GuestAddress(page * PAGE_BYTES)
}

/// A file with the content of each zone, written in one pass, and its table.
pub(super) fn saved(memory: &GuestMemory) -> Vec<(File, ZoneContentState)> {
    let files = memory.zones().iter().map(|_| tempfile::tempfile().unwrap());
    let files: Vec<_> = files.collect();
    let copies = files.iter().map(|file| file.try_clone().unwrap());
    let content = RefCell::new(ContentFiles::new(memory, copies, false).unwrap());
    let send = |pages: super::Pages<'_>| content.borrow_mut().write(pages);
    memory
        .send_content::<ContentError>(None, send, |_| Ok(()))
        .unwrap();
    let tables = content.into_inner().finish().unwrap();
    files.into_iter().zip(tables).collect()
}
