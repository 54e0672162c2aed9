//! Reads the files of a snapshot.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use machine::open_regular_file;

use super::SnapshotError;

/// Opens a file of a snapshot for reading and returns its size with it.
pub(super) fn open_file(path: &Path) -> Result<(File, u64), SnapshotError> {
    let opened = open_regular_file(path).map_err(SnapshotError::file("open", path))?;
    opened.ok_or_else(|| SnapshotError::Damaged {
        path: path.to_owned(),
        reason: "it is not a file",
    })
}

/// The text of the file at `path`, which has at most `bytes_max`.
pub(super) fn read(path: &Path, bytes_max: u64) -> Result<String, SnapshotError> {
    let mut text = String::new();
    let (file, _) = open_file(path)?;
    let read = file.take(bytes_max + 1).read_to_string(&mut text);
    let damaged = |reason| SnapshotError::Damaged {
        path: path.to_owned(),
        reason,
    };
    match read {
        Ok(bytes) if bytes as u64 > bytes_max => Err(damaged("it is too long")),
        Ok(_) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(damaged("it is not text")),
        Err(error) => Err(SnapshotError::file("read", path)(error)),
    }
}
