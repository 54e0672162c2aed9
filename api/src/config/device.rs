//! Configuration of assigned PCI devices.

use std::path::PathBuf;

use api_macros::section;

/// One PCI device of the host that the guest drives itself (VFIO). Without `iommu`, all of guest RAM is pinned while
/// the device is attached.
#[section(option = "device", about = "Assigned device parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Folder of the device in sysfs. The device and all others of its IOMMU group must be bound to vfio-pci.
    #[key("<device_path>", required)]
    pub path: PathBuf,
    /// Put the device behind the virtual IOMMU.
    #[key(omit_false)]
    pub iommu: bool,
    /// Name of the device; generated when absent.
    #[key("<device_id>")]
    pub id: Option<String>,
    /// PCI segment of the device.
    #[key("<segment_id>")]
    pub pci_segment: u16,
    /// PCI slot on the segment; the next free one when absent.
    #[key("<pci_slot>")]
    pub pci_device_id: Option<u8>,
    /// Group of NVIDIA devices that access each other's memory. Unsupported.
    #[key("<clique_id>")]
    pub x_nv_gpudirect_clique: Option<u8>,
}
