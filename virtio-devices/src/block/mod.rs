//! virtio-blk (virtio 1.2 §5.2): image files and host block devices.
//!
//! ```text
//!   device     configuration half: features, configuration space
//!   queue      one worker per virtqueue: takes chains, completes them
//!   request    parses and checks a descriptor chain as a request
//!   job        a request as a sequence of I/O operations
//!   flights    jobs in the I/O engine, bounded in number and cost
//!   engine     io_uring, Linux AIO, or system calls on the worker thread
//!   image      sizes, format    image_file   opening, locking    format   signatures
//!   container  qcow2 images and flat VMDKs, and what they refer to
//!   resize     a new size, from the VMM
//!   config_space   what the guest reads       counters the disk's counters
//! ```
//!
//! As the standard requires, a FLUSH covers every request that was completed before the FLUSH was made available. Data
//! of completed writes is in the page cache or on the device, and the flush is an `fdatasync` of the one file behind
//! all queues.

#[cfg(any(test, feature = "test-utils"))]
pub mod any_image;
mod config_space;
mod container;
mod counters;
mod device;
mod disk;
mod disk_sys;
mod engine;
mod flights;
mod format;
mod image;
mod image_file;
mod job;
mod queue;
mod request;
mod resize;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

pub use container::{ContainerError, Qcow2Error, VhdError, VmdkError, backing_files};
pub use device::{Block, BlockState};
pub use device_facts::LockGranularity;
pub use format::ImageFormat;
pub use resize::{DiskHandle, DiskResizeError};

use crate::rate_limit::RateLimiter;

/// Unit of addresses and capacity in the protocol, regardless of the block size.
pub const SECTOR_BYTES: u64 = 512;

/// Maximum queue size: a request may fill the ring with its pieces, and the kernel accepts 1024 of them in one call.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// Maximum number of queues of one disk.
pub const QUEUES_MAX: u16 = 256;

/// Maximum number of sectors of one write zeroes request: 16 MiB. If the file system cannot zero a range itself, zeroes
/// are written, and a pause or a reset waits for every request in flight.
const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 15;

/// Maximum data of one read or write. A pause or a reset waits for every request in flight, and firmware, which ignores
/// the limit of segments, reads whole files at once.
const DATA_BYTES_MAX: u64 = 64 << 20;

/// The engine that serves a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// io_uring if the kernel supports and allows it, otherwise as [`EngineChoice::Aio`].
    #[default]
    Auto,
    /// io_uring if the kernel supports and allows it, otherwise system calls.
    WithoutAio,
    /// io_uring; an error if it is not available.
    IoUring,
    /// Linux AIO for direct I/O if the kernel supports and allows it, otherwise system calls.
    Aio,
    /// System calls on the worker thread, one at a time.
    Sync,
}

/// Parameters of a disk.
#[derive(Debug, Clone, Default)]
pub struct BlockParams {
    /// Used in the names of the worker threads, e.g. `_disk0`.
    pub id: String,
    /// Image file or block device.
    pub path: PathBuf,
    /// The guest may not write; the image gets only a read lock.
    pub readonly: bool,
    /// Bypasses the host's page cache.
    pub direct: bool,
    /// Number of queues, 1 to [`QUEUES_MAX`].
    pub num_queues: u16,
    /// Entries of each queue: a power of two from 4 to [`QUEUE_SIZE_MAX`].
    pub queue_size: u16,
    /// Up to 20 bytes for GET_ID; derived from device and inode if absent.
    pub serial: Option<String>,
    /// Discarded ranges become holes. If off, the whole file is allocated at the start, and nothing is ever deallocated.
    pub sparse: bool,
    /// Format of the image. `None`: it is detected, and the guest cannot write the signature of another format.
    pub format: Option<ImageFormat>,
    /// The image may refer to other images.
    pub backing_files: bool,
    /// The range to lock.
    pub lock_granularity: LockGranularity,
    /// The I/O engine.
    pub engine: EngineChoice,
    /// Host CPUs on which the worker of a queue may run; any for queues without an entry.
    pub queue_affinity: BTreeMap<u16, Vec<usize>>,
    /// Rate limits of all queues together; disks may share them.
    pub limiter: Arc<RateLimiter>,
}

/// Errors of creating a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The path cannot be opened.
    #[error("cannot open disk image {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Neither a file nor a block device (a directory, socket, character device, …).
    #[error("{} is neither a regular file nor a block device", path.display())]
    NotADisk {
        /// The path.
        path: PathBuf,
    },
    /// The file system cannot bypass the page cache.
    #[error("{} does not support direct I/O (direct=on)", path.display())]
    NoDirectIo {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The size or block sizes cannot be determined.
    #[error("cannot inspect disk image {}", path.display())]
    Inspect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// An image that is not raw, or one that it refers to, cannot be used.
    #[error("cannot use disk image {}", path.display())]
    Container {
        /// The image at fault.
        path: PathBuf,
        #[source]
        source: ContainerError,
    },
    /// Another process, or another disk of this one, has it locked.
    #[error("cannot lock {} for {access}: it is in use by another process", path.display())]
    Locked {
        path: PathBuf,
        /// "reading" or "writing".
        access: &'static str,
        #[source]
        source: io::Error,
    },
    /// The file system does not support locking.
    #[error("cannot lock {}", path.display())]
    Lock {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Number of queues out of range.
    #[error("num_queues must be between 1 and {QUEUES_MAX}; got {num_queues}")]
    QueueCount {
        /// The requested value.
        num_queues: u16,
    },
    /// Queue size out of range.
    #[error("queue size {queue_size} is not a power of two from 4 to {QUEUE_SIZE_MAX}")]
    QueueSize {
        /// The requested value.
        queue_size: u16,
    },
    /// Serial too long for GET_ID.
    #[error("serial must be at most 20 bytes long; got {bytes}")]
    SerialTooLong {
        /// Its length.
        bytes: usize,
    },
    /// The I/O engine cannot be set up.
    #[error("cannot set up the I/O engine of {}", path.display())]
    Engine {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}
