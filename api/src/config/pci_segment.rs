//! Configuration of a PCI segment.

use api_macros::section;

/// Default share of a segment in a window.
pub const DEFAULT_APERTURE_WEIGHT: u32 = 1;

/// One PCI segment. The segments share the two windows of addresses for devices by their weights.
#[section(option = "pci-segment", about = "PCI segment parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciSegmentConfig {
    /// Number of the segment.
    #[key("<segment_id>", required)]
    pub pci_segment: u16,
    /// Share in the window below 4 GiB, 1 to 65535, relative to the other segments.
    #[key("<scale>", default = DEFAULT_APERTURE_WEIGHT)]
    pub mmio32_aperture_weight: u32,
    /// Share in the window above RAM, 1 to 65535, relative to the other segments.
    #[key("<scale>", default = DEFAULT_APERTURE_WEIGHT)]
    pub mmio64_aperture_weight: u32,
}
