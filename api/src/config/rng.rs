//! Configuration of the random number device.

use std::path::PathBuf;

use api_macros::section;

/// Default source of entropy.
pub const DEFAULT_RNG_SOURCE: &str = "/dev/urandom";

/// The virtio-rng device.
#[section(option = "rng", about = "Random number generator parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RngConfig {
    /// Source of the entropy.
    #[key("<entropy_source_path>", required, default = PathBuf::from(DEFAULT_RNG_SOURCE))]
    pub src: PathBuf,
    /// Put the device behind the virtual IOMMU.
    #[key(omit_false)]
    pub iommu: bool,
    /// Name of the device; `__rng` when absent.
    #[key("<device_id>")]
    pub id: Option<String>,
    /// PCI segment of the device.
    #[key("<segment_id>")]
    pub pci_segment: u16,
    /// PCI slot on the segment; the next free one when absent.
    #[key("<pci_slot>")]
    pub pci_device_id: Option<u8>,
}
