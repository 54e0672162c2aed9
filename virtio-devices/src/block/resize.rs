//! Changes the size of a disk while the guest uses it (virtio 1.2 §5.2.6: a change of capacity is a configuration change).

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::disk::DiskState;
use super::{ImageFormat, SECTOR_BYTES};

/// The VMM's handle of a disk; keeps the image open. No call waits for the guest.
#[derive(Clone, Debug)]
pub struct DiskHandle {
    disk: Arc<DiskState>,
}

/// Reasons why a disk cannot be resized.
#[derive(Debug, thiserror::Error)]
pub enum DiskResizeError {
    /// Only whole blocks can be addressed.
    #[error("the size of a disk must be a positive multiple of {block_bytes} bytes; got {bytes}")]
    NotWholeBlocks {
        /// The requested size.
        bytes: u64,
        /// Size of a sector, or of a block for direct I/O.
        block_bytes: u64,
    },
    /// The image is open for reading only.
    #[error("cannot resize {}: the disk is read-only", path.display())]
    Readonly {
        /// The image.
        path: PathBuf,
    },
    /// Only a raw image can get another size.
    #[error(
        "cannot resize {}: the disk is a {format} image; {}",
        path.display(),
        match format {
            ImageFormat::Qcow2 => "resize it with \"qemu-img resize\" while no VM uses it",
            _ => "convert it with \"qemu-img convert -O qcow2\" or \"-O raw\" first",
        }
    )]
    Format {
        /// The image.
        path: PathBuf,
        /// Its format.
        format: ImageFormat,
    },
    /// Only the owner of a block device can change its size.
    #[error(
        "cannot resize {} to {bytes} bytes: the block device has {device_bytes} bytes; resize it first",
        path.display()
    )]
    OtherDeviceSize {
        /// The block device.
        path: PathBuf,
        /// The requested size.
        bytes: u64,
        /// The size of the device.
        device_bytes: u64,
    },
    /// Another process has locked the part that would be added.
    #[error("cannot lock {} up to {bytes} bytes", path.display())]
    Lock {
        path: PathBuf,
        /// The requested size.
        bytes: u64,
        #[source]
        source: io::Error,
    },
    /// The operating system rejected the new size.
    #[error("cannot resize {} to {bytes} bytes", path.display())]
    Host {
        path: PathBuf,
        /// The requested size.
        bytes: u64,
        #[source]
        source: io::Error,
    },
}

impl DiskResizeError {
    /// Whether the request is at fault, and not the host.
    #[must_use]
    pub fn is_of_request(&self) -> bool {
        !matches!(self, Self::Lock { .. } | Self::Host { .. })
    }
}

impl DiskHandle {
    pub(super) fn new(disk: Arc<DiskState>) -> Self {
        Self { disk }
    }

    /// Writes the completed data of the paused disk to stable storage.
    ///
    /// # Errors
    /// The error of fdatasync.
    pub fn sync(&self) -> io::Result<()> {
        if self.disk.is_readonly() {
            return Ok(());
        }
        self.disk.image().sync()
    }

    /// Writes the data in the host's page cache to stable storage, so that a later [`DiskHandle::sync`] has less to do. The
    /// disk may run.
    ///
    /// # Errors
    /// The error of fdatasync.
    pub fn write_back(&self) -> io::Result<()> {
        if self.disk.is_readonly() {
            return Ok(());
        }
        self.disk.image().file().sync_data()
    }

    /// Releases the lock of the image, or takes it again. The caller must have paused the disk.
    ///
    /// # Errors
    /// `WouldBlock`: another process has a conflicting lock.
    pub fn hold(&self, hold: bool) -> io::Result<()> {
        self.disk.image().hold(hold)
    }

    /// Resizes the image file, or adopts the new size of a block device, and notifies the guest. The caller must have
    /// paused the disk, so that no request in flight writes beyond the new end.
    ///
    /// # Errors
    /// The size is invalid, or the host rejected it; nothing has changed then.
    pub fn resize(&self, bytes: u64) -> Result<(), DiskResizeError> {
        let image = self.disk.image();
        let path = || self.disk.path().to_path_buf();
        if image.format() != ImageFormat::Raw {
            return Err(DiskResizeError::Format {
                path: path(),
                format: image.format(),
            });
        }
        let block_bytes = image
            .dio()
            .map_or(SECTOR_BYTES, |align| SECTOR_BYTES.max(align.offset as u64));
        if bytes == 0 || !bytes.is_multiple_of(block_bytes) {
            return Err(DiskResizeError::NotWholeBlocks { bytes, block_bytes });
        }
        let host = |source| DiskResizeError::Host {
            path: path(),
            bytes,
            source,
        };
        if image.is_block_device() {
            let device_bytes = image.file_bytes().map_err(host)?;
            if device_bytes != bytes {
                return Err(DiskResizeError::OtherDeviceSize {
                    path: path(),
                    bytes,
                    device_bytes,
                });
            }
        } else if self.disk.is_readonly() {
            return Err(DiskResizeError::Readonly { path: path() });
        }
        image
            .lock_up_to(bytes)
            .map_err(|source| DiskResizeError::Lock {
                path: path(),
                bytes,
                source,
            })?;
        if !image.is_block_device() {
            image.file().set_len(bytes).map_err(host)?;
        }
        image.forget_tail();
        self.disk.set_capacity(bytes / SECTOR_BYTES);
        Ok(())
    }
}
