//! Resident memory of the VMM outside of guest RAM, with the guest idle.

use std::fs::File;
use std::path::Path;

use anyhow::Result;
use integration_tests::linux::Machine;
use integration_tests::mappings::{Mapping, beside_guest_ram};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::MIB;

const GUEST_BYTES: u64 = 512 * MIB;
const DISK_BYTES: u64 = 64 * MIB;

/// A sparse disk of 64 MiB and its option; the folder must outlive the guest.
pub(crate) fn disk_image() -> Result<(TempDir, String)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.raw");
    File::create(&path)?.set_len(DISK_BYTES)?;
    let option = format!("path={},image_type=raw", path.display());
    Ok((folder, option))
}

/// Of `vmm`, for a guest with balloon, disk and net.
pub(crate) fn measure(vmm: &Path) -> Result<Value> {
    let (_folder, disk) = disk_image()?;
    let guest = Machine {
        vmm: Some(vmm),
        arguments: &[
            "--balloon",
            "size=0,free_page_reporting=on",
            "--disk",
            &disk,
            "--net",
            "tap=vmbench0",
        ],
        ..Machine::default()
    }
    .serve()?;
    let maps = beside_guest_ram(guest.vmm.pid(), GUEST_BYTES)?;
    let sum = |field: fn(&Mapping) -> u64| -> u64 { maps.iter().map(field).sum() };
    let mut largest: Vec<&Mapping> = maps.iter().collect();
    largest.sort_by_key(|map| std::cmp::Reverse(map.anonymous));
    let largest: Vec<Value> = largest
        .iter()
        .take(6)
        .map(|map| json!({ "name": map.name, "anonymous_bytes": map.anonymous }))
        .collect();
    Ok(json!({
        "resident_bytes": sum(|map| map.resident),
        "anonymous_bytes": sum(|map| map.anonymous),
        "largest_anonymous": largest,
    }))
}
