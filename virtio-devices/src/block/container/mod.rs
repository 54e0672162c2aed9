//! qcow2 images, whose guest data is located through tables, and flat VMDKs. The crate imago reads and writes them.
//!
//! Everything that a header states is checked before imago sees the image (`qcow2`). The files that the image refers to
//! are opened here, not by imago: only if the configuration allows it, only for reading, and locked (`chain`).

#![allow(unsafe_code)]
// UNSAFETY: guest memory behind raw vectors becomes slices for imago, as long as one operation runs; discards rely on
// the lock that no other operation uses the image in the meantime.

mod big_endian;
mod chain;
mod error;
mod inspect;
mod layer_file;
mod qcow2;
mod vhd;
mod vmdk;
mod zstd;

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};

use chain::Layer;
use imago::file::File as ImagoFile;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, DynStorage, FormatAccess, FormatDriverBuilder, StorageOpenOptions,
};

use super::engine::{IoOperation, zeroes};
use super::format::ImageFormat;
use super::image_file::{file_bytes, is_disk, lock, open_file};
use super::{BlockError, BlockParams, SECTOR_BYTES};
use crate::Unpoisoned;
use crate::counters::Count;
pub use error::{ContainerError, Qcow2Error, VhdError, VmdkError};
use layer_file::LayerFile;
use qcow2::Header;
pub(super) use vhd::fixed_disk_bytes;
use vmdk::FlatVmdk;
use zstd::ZstdImage;

/// The content of an image, wherever it is.
type Access = FormatAccess<Arc<dyn DynStorage>>;

/// How an operation uses the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lock {
    /// Others run at the same time.
    Shared,
    /// No other runs.
    Exclusive,
}

/// An open image with everything that it refers to.
#[derive(Debug)]
pub(super) struct Container {
    path: PathBuf,
    /// Held for writing while discards give clusters back that other operations may be using, and for a new L2 table.
    access: RwLock<Access>,
    /// The image's own file, which `access` uses.
    top: Arc<LayerFile>,
    /// The same file without direct I/O, to check its tables; `None` of a VMDK, which has none.
    tables: Option<File>,
    writable: bool,
    flushing: Mutex<()>,
    cluster_bytes: u64,
    /// Bytes of the disk that one L2 table describes.
    l2_covers: u64,
    /// The files that the image refers to, for their locks.
    backing: Vec<File>,
    /// Errors in the content of the image.
    errors: Count,
}

impl Container {
    /// Opens the image whose file, opened and locked, is `top`.
    pub(super) fn open(
        params: &BlockParams,
        format: ImageFormat,
        top: &File,
    ) -> Result<Self, BlockError> {
        match format {
            ImageFormat::Vmdk => Self::open_vmdk(params, top),
            _ => Self::open_qcow2(params, top),
        }
    }

    fn open_vmdk(params: &BlockParams, top: &File) -> Result<Self, BlockError> {
        let rejected = |path: &Path, source: ContainerError| BlockError::Container {
            path: path.to_path_buf(),
            source,
        };
        let extents = vmdk::extents(&params.path)?;
        if !params.readonly {
            return Err(rejected(&params.path, VmdkError::Writable.into()));
        }
        let options = || StorageOpenOptions::new().direct(params.direct);
        let (mut files, mut backing) = (Vec::new(), Vec::new());
        for extent in &extents {
            let Some(path) = extent.path() else { continue };
            if !params.backing_files {
                let error = ContainerError::BackingNotAllowed(path.to_path_buf());
                return Err(rejected(&params.path, error));
            }
            let file = open_backing(params, path, &mut backing)?;
            extent.check(&file)?;
            let size = file.try_clone();
            let file = ImagoFile::from_open_file(file, options());
            let both = file.and_then(|file| Ok((file, size?)));
            files.push(both.map_err(|error| rejected(path, ContainerError::Imago(error)))?);
        }
        let disk: Arc<dyn DynStorage> = Arc::new(FlatVmdk::new(extents, files));
        let disk = Raw::builder(disk).open(DenyImplicitOpenGate::default());
        let disk = disk.map_err(|error| rejected(&params.path, ContainerError::Imago(error)))?;
        let descriptor = top
            .try_clone()
            .and_then(|file| ImagoFile::from_open_file(file, options()))
            .map_err(|error| rejected(&params.path, ContainerError::Imago(error)))?;
        Ok(Self {
            path: params.path.clone(),
            access: RwLock::new(FormatAccess::new(disk)),
            top: Arc::new(LayerFile::new(descriptor, 0..0, false)),
            tables: None,
            writable: false,
            flushing: Mutex::default(),
            cluster_bytes: SECTOR_BYTES,
            l2_covers: u64::MAX,
            backing,
            errors: Count::default(),
        })
    }

