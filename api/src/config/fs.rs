//! Configuration of shared folders.

use std::path::PathBuf;

use api_macros::section;

/// Default number of request queues of a shared folder.
pub const DEFAULT_FS_NUM_QUEUES: usize = 1;
/// Default number of entries in each queue of a shared folder.
pub const DEFAULT_FS_QUEUE_SIZE: u16 = 1024;

/// One folder of the host that a vhost-user process (virtiofsd) shares with the guest. Needs shared memory.
#[section(option = "fs", about = "virtio-fs parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsConfig {
    /// Name under which the guest mounts the folder, at most 36 bytes.
    #[key("<tag_name>", required)]
    pub tag: String,
    /// UNIX socket on which the process listens.
    #[key("<socket_path>", required)]
    pub socket: PathBuf,
    /// Number of request queues.
    #[key("<number_of_queues>", default = DEFAULT_FS_NUM_QUEUES)]
    pub num_queues: usize,
    /// Entries in each queue, a power of two.
    #[key("<size_of_each_queue>", default = DEFAULT_FS_QUEUE_SIZE)]
    pub queue_size: u16,
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
