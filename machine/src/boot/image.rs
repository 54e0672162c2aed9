//! Payload files: opens and measures them, and detects their format by the first bytes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::BootError;
use crate::open_regular_file;

/// The kind of a kernel or firmware file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Elf,
    BzImage,
}

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// ELF identification byte 4 and its value for 64-bit objects.
const ELF_CLASS: (usize, u8) = (4, 2);
/// Offset and content of the setup header's signature (Linux boot protocol, "header").
const BZIMAGE_MAGIC: (usize, [u8; 4]) = (0x202, *b"HdrS");

/// An open payload file.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) bytes: u64,
}

impl Image {
    pub(super) fn open(path: &Path) -> Result<Self, BootError> {
        let path = path.to_path_buf();
        match open_regular_file(&path) {
            Ok(Some((file, bytes))) => Ok(Self { path, file, bytes }),
            Ok(None) => Err(BootError::NotAFile { path }),
            Err(source) => Err(BootError::Open { path, source }),
        }
    }

    /// Detects the format from the magic numbers.
    pub(super) fn format(&mut self) -> Result<Format, BootError> {
        let mut start = Vec::with_capacity(BZIMAGE_MAGIC.0 + BZIMAGE_MAGIC.1.len());
        let capacity = start.capacity() as u64;
        self.file
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.file.by_ref().take(capacity).read_to_end(&mut start))
            .map_err(|source| self.read_error(source))?;
        if start.starts_with(&ELF_MAGIC) && start.get(ELF_CLASS.0) == Some(&ELF_CLASS.1) {
            return Ok(Format::Elf);
        }
        match start.get(BZIMAGE_MAGIC.0..) {
            Some(magic) if magic == BZIMAGE_MAGIC.1 => Ok(Format::BzImage),
            _ => Err(BootError::UnknownFormat {
                path: self.path.clone(),
            }),
        }
    }

    /// Checks that the file has the `bytes` from `offset` that its headers announce.
    pub(super) fn require(&self, offset: u64, bytes: u64) -> Result<(), BootError> {
        let needed_bytes = offset.saturating_add(bytes);
        if needed_bytes <= self.bytes {
            return Ok(());
        }
        Err(BootError::Truncated {
            path: self.path.clone(),
            needed_bytes,
            found_bytes: self.bytes,
        })
    }

    /// Fills `buffer` from `offset`.
    pub(super) fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), BootError> {
        self.require(offset, buffer.len() as u64)?;
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.file.read_exact(buffer))
            .map_err(|source| self.read_error(source))
    }

    pub(super) fn read_error(&self, source: std::io::Error) -> BootError {
        BootError::Read {
            path: self.path.clone(),
            source,
        }
    }

    pub(super) fn load_error(&self, source: linux_loader::loader::Error) -> BootError {
        BootError::Load {
            path: self.path.clone(),
            source,
        }
    }

    /// Checks that an image may occupy `start..end`.
    pub(super) fn require_ram(
        &self,
        start: u64,
        end: u64,
        usable: &std::ops::Range<u64>,
    ) -> Result<(), BootError> {
        if usable.start <= start && start <= end && end <= usable.end {
            return Ok(());
        }
        Err(BootError::OutsideRam {
            path: self.path.clone(),
            start,
            end,
            ram_start: usable.start,
            ram_end: usable.end,
        })
    }
}
