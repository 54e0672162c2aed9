//! Disks.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::rate_limit::RateLimiterConfig;
use super::serde_rules::{enabled, is_false};
use crate::options::{OptionError, Options};

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

impl DiskConfig {
    /// Syntax of `--disk`.
    pub const SYNTAX: &str = "Disk parameters \"path=<disk_image_path>,readonly=on|off,direct=on|off,iommu=on|off,\
        num_queues=<number_of_queues>,queue_size=<size_of_each_queue>,\
        queue_affinity=<list_of_queue_indices_with_their_associated_cpuset>,\
        image_type=raw|qcow2|vhd|vhdx|vmdk,sparse=on|off,backing_files=on|off,\
        lock_granularity=byte-range|full,serial=<serial_number>,\
        vhost_user=on|off,socket=<vhost_user_socket_path>,\
        bw_size=<bytes>,bw_one_time_burst=<bytes>,bw_refill_time=<ms>,\
        ops_size=<io_ops>,ops_one_time_burst=<io_ops>,ops_refill_time=<ms>,\
        rate_limit_group=<group_id>,id=<device_id>,pci_segment=<segment_id>,pci_device_id=<pci_slot>\"";

    /// Reads the value of one `--disk`.
    ///
    /// # Errors
    /// An unknown key or a malformed value.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let options = Options::parse("disk", text, DISK_KEYS, &[])?;
        let queue_affinity = options.integer_map("queue_affinity")?.map(|pairs| {
            pairs
                .into_iter()
                .map(|(queue_index, host_cpus)| VirtQueueAffinity {
                    queue_index,
                    host_cpus,
                })
                .collect()
        });
        Ok(Self {
            path: options.text("path").map(PathBuf::from),
            readonly: options.toggle("readonly")?.unwrap_or(false),
            direct: options.toggle("direct")?.unwrap_or(false),
            iommu: options.toggle("iommu")?.unwrap_or(false),
            num_queues: options
                .parsed("num_queues")?
                .unwrap_or(DEFAULT_DISK_NUM_QUEUES),
            queue_size: options
                .parsed("queue_size")?
                .unwrap_or(DEFAULT_DISK_QUEUE_SIZE),
            vhost_user: options.toggle("vhost_user")?.unwrap_or(false),
            vhost_socket: options.text("socket").map(PathBuf::from),
            rate_limit_group: options.string("rate_limit_group"),
            rate_limiter_config: RateLimiterConfig::from_options(&options)?,
            id: options.string("id"),
            pci_segment: options.parsed("pci_segment")?.unwrap_or(0),
            pci_device_id: options.parsed("pci_device_id")?,
            serial: options.string("serial"),
            queue_affinity,
            backing_files: options.toggle("backing_files")?.unwrap_or(false),
            sparse: options.toggle("sparse")?.unwrap_or(true),
            image_type: options.word("image_type", IMAGE_TYPE_WORDS)?,
            lock_granularity: options
                .word(
                    "lock_granularity",
                    &[
                        ("byte-range", LockGranularity::ByteRange),
                        ("full", LockGranularity::Full),
                    ],
                )?
                .unwrap_or_default(),
        })
    }
}

const DISK_KEYS: &[&str] = &[
    "path",
    "readonly",
    "direct",
    "iommu",
    "num_queues",
    "queue_size",
    "queue_affinity",
    "image_type",
    "sparse",
    "backing_files",
    "lock_granularity",
    "serial",
    "vhost_user",
    "socket",
    "bw_size",
    "bw_one_time_burst",
    "bw_refill_time",
    "ops_size",
    "ops_one_time_burst",
    "ops_refill_time",
    "rate_limit_group",
    "id",
    "pci_segment",
    "pci_device_id",
];

const IMAGE_TYPE_WORDS: &[(&str, ImageType)] = &[
    ("raw", ImageType::Raw),
    ("qcow2", ImageType::Qcow2),
    ("vhd", ImageType::FixedVhd),
    ("vhdx", ImageType::Vhdx),
    ("vmdk", ImageType::FlatVmdk),
];
