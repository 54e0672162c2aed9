//! Configuration of the vsock device.

use std::path::PathBuf;

use api_macros::section;

/// The virtio-vsock device: stream connections between the guest and programs of the host.
#[section(option = "vsock", about = "vsock parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// Address of the guest, 3 to 4294967294.
    #[key("<context_id>", required)]
    pub cid: u32,
    /// UNIX socket that programs of the host connect to. The guest connects to sockets named after it with `_PORT`
    /// added.
    #[key("<socket_path>", required)]
    pub socket: PathBuf,
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
}
