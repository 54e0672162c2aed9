//! The files of a qcow2 image: the image itself, its backing file, the backing file of that file, and so on.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::error::{ContainerError, Qcow2Error};
use super::inspect::inspect;
use super::qcow2::Header;
use crate::block::BlockError;
use crate::block::image_file::{file_bytes, signature};
use crate::block::{ImageFormat, format};

/// Maximum number of files of one disk. Each costs memory, and a chain may lead back to its own beginning.
const FILES_MAX: usize = 16;

/// Maximum memory for the tables of all files of one disk. Only images with clusters of 1 MiB or more reach it.
const MEMORY_BYTES_MAX: u64 = 512 << 20;

/// One file of a disk.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) path: PathBuf,
    pub(super) format: ImageFormat,
    /// Where a qcow2 image has its L1 table.
    pub(super) l1: Range<u64>,
    /// It has features that imago rejects, but that only forbid writing.
    pub(super) hides_features: bool,
    /// Its compressed clusters are compressed with zstd.
    pub(super) is_zstd: bool,
    /// Size of its clusters; 0 of a raw image.
    pub(super) cluster_bytes: u64,
    /// Bytes of the disk that one of its L2 tables describes; 0 of a raw image.
    pub(super) l2_covers: u64,
}

/// The files of a disk, the image first. `is_allowed`: whether the image may refer to others. `writable`: whether it may
/// be written.
pub(super) fn of(top: &Path, is_allowed: bool, writable: bool) -> Result<Vec<Layer>, BlockError> {
    let mut layers = Vec::new();
    let mut memory_bytes = 0;
    let mut path = top.to_path_buf();
    loop {
        let rejected = |error: ContainerError| BlockError::Container {
            path: path.clone(),
            source: error,
        };
        if layers.len() == FILES_MAX {
            return Err(rejected(ContainerError::ChainTooLong { max: FILES_MAX }));
        }
        let header = read(&path, writable && layers.is_empty())?;
        memory_bytes += header.memory_bytes;
        if memory_bytes > MEMORY_BYTES_MAX {
            return Err(rejected(ContainerError::Memory {
                max_mib: MEMORY_BYTES_MAX >> 20,
            }));
        }
        if header.only_readable == Some(Qcow2Error::Corrupt) {
            log::warn!("{}: the image is marked as corrupt", path.display());
        }
        layers.push(Layer {
            path: path.clone(),
            format: ImageFormat::Qcow2,
            l1: header.l1,
            hides_features: header.only_readable.is_some(),
            is_zstd: header.is_zstd,
            cluster_bytes: header.cluster_bytes,
            l2_covers: header.l2_covers,
        });
        let Some(backing) = header.backing else {
            return Ok(layers);
        };
        let next = backing.path_from(&path);
        if !is_allowed {
            return Err(rejected(ContainerError::BackingNotAllowed(next)));
        }
        match backing.format.as_deref() {
            Some("raw") => {
                layers.push(Layer {
                    path: next,
                    format: ImageFormat::Raw,
                    l1: 0..0,
                    hides_features: false,
                    is_zstd: false,
                    cluster_bytes: 0,
                    l2_covers: 0,
                });
                return Ok(layers);
            }
            Some("qcow2") => {}
            Some(format) => {
                let format = format.to_owned();
                return Err(rejected(ContainerError::BackingFormat {
                    path: next,
                    format,
                }));
            }
            None => return Err(rejected(ContainerError::BackingFormatMissing(next))),
        }
        path = next;
    }
}

fn read(path: &Path, writable: bool) -> Result<Header, BlockError> {
    inspect(path, |file| {
        let bytes = file_bytes(file)?;
        let (front, _) = signature(file, bytes)?;
        if format::detect(&front) != ImageFormat::Qcow2 {
            return Ok(Err(ContainerError::OtherFormat(ImageFormat::Qcow2)));
        }
        let header = Header::read(file, bytes, writable)?;
        Ok(header.map_err(ContainerError::from))
    })
}
