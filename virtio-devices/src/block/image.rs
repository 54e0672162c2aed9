//! Opens and locks an image file or host block device.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::container::{Container, ContainerError, VhdError, fixed_disk_bytes};
use super::format::{self, ImageFormat};
use super::image_file::{file_bytes, is_disk, lock, open_file, signature};
use super::{BlockError, BlockParams, LockGranularity, SECTOR_BYTES, disk_sys};
use crate::{Unpoisoned, file_lock};

/// Direct I/O alignment assumed if the kernel does not report it: the largest common logical block size.
const DIO_ALIGN_FALLBACK_BYTES: u32 = 4096;

/// Alignment that direct I/O requires, in bytes (powers of two).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DioAlignment {
    pub(super) memory: usize,
    /// Alignment of file offsets and of the length of each piece.
    pub(super) offset: usize,
}

/// The block sizes reported to the guest, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Topology {
    pub(super) logical: u32,
    pub(super) physical: u32,
    pub(super) io_min: u32,
    pub(super) io_opt: u32,
    /// The alignment of discards.
    pub(super) discard: u32,
}

/// The end of an image whose size is not a multiple of the transfer size.
#[derive(Debug)]
struct Tail {
    /// Where it begins; the largest number once the image has another size.
    start: AtomicU64,
    /// The image without direct I/O, if it is open for that.
    buffered: Option<File>,
}

impl Tail {
    fn open(params: &BlockParams, start: u64) -> Result<Self, BlockError> {
        let buffered = BlockParams {
            direct: false,
            ..params.clone()
        };
        let buffered = params.direct.then(|| open_file(&buffered));
        Ok(Self {
            start: AtomicU64::new(start),
            buffered: buffered.transpose()?,
        })
    }
}

/// An opened, locked image. The lock exists as long as the descriptor.
#[derive(Debug)]
pub(super) struct Image {
    /// Dropped first, because it writes to `file`.
    container: Option<Container>,
    file: File,
    format: ImageFormat,
    block_device: bool,
    dio: Option<DioAlignment>,
    bytes: u64,
    tail: Option<Tail>,
    topology: Topology,
    default_serial: String,
    partial_writes: Mutex<()>,
    exclusive: bool,
    lock_granularity: LockGranularity,
}

impl Image {
    /// Opens `params.path`, checks its format and locks it.
    pub(super) fn open(params: &BlockParams) -> Result<Self, BlockError> {
        let path = &params.path;
        let stat = std::fs::metadata(path).map_err(|source| BlockError::Open {
            path: path.clone(),
            source,
        })?;
        let block_device = stat.file_type().is_block_device();
        if !is_disk(&stat) {
            return Err(BlockError::NotADisk { path: path.clone() });
        }
        let (format, bytes_of_format) = format_of(params, block_device)?;
        let file = open_file(params)?;
        lock(&file, params)?;
        let container = match format {
            ImageFormat::Qcow2 | ImageFormat::Vmdk => Some(Container::open(params, format, &file)?),
            _ => None,
        };
        let bytes = match (&container, bytes_of_format) {
            (Some(container), _) => container.bytes(),
            (None, Some(bytes)) => bytes,
            (None, None) => file_bytes(&file).map_err(|source| BlockError::Inspect {
                path: path.clone(),
                source,
            })?,
        };
        let dio = params.direct.then(|| dio_alignment(&file, block_device));
        let unit_bytes = dio.map_or(SECTOR_BYTES, |align| SECTOR_BYTES.max(align.offset as u64));
        let tail = match container.is_some() || bytes.is_multiple_of(unit_bytes) {
            true => None,
            false => Some(Tail::open(params, bytes / unit_bytes * unit_bytes)?),
        };
        let mut topology =
            topology(&file, block_device, params.direct, bytes).map_err(|source| {
                BlockError::Inspect {
                    path: path.clone(),
                    source,
                }
            })?;
        if let Some(container) = &container {
            topology.discard = container.cluster_bytes();
        }
        let is_allocated = params.sparse || params.readonly || block_device || bytes == 0;
        if !(is_allocated || container.is_some())
            && let Err(error) = disk_sys::allocate(&file, bytes)
        {
            // As upstream: the disk works nevertheless, as long as there is space.
            log::warn!("{}: cannot be allocated: {error}", path.display());
        }
        Ok(Self {
            container,
            file,
            format,
            block_device,
            dio,
            bytes,
            tail,
            topology,
            default_serial: serial_of(&stat),
            partial_writes: Mutex::new(()),
            exclusive: !params.readonly,
            lock_granularity: params.lock_granularity,
        })
    }

