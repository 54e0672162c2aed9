//! Configuration of persistent memory.

use std::path::PathBuf;

use api_macros::section;

use crate::options::parse_bytes;

/// One persistent memory device: a file that the guest maps, outside its RAM.
#[section(option = "pmem", about = "Persistent memory parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PmemConfig {
    /// Backing file, or a folder in which the VMM creates an unnamed file.
    #[key("<backing_file_path>", required)]
    pub file: PathBuf,
    /// Size that the guest sees, bytes; a multiple of 2 MiB. Defaults to the size of the file; required for a folder.
    #[key("<persistent_memory_size>", read = parse_bytes)]
    pub size: Option<u64>,
    /// Put the device behind the virtual IOMMU.
    #[key(omit_false)]
    pub iommu: bool,
    /// Let the guest write to a private copy, and never change the file.
    #[key]
    pub discard_writes: bool,
    /// Name of the device; generated when absent.
    #[key("<device_id>")]
    pub id: Option<String>,
    /// PCI segment of the device.
    #[key("<segment_id>")]
    pub pci_segment: u16,
    /// PCI slot on the segment; the next free one when absent.
    #[key("<pci_slot>")]
    pub pci_device_id: Option<u8>,
}