    fn open_qcow2(params: &BlockParams, top: &File) -> Result<Self, BlockError> {
        let layers = chain::of(&params.path, params.backing_files, !params.readonly)?;
        let tables = File::open(&params.path).map_err(|source| BlockError::Open {
            path: params.path.clone(),
            source,
        })?;
        let mut backing = Vec::new();
        let mut below: Option<(Access, Arc<LayerFile>)> = None;
        for (depth, layer) in layers.iter().enumerate().rev() {
            let file = match depth {
                0 => top.try_clone().map_err(|source| BlockError::Open {
                    path: layer.path.clone(),
                    source,
                })?,
                _ => open_backing(params, &layer.path, &mut backing)?,
            };
            let writable = depth == 0 && !params.readonly;
            let below_it = below.map(|(access, _)| access);
            let opened = open_layer(file, layer, params.direct, writable, below_it);
            below = Some(opened.map_err(|source| BlockError::Container {
                path: layer.path.clone(),
                source: ContainerError::Imago(source),
            })?);
        }
        let (access, top) = below.expect("a chain has at least the image itself");
        Ok(Self {
            path: params.path.clone(),
            access: RwLock::new(access),
            top,
            tables: Some(tables),
            writable: !params.readonly,
            flushing: Mutex::default(),
            cluster_bytes: layers[0].cluster_bytes,
            l2_covers: layers[0].l2_covers,
            backing,
            errors: Count::default(),
        })
    }

    /// Size of the disk.
    pub(super) fn bytes(&self) -> u64 {
        self.access.read().unpoisoned().size()
    }

    /// Size of a cluster.
    pub(super) fn cluster_bytes(&self) -> u32 {
        // At most 2 MiB (checked).
        self.cluster_bytes as u32
    }

    /// The files to lock besides the image.
    pub(super) fn backing(&self) -> &[File] {
        &self.backing
    }

    /// Hands everything that is only in memory to the operating system.
    pub(super) fn flush(&self) -> io::Result<()> {
        let _one_at_a_time = self.flushing.lock().unpoisoned();
        let access = self.access.read().unpoisoned();
        self.top.flush_all(|| access.flush())
    }

    /// Reads everything again: another process may have changed the image, and the guest of a damaged one its tables. What
    /// was checked when it was opened is therefore checked again: imago would recurse until its stack is full.
    pub(super) fn reload(&self) -> io::Result<()> {
        let access = self.access.write().unpoisoned();
        if let Some(tables) = &self.tables {
            let bytes = file_bytes(tables)?;
            let header = Header::read(tables, bytes, self.writable)?;
            header.map_err(io::Error::other)?;
        }
        // SAFETY: the lock excludes all other operations, and everything was flushed before the image was released.
        unsafe { access.invalidate_cache() }
    }

    /// Executes an operation; returns the number of bytes moved.
    ///
    /// # Safety
    /// The vectors and the memory behind them are valid.
    pub(super) unsafe fn perform(&self, operation: &IoOperation<'_>) -> io::Result<usize> {
        // SAFETY: passed on.
        unsafe { self.try_perform(operation) }.map_err(|error| self.errno(&error))
    }

