//! Opens, locks and inspects files of disk images.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};

use super::format::HEADER_BYTES;
use super::{BlockError, BlockParams, LockGranularity};
use crate::file_lock;

/// The first and the last sector of a file; less of a short one.
pub(super) fn signature(file: &File, bytes: u64) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let read = |offset| {
        let mut sector = vec![0; HEADER_BYTES];
        let filled = read_up_to(file, &mut sector, offset)?;
        sector.truncate(filled);
        Ok::<_, io::Error>(sector)
    };
    Ok((read(0)?, read(bytes.saturating_sub(HEADER_BYTES as u64))?))
}

/// Whether this can be the file of a disk.
pub(super) fn is_disk(stat: &Metadata) -> bool {
    stat.is_file() || stat.file_type().is_block_device()
}

/// Fills as much of `buffer` as the file holds from `offset` on.
pub(super) fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

pub(super) fn open_file(params: &BlockParams) -> Result<File, BlockError> {
    let mut options = OpenOptions::new();
    options.read(true).write(!params.readonly);
    if params.direct {
        options.custom_flags(libc::O_DIRECT);
    }
    options.open(&params.path).map_err(|source| {
        let path = params.path.clone();
        if params.direct && source.raw_os_error() == Some(libc::EINVAL) {
            BlockError::NoDirectIo { path, source }
        } else {
            BlockError::Open { path, source }
        }
    })
}

pub(super) fn lock(file: &File, params: &BlockParams) -> Result<(), BlockError> {
    let bytes = match params.lock_granularity {
        LockGranularity::Full => 0,
        LockGranularity::ByteRange => file_bytes(file).map_err(|source| BlockError::Inspect {
            path: params.path.clone(),
            source,
        })?,
    };
    file_lock::lock(file, !params.readonly, bytes).map_err(|source| {
        let path = params.path.clone();
        match source.kind() {
            io::ErrorKind::WouldBlock => BlockError::Locked {
                path,
                access: if params.readonly {
                    "reading"
                } else {
                    "writing"
                },
                source,
            },
            _ => BlockError::Lock { path, source },
        }
    })
}

/// Size of a file or block device; `stat` reports 0 for the latter.
pub(super) fn file_bytes(mut file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::End(0))
}
