//! Measures the memory that the VMM itself uses, with an idle guest that has a balloon, a disk and a network interface.

use std::fs::File;
use std::path::Path;

use anyhow::Result;
use tempfile::TempDir;

use crate::linux::Machine;
use crate::mappings::{Mapping, beside_guest_ram};

const GUEST_BYTES: u64 = 512 << 20;
/// Size of the disk.
pub const DISK_BYTES: u64 = 64 << 20;

/// A sparse disk of 64 MiB and its option; the folder must outlive the guest.
///
/// # Errors
/// The file cannot be created.
pub fn disk_image() -> Result<(TempDir, String)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.raw");
    File::create(&path)?.set_len(DISK_BYTES)?;
    let option = format!("path={},image_type=raw", path.display());
    Ok((folder, option))
}

/// Resident memory outside of guest RAM.
#[derive(Debug)]
pub struct Overhead {
    /// Bytes of the host's memory.
    pub resident: u64,
    /// Part of it that is not backed by a file.
    pub anonymous: u64,
    /// The mappings.
    pub maps: Vec<Mapping>,
}

impl Overhead {
    /// Measures `vmm`, or the VMM under test.
    ///
    /// # Errors
    /// The guest does not boot.
    pub fn measure(vmm: Option<&Path>) -> Result<Self> {
        let (_folder, disk) = disk_image()?;
        let guest = Machine {
            vmm,
            arguments: &[
                "--balloon",
                "size=0,free_page_reporting=on",
                "--disk",
                &disk,
                "--net",
                "tap=overhead0",
            ],
            ..Machine::default()
        }
        .serve()?;
        let maps = beside_guest_ram(guest.vmm.pid(), GUEST_BYTES)?;
        Ok(Self {
            resident: maps.iter().map(|map| map.resident).sum(),
            anonymous: maps.iter().map(|map| map.anonymous).sum(),
            maps,
        })
    }
}
