//! Configuration of the clock device.

use api_macros::section;

/// The virtio-rtc device, from which the guest reads the host's clock.
#[section(option = "rtc", about = "Clock device parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RtcConfig {
    /// Put the device behind the virtual IOMMU.
    #[key(omit_false)]
    pub iommu: bool,
    /// Name of the device; `__rtc` when absent.
    #[key("<device_id>")]
    pub id: Option<String>,
    /// PCI segment of the device.
    #[key("<segment_id>")]
    pub pci_segment: u16,
    /// PCI slot on the segment; the next free one when absent.
    #[key("<pci_slot>")]
    pub pci_device_id: Option<u8>,
}