    /// # Safety
    /// As [`Container::perform`].
    unsafe fn try_perform(&self, operation: &IoOperation<'_>) -> io::Result<usize> {
        match *operation {
            IoOperation::Read { offset, into } => {
                // SAFETY: the caller's promise. The guest may change its memory in the meantime; imago takes only bytes
                // from it, for which every value is valid.
                let into: Vec<_> = into
                    .iter()
                    .map(|piece| unsafe { slice_mut(piece) })
                    .collect();
                let into = IoVectorMut::from(into);
                let bytes = into.len() as usize;
                let access = self.access.read().unpoisoned();
                access.readv(into, offset).map(|()| bytes)
            }
            IoOperation::Write { offset, from } => {
                // SAFETY: as above.
                let from: Vec<_> = from.iter().map(|piece| unsafe { slice(piece) }).collect();
                let mut rest = IoVector::from(from);
                let bytes = rest.len();
                self.change(offset..offset + bytes, Lock::Shared, |access, part| {
                    let (piece, after) = std::mem::take(&mut rest).split_at(part.end - part.start);
                    rest = after;
                    access.writev(piece, part.start)
                })?;
                Ok(bytes as usize)
            }
            IoOperation::WriteZeroBuffer { offset, bytes } => {
                let bytes = zeroes(bytes).len();
                self.write_zeroes(offset..offset + bytes as u64)?;
                Ok(bytes)
            }
            IoOperation::ZeroRange { offset, bytes } => {
                self.zero(offset..offset + bytes, |clusters| {
                    self.change(clusters, Lock::Shared, |access, part| {
                        access.write_zeroes(part.start, part.end - part.start)
                    })
                })
            }
            IoOperation::PunchHole { offset, bytes } => {
                self.zero(offset..offset + bytes, |clusters| self.discard(clusters))
            }
            // Zeroes for the rest would take space, where the guest gives some back.
            IoOperation::OwnDiscard { offset, bytes } => {
                let (_, clusters, _) = self.split(offset..offset + bytes);
                self.discard(clusters).map(|()| 0)
            }
            IoOperation::Sync => self.flush().map(|()| 0),
        }
    }

    /// Executes `change` on the parts of `range` that have each their own L2 table.
    ///
    /// A new L2 table may take a cluster that was freed since the last flush ([`layer_file`]). Before such a part, the
    /// tables are written, and nothing else runs in between.
    fn change(
        &self,
        range: Range<u64>,
        lock: Lock,
        mut change: impl FnMut(&Access, Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut start = range.start;
        while start < range.end {
            let index = start / self.l2_covers;
            let end = range.end.min((index + 1) * self.l2_covers);
            let lacks_l2 = self.top.lacks_l2(index as usize)?;
            if lacks_l2 || lock == Lock::Exclusive {
                let access = self.access.write().unpoisoned();
                if lacks_l2 {
                    access.flush()?;
                }
                change(&access, start..end)?;
            } else {
                change(&self.access.read().unpoisoned(), start..end)?;
            }
            start = end;
        }
        Ok(())
    }

    /// Makes the whole clusters of `range` zero by `zero_clusters`, and the rest of it by zeroes. Returns the number of
    /// bytes moved: none.
    fn zero(
        &self,
        range: Range<u64>,
        zero_clusters: impl FnOnce(Range<u64>) -> io::Result<()>,
    ) -> io::Result<usize> {
        let (before, clusters, after) = self.split(range);
        zero_clusters(clusters)?;
        self.write_zeroes(before)?;
        self.write_zeroes(after)?;
        Ok(0)
    }

    /// Discards whole clusters.
    fn discard(&self, clusters: Range<u64>) -> io::Result<()> {
        self.change(clusters, Lock::Exclusive, |access, part| {
            // SAFETY: the lock excludes all other operations.
            unsafe { access.discard_to_zero_unsafe(part.start, part.end - part.start) }
        })
    }

    /// The parts of a range before, in and after its whole clusters. imago's own code for the first and the last one panics
    /// near the end of a disk that is smaller than a cluster.
    fn split(&self, range: Range<u64>) -> (Range<u64>, Range<u64>, Range<u64>) {
        let start = range.start.next_multiple_of(self.cluster_bytes);
        let end = match range.end == self.bytes() {
            true => range.end,
            false => range.end / self.cluster_bytes * self.cluster_bytes,
        };
        if start >= end {
            return (range.clone(), range.end..range.end, range.end..range.end);
        }
        (range.start..start, start..end, end..range.end)
    }

    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        self.change(range, Lock::Shared, |access, mut part| {
            while !part.is_empty() {
                let zeroes = zeroes(part.end - part.start);
                access.write(zeroes, part.start)?;
                part.start += zeroes.len() as u64;
            }
            Ok(())
        })
    }