    /// The current size of the file or block device.
    pub(super) fn file_bytes(&self) -> io::Result<u64> {
        file_bytes(&self.file)
    }

    /// Extends a lock of the image's size to `bytes`. The kernel merges it with the existing lock.
    pub(super) fn lock_up_to(&self, bytes: u64) -> io::Result<()> {
        match self.lock_granularity {
            LockGranularity::Full => Ok(()),
            LockGranularity::ByteRange => file_lock::lock(&self.file, self.exclusive, bytes),
        }
    }

    /// Takes the lock of an image that was opened, or releases it.
    pub(super) fn hold(&self, hold: bool) -> io::Result<()> {
        self.hold_file(&self.file, self.exclusive, hold)?;
        let Some(container) = &self.container else {
            return Ok(());
        };
        for file in container.backing() {
            self.hold_file(file, false, hold)?;
        }
        match hold {
            true => container.reload(),
            false => Ok(()),
        }
    }

    fn hold_file(&self, file: &File, exclusive: bool, hold: bool) -> io::Result<()> {
        if !hold {
            return file_lock::unlock(file);
        }
        let bytes = match self.lock_granularity {
            LockGranularity::Full => 0,
            LockGranularity::ByteRange => file_bytes(file)?,
        };
        file_lock::lock(file, exclusive, bytes)
    }

    /// Writes all completed data to stable storage.
    pub(super) fn sync(&self) -> io::Result<()> {
        if let Some(container) = &self.container {
            container.flush()?;
        }
        self.file.sync_data()
    }

    /// `Some` if the content of the disk is not simply the content of the file.
    pub(super) fn container(&self) -> Option<&Container> {
        self.container.as_ref()
    }

    /// Whether sector 0 of the disk is sector 0 of the file.
    pub(super) fn is_flat(&self) -> bool {
        self.container.is_none()
    }

    pub(super) fn format(&self) -> ImageFormat {
        self.format
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Whether discarding is something else than punching a hole into a file.
    pub(super) fn has_own_discard(&self) -> bool {
        self.block_device || self.container.is_some()
    }

    pub(super) fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// `Some` if opened for direct I/O.
    pub(super) fn dio(&self) -> Option<DioAlignment> {
        self.dio
    }

    /// Locked while part of a block is read, changed and written back.
    pub(super) fn lock_partial_writes(&self) -> MutexGuard<'_, ()> {
        // The lock protects no data that a panic could have left inconsistent.
        self.partial_writes.lock().unpoisoned()
    }

    /// Size when opened. The last sector may be in the file in part; the rest of it reads as zeros.
    pub(super) fn sectors(&self) -> u64 {
        self.bytes.div_ceil(SECTOR_BYTES)
    }

    /// Where the end begins that needs [`Image::tail_file`].
    pub(super) fn tail_start(&self) -> u64 {
        let tail = self.tail.as_ref();
        tail.map_or(u64::MAX, |tail| tail.start.load(Ordering::Relaxed))
    }

    /// For transfers of any size and alignment.
    pub(super) fn tail_file(&self) -> &File {
        let buffered = self.tail.as_ref().and_then(|tail| tail.buffered.as_ref());
        buffered.unwrap_or(&self.file)
    }

    /// How many zeros follow if a read ends at `offset`: the rest of the last sector.
    pub(super) fn padding_at(&self, offset: u64) -> usize {
        match offset == self.bytes {
            true => (offset.next_multiple_of(SECTOR_BYTES) - offset) as usize,
            false => 0,
        }
    }

    /// The image was resized to whole units. The caller has paused the disk.
    pub(super) fn forget_tail(&self) {
        if let Some(tail) = &self.tail {
            tail.start.store(u64::MAX, Ordering::Relaxed);
        }
    }

