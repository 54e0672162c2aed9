//! The files of RAM: new ones, or those of another process, which are checked first.
#![allow(unsafe_code)]
// UNSAFETY: reading the seals of a file has no safe wrapper among our dependencies.

use std::fs::File;
use std::os::fd::AsRawFd;

use virtio_devices::file_system;

use super::backing::{self, Backing};
use super::error::ZoneError;
use super::layout::PAGE_BYTES;
use super::source::Source;

/// The files or the memory that the zones of RAM consist of.
#[derive(Debug)]
pub enum ZoneFiles {
    /// New pages, which read as zeros.
    New,
    /// The memory files of another process, in the order of the zones.
    Given(std::vec::IntoIter<File>),
}

impl ZoneFiles {
    /// The source of the next zone, of `bytes`.
    pub(super) fn open(&mut self, backing: &Backing, bytes: u64) -> Result<Source, ZoneError> {
        match self {
            Self::New => backing.open(bytes),
            Self::Given(files) => match files.next() {
                Some(file) => adopt(backing, file, bytes),
                None => Err(ZoneError::Foreign("it is missing")),
            },
        }
    }

    /// Whether there are files that no zone has used.
    pub(super) fn are_left(&self) -> bool {
        match self {
            Self::New => false,
            Self::Given(files) => files.len() > 0,
        }
    }
}

/// Checks whether `file` can be the RAM of a zone. Without the seal, the other process could shorten the file, and this
/// one would end with SIGBUS.
fn adopt(backing: &Backing, file: File, bytes: u64) -> Result<Source, ZoneError> {
    let Some(expected) = backing.memfd_page_bytes() else {
        return Err(ZoneError::Foreign("this zone has none here"));
    };
    // SAFETY: the command takes no argument; the descriptor is open.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 {
        return Err(ZoneError::Foreign("it is not a memory file"));
    }
    if seals & backing::MEMFD_SEALS != backing::MEMFD_SEALS {
        return Err(ZoneError::Foreign("its size is not sealed"));
    }
    let size = file.metadata().map_or(0, |it| it.len());
    if size != bytes {
        return Err(ZoneError::Foreign("it has another size than the zone"));
    }
    let huge_page_bytes = file_system::huge_page_bytes(&file);
    let page_bytes = huge_page_bytes.unwrap_or(PAGE_BYTES);
    if expected.is_some_and(|expected| expected != page_bytes) {
        return Err(ZoneError::Foreign("it has pages of another size"));
    }
    Ok(Source::memfd(file, huge_page_bytes))
}