    /// Number of errors in the content of the image.
    pub(super) fn errors(&self) -> u64 {
        self.errors.get()
    }

    /// An error for the jobs. An error with more details is also logged.
    fn errno(&self, error: &io::Error) -> io::Error {
        if let Some(errno) = error.raw_os_error() {
            return io::Error::from_raw_os_error(errno);
        }
        if error.kind() == io::ErrorKind::Unsupported {
            return io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        }
        if self.errors.count_loudly() {
            log::error!("{}: {error}", self.path.display());
        }
        io::Error::from_raw_os_error(libc::EIO)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            log::error!("{}: cannot be written back: {error}", self.path.display());
        }
    }
}

/// The files that the image at `path` refers to. None if one of them cannot be read: opening the image reports that. Images
/// of other formats than qcow2 and VMDK refer to none, whatever their guests have written to them.
pub fn backing_files(path: &Path, format: Option<ImageFormat>) -> Vec<PathBuf> {
    let is = |one| format.is_none() || format == Some(one);
    if is(ImageFormat::Vmdk)
        && let Ok(extents) = vmdk::extents(path)
    {
        let paths = extents.iter().filter_map(|extent| extent.path());
        return paths.map(Path::to_path_buf).collect();
    }
    if !is(ImageFormat::Qcow2) {
        return Vec::new();
    }
    let layers = chain::of(path, true, false).unwrap_or_default();
    layers.into_iter().skip(1).map(|layer| layer.path).collect()
}

fn open_backing(
    params: &BlockParams,
    path: &Path,
    opened: &mut Vec<File>,
) -> Result<File, BlockError> {
    let params = BlockParams {
        path: path.to_path_buf(),
        readonly: true,
        ..params.clone()
    };
    if std::fs::metadata(path).is_ok_and(|stat| !is_disk(&stat)) {
        return Err(BlockError::NotADisk { path: params.path });
    }
    let file = open_file(&params)?;
    lock(&file, &params)?;
    let shared = file.try_clone().map_err(|source| BlockError::Open {
        path: params.path,
        source,
    })?;
    opened.push(shared);
    Ok(file)
}

fn open_layer(
    file: File,
    layer: &Layer,
    direct: bool,
    writable: bool,
    below: Option<Access>,
) -> io::Result<(Access, Arc<LayerFile>)> {
    let options = StorageOpenOptions::new().direct(direct).write(writable);
    let l1 = if writable { layer.l1.clone() } else { 0..0 };
    let file = ImagoFile::from_open_file(file, options)?;
    let file = LayerFile::new(file, l1, layer.hides_features);
    let file = Arc::new(file);
    let storage: Arc<dyn DynStorage> = Arc::clone(&file) as _;
    let nothing_else = DenyImplicitOpenGate::default();
    let access = match layer.format {
        ImageFormat::Raw => FormatAccess::new(Raw::builder(storage).open(nothing_else)?),
        _ => {
            let image = Qcow2::builder(storage)
                .write(writable)
                .backing(below)
                .data_file(None);
            let image = image.open(nothing_else)?;
            match layer.is_zstd {
                true => FormatAccess::new(ZstdImage::new(image, Arc::clone(&file), layer)),
                false => FormatAccess::new(image),
            }
        }
    };
    Ok((access, file))
}

/// # Safety
/// The vector describes writable memory, which is not unmapped for `'a`.
unsafe fn slice_mut<'a>(piece: &libc::iovec) -> IoSliceMut<'a> {
    // SAFETY: the caller's promise.
    IoSliceMut::new(unsafe {
        std::slice::from_raw_parts_mut(piece.iov_base.cast::<u8>(), piece.iov_len)
    })
}

/// # Safety
/// The vector describes readable memory, which is not unmapped for `'a`.
unsafe fn slice<'a>(piece: &libc::iovec) -> IoSlice<'a> {
    // SAFETY: the caller's promise.
    IoSlice::new(unsafe { std::slice::from_raw_parts(piece.iov_base.cast::<u8>(), piece.iov_len) })
}
