//! Configuration of disks.

use std::path::PathBuf;

use api_macros::{Words, section};
pub use device_facts::LockGranularity;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rate_limit::{RATE_LIMIT_KEYS, RateLimiterConfig};
use crate::options::{OptionValue, ValueError, Words, parse_integer_map};

/// Default number of queues of a disk.
pub const DEFAULT_DISK_NUM_QUEUES: usize = 1;
/// Default number of entries in each queue of a disk.
pub const DEFAULT_DISK_QUEUE_SIZE: u16 = 128;

/// One virtio-blk disk.
#[section(option = "disk", about = "Disk parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// Image file or block device. Absent only with `vhost_user`.
    #[key("<disk_image_path>")]
    pub path: Option<PathBuf>,
    /// Reject the guest's writes.
    #[key]
    pub readonly: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    #[key]
    pub direct: bool,
    /// Put the device behind the virtual IOMMU. Unsupported with `vhost_user`.
    #[key(omit_false)]
    pub iommu: bool,
    /// Number of request queues.
    #[key("<number_of_queues>", default = DEFAULT_DISK_NUM_QUEUES)]
    pub num_queues: usize,
    /// Entries in each queue, a power of two.
    #[key("<size_of_each_queue>", default = DEFAULT_DISK_QUEUE_SIZE)]
    pub queue_size: u16,
    /// Served by the vhost-user back end at `socket`, which has the image. Needs shared memory.
    #[key]
    pub vhost_user: bool,
    /// Socket on which the vhost-user back end listens.
    #[key("<vhost_user_socket_path>", name = "socket")]
    pub vhost_socket: Option<PathBuf>,
    /// Name of a rate limit group the disk shares.
    #[key("<group_id>")]
    pub rate_limit_group: Option<String>,
    /// The disk's own rate limit.
    #[key(group = RATE_LIMIT_KEYS)]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Name of the device; generated when absent.
    #[key("<device_id>")]
    pub id: Option<String>,
    /// PCI segment of the device.
    #[key("<segment_id>")]
    pub pci_segment: u16,
    /// PCI slot on the segment; the next free one when absent.
    #[key("<pci_slot>")]
    pub pci_device_id: Option<u8>,
    /// Serial number the guest reads.
    #[key("<serial_number>")]
    pub serial: Option<String>,
    /// Host CPUs each queue's worker may run on.
    #[key]
    pub queue_affinity: Option<Vec<VirtQueueAffinity>>,
    /// Allow the image to refer to other files (qcow2, vmdk).
    #[key]
    pub backing_files: bool,
    /// Return space the guest discards to the file system.
    #[key(default = true)]
    pub sparse: bool,
    /// Format of the image; vhdx is unsupported, and vmdk can only be read. When absent, qcow2 and vmdk are detected, and any
    /// other supported image is raw; the guest then cannot write the signature of another format.
    #[key]
    pub image_type: Option<ImageType>,
    /// How the image is locked against a second user.
    #[key]
    pub lock_granularity: LockGranularity,
    /// Do not use io_uring, for tests: Linux AIO serves direct I/O instead, and system calls serve the rest.
    #[key(name = "_disable_io_uring", hidden, omit_false)]
    pub disable_io_uring: bool,
    /// Do not use Linux AIO, for tests: system calls take its place.
    #[key(name = "_disable_aio", hidden, omit_false)]
    pub disable_aio: bool,
}

/// Format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema, Words)]
pub enum ImageType {
    /// VMware flat disk, only read.
    #[word("vmdk")]
    FlatVmdk,
    /// Fixed-size VHD.
    #[word("vhd")]
    FixedVhd,
    /// QEMU copy-on-write, version 2 or 3.
    #[word("qcow2")]
    Qcow2,
    /// The bytes of the disk only.
    #[word("raw")]
    Raw,
    /// Hyper-V VHDX. Unsupported.
    #[word("vhdx")]
    Vhdx,
    /// As if absent.
    Unknown,
}

impl Words for LockGranularity {
    const WORDS: &'static [(&'static str, Self)] = &Self::WORDS;
}

/// Pins the worker of one queue.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct VirtQueueAffinity {
    /// Index of the queue, from 0.
    pub queue_index: u16,
    /// Host CPUs that its worker may run on, by the host's numbers.
    #[serde(deserialize_with = "crate::bounded::list")]
    pub host_cpus: Vec<usize>,
}

impl OptionValue for Vec<VirtQueueAffinity> {
    fn values() -> String {
        "<list_of_queue_indices_with_their_associated_cpuset>".to_owned()
    }

    fn read(text: &str) -> Result<Self, ValueError> {
        let pairs = parse_integer_map(text)?.into_iter();
        let pins = pairs.map(|(queue_index, host_cpus)| VirtQueueAffinity {
            queue_index,
            host_cpus,
        });
        Ok(pins.collect())
    }
}
