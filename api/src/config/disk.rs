//! Disks.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::rate_limit::RateLimiterConfig;
use super::serde_rules::{enabled, is_false};

/// Queues of a disk that does not say otherwise.
pub const DEFAULT_DISK_NUM_QUEUES: usize = 1;
/// Entries of each queue of a disk that does not say otherwise.
pub const DEFAULT_DISK_QUEUE_SIZE: u16 = 128;

/// One virtio-blk disk.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct DiskConfig {
    /// Image file or block device. Absent only with `vhost_user`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Refuse the guest's writes.
    #[serde(default)]
    pub readonly: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    #[serde(default)]
    pub direct: bool,
    /// Put the device behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// Number of request queues.
    #[serde(default = "default_num_queues")]
    pub num_queues: usize,
    /// Entries in each queue, a power of two.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// Served by a vhost-user process.
    #[serde(default)]
    pub vhost_user: bool,
    /// Socket of that process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// Name of a rate limit group the disk shares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_group: Option<String>,
    /// The disk's own rate limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Name of the device; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment the device is put on.
    #[serde(default)]
    pub pci_segment: u16,
    /// Slot on that segment; the next free one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Serial number the guest reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Host CPUs each queue's worker may run on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_affinity: Option<Vec<VirtQueueAffinity>>,
    /// Let the image refer to other image files.
    #[serde(default)]
    pub backing_files: bool,
    /// Give space the guest discards back to the file system.
    #[serde(default = "enabled")]
    pub sparse: bool,
    /// Format of the image; detected, with writes to sector 0 refused, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_type: Option<ImageType>,
    /// How the image is locked against a second user.
    #[serde(default)]
    pub lock_granularity: LockGranularity,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            path: None,
            readonly: false,
            direct: false,
            iommu: false,
            num_queues: DEFAULT_DISK_NUM_QUEUES,
            queue_size: DEFAULT_DISK_QUEUE_SIZE,
            vhost_user: false,
            vhost_socket: None,
            rate_limit_group: None,
            rate_limiter_config: None,
            id: None,
            pci_segment: 0,
            pci_device_id: None,
            serial: None,
            queue_affinity: None,
            backing_files: false,
            sparse: true,
            image_type: None,
            lock_granularity: LockGranularity::default(),
        }
    }
}

fn default_num_queues() -> usize {
    DEFAULT_DISK_NUM_QUEUES
}

fn default_queue_size() -> u16 {
    DEFAULT_DISK_QUEUE_SIZE
}

/// Format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum ImageType {
    /// VMware flat disk.
    FlatVmdk,
    /// Fixed-size VHD.
    FixedVhd,
    /// QEMU copy-on-write, version 2 or 3.
    Qcow2,
    /// The bytes of the disk, nothing else.
    Raw,
    /// Hyper-V VHDX.
    Vhdx,
    /// Not known to us; only where somebody else reads the image.
    Unknown,
}

/// How a disk image is locked against a second user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum LockGranularity {
    /// Lock the byte range the disk covers.
    #[default]
    ByteRange,
    /// Lock the whole file.
    Full,
}

/// Pins the worker of one queue.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct VirtQueueAffinity {
    /// Index of the queue, from 0.
    pub queue_index: u16,
    /// Host CPUs its worker may run on, by the host's numbers.
    pub host_cpus: Vec<usize>,
}
