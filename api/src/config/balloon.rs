//! Configuration of the memory balloon.

use api_macros::section;

use crate::options::parse_bytes;

/// The virtio-balloon device.
#[section(option = "balloon", about = "Balloon parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonConfig {
    /// Target size of the balloon, bytes.
    #[key("<balloon_size>", read = parse_bytes, required, default = 0)]
    pub size: u64,
    /// Let the guest take memory out of the balloon before it kills a process.
    #[key]
    pub deflate_on_oom: bool,
    /// Let the guest report free pages, which are then returned to the host.
    #[key]
    pub free_page_reporting: bool,
    /// Let `vm.balloon-hinting` ask the guest for hints about its free pages. Cloud Hypervisor lacks this key.
    #[key(omit_false)]
    pub free_page_hinting: bool,
    /// Offer the guest a reporting policy (`vm.reclaim-thresholds`, `vm.balloon-reporting`). Experimental. Needs
    /// `free_page_reporting`, and a guest with our kernel patches and `virtio_balloon.reporting_policy=1`. Cloud
    /// Hypervisor lacks this key.
    #[key(omit_false)]
    pub reporting_policy: bool,
    /// Tell the guest which reported memory reads as zeros. Experimental: bit 6 of the feature bits, as proposed to the
    /// virtio committee. Needs `free_page_reporting`. Cloud Hypervisor lacks this key.
    #[key(omit_false)]
    pub device_init: bool,
    /// Milliseconds between two samples of the guest's statistics, at least 100. 0 samples only on demand. Cloud
    /// Hypervisor lacks this key.
    #[key("<milliseconds>")]
    pub stats_poll_ms: u64,
    /// Put the device behind the virtual IOMMU. Unsupported.
    #[key(omit_false)]
    pub iommu: bool,
    /// Name of the device; `__balloon` when absent.
    #[key("<device_id>")]
    pub id: Option<String>,
    /// PCI segment of the device.
    #[key("<segment_id>")]
    pub pci_segment: u16,
    /// PCI slot on the segment; the next free one when absent.
    #[key("<pci_slot>")]
    pub pci_device_id: Option<u8>,
}