    pub(super) fn topology(&self) -> Topology {
        self.topology
    }

    /// Serial derived from device and inode, the same at every start.
    pub(super) fn default_serial(&self) -> &str {
        &self.default_serial
    }
}

/// The format of the image, and the size of the disk if the format states it at the end of the file.
fn format_of(
    params: &BlockParams,
    block_device: bool,
) -> Result<(ImageFormat, Option<u64>), BlockError> {
    if params.format == Some(ImageFormat::Raw) {
        return Ok((ImageFormat::Raw, None));
    }
    let path = &params.path;
    let inspect = |source| BlockError::Inspect {
        path: path.clone(),
        source,
    };
    let rejected = |source| BlockError::Container {
        path: path.clone(),
        source,
    };
    let file = File::open(path).map_err(|source| BlockError::Open {
        path: path.clone(),
        source,
    })?;
    let bytes = file_bytes(&file).map_err(inspect)?;
    let (front, back) = signature(&file, bytes).map_err(inspect)?;
    let found = format::detect(&front);
    let format = params.format.unwrap_or(found);
    let has_footer = format::is_vhd_footer(&back);
    match format {
        ImageFormat::Raw => {
            let footer = match has_footer {
                true => " It ends with the footer of a VHD: if it is one, set image_type=vhd",
                false => "",
            };
            log::warn!(
                "{}: no image_type is given: the image is treated as raw, and the guest cannot write the signature of another format.{footer}",
                path.display()
            );
            Ok((format, None))
        }
        ImageFormat::Vhdx => Err(rejected(ContainerError::Unsupported(format))),
        _ if block_device => Err(rejected(ContainerError::NotAFile)),
        ImageFormat::Qcow2 | ImageFormat::Vmdk if found == format => Ok((format, None)),
        // The signature of a dynamic one is at the front.
        ImageFormat::Vhd if params.format.is_none() => Err(rejected(VhdError::NotFixed.into())),
        ImageFormat::Vhd if found == format || has_footer => {
            let disk_bytes = fixed_disk_bytes(&back, bytes);
            let disk_bytes = disk_bytes.map_err(|error| rejected(error.into()))?;
            Ok((format, Some(disk_bytes)))
        }
        ImageFormat::Qcow2 | ImageFormat::Vhd | ImageFormat::Vmdk => {
            Err(rejected(ContainerError::OtherFormat(format)))
        }
    }
}

fn dio_alignment(file: &File, block_device: bool) -> DioAlignment {
    let (memory, offset) = disk_sys::dio_alignment(file)
        .or_else(|| {
            let logical = block_device
                .then(|| disk_sys::block_device_sizes(file).ok())??
                .logical;
            Some((logical, logical))
        })
        .unwrap_or((DIO_ALIGN_FALLBACK_BYTES, DIO_ALIGN_FALLBACK_BYTES));
    DioAlignment {
        memory: memory as usize,
        offset: offset as usize,
    }
}

/// A block device passes its sizes on. An image file is a disk of 512-byte blocks. With direct I/O its blocks are those
/// that the file system needs for it, as upstream has it, unless that would hide its last sectors.
fn topology(file: &File, block_device: bool, direct: bool, bytes: u64) -> io::Result<Topology> {
    if block_device {
        let sizes = disk_sys::block_device_sizes(file)?;
        return Ok(Topology {
            logical: sizes.logical,
            physical: sizes.physical.max(sizes.logical),
            io_min: sizes.io_min,
            io_opt: sizes.io_opt,
            discard: sizes.physical.max(sizes.logical),
        });
    }
    let sector = SECTOR_BYTES as u32;
    let dio = direct.then(|| disk_sys::dio_alignment(file)).flatten();
    let physical = dio.map_or(sector, |(memory, offset)| memory.max(offset).max(sector));
    let is_whole = bytes.is_multiple_of(u64::from(physical));
    Ok(Topology {
        logical: if is_whole { physical } else { sector },
        physical,
        io_min: physical,
        io_opt: 0,
        discard: physical,
    })
}

fn serial_of(stat: &Metadata) -> String {
    format!("{}{}{}", stat.dev(), stat.rdev(), stat.ino())
}
