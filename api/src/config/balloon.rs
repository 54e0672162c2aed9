//! The memory balloon.

use serde::{Deserialize, Serialize};

use super::serde_rules::is_false;

/// The virtio-balloon device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct BalloonConfig {
    /// Bytes the guest shall give up to the balloon.
    pub size: u64,
    /// Let the guest take memory back out of the balloon before it kills a process.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Let the guest report free pages, which are then given back to the host.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// Put the device behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// Name of the device; `__balloon` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment the device is put on.
    #[serde(default)]
    pub pci_segment: u16,
    /// Slot on that segment; the next free one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}
