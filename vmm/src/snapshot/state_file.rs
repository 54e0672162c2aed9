//! The lines of `state.json`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::path::Path;

use serde::de::DeserializeOwned;

use super::SnapshotError;
use super::read::open_file;

/// Length of [`checksum_line`].
const CHECKSUM_BYTES: u64 = 21;

/// The last line of the file, for the checksum of the others.
pub(super) fn checksum_line(crc: u32) -> String {
    format!("{{\"crc32\":\"{crc:08x}\"}}\n")
}

/// A file whose checksum matches. Its lines are read one by one, so that only the current line is in memory.
#[derive(Debug)]
pub(super) struct StateFile<'a> {
    path: &'a Path,
    lines: io::Take<BufReader<File>>,
}

impl<'a> StateFile<'a> {
    /// Opens the file at `path` and checks it.
    ///
    /// # Errors
    /// It cannot be read, is longer than `bytes_max`, or its checksum does not match.
    pub(super) fn open(path: &'a Path, bytes_max: u64) -> Result<Self, SnapshotError> {
        let (file, bytes) = open_file(path)?;
        let damaged = |reason| SnapshotError::Damaged {
            path: path.to_owned(),
            reason,
        };
        if bytes > bytes_max {
            return Err(damaged("it is too long for a VM of its configuration"));
        }
        let mut reader = BufReader::new(file);
        let body_bytes = bytes.saturating_sub(CHECKSUM_BYTES);
        let mut last = String::new();
        let crc = checksum_of((&mut reader).take(body_bytes)).and_then(|crc| {
            // One byte beyond the expected size reveals that the file has grown.
            (&mut reader)
                .take(CHECKSUM_BYTES + 1)
                .read_to_string(&mut last)?;
            reader.rewind()?;
            Ok(crc)
        });
        match crc {
            Ok(crc) if last == checksum_line(crc) => Ok(Self {
                path,
                lines: reader.take(body_bytes),
            }),
            Ok(_) => Err(damaged("its checksum does not match")),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(damaged("its checksum does not match"))
            }
            Err(error) => Err(SnapshotError::file("read", path)(error)),
        }
    }

    /// Reads the next line, which has at most `bytes_max`.
    ///
    /// # Errors
    /// The line is missing, too long, or not a `T`.
    pub(super) fn next<T: DeserializeOwned>(&mut self, bytes_max: u64) -> Result<T, SnapshotError> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.lines).take(bytes_max);
        bounded
            .read_until(b'\n', &mut line)
            .map_err(SnapshotError::file("read", self.path))?;
        if line.last() != Some(&b'\n') {
            return Err(self.damaged("a line is missing or too long"));
        }
        serde_json::from_slice(&line).map_err(|source| SnapshotError::Json {
            path: self.path.to_owned(),
            source,
        })
    }

    /// Checks that all lines have been read.
    ///
    /// # Errors
    /// There are further lines.
    pub(super) fn end(self) -> Result<(), SnapshotError> {
        match self.lines.limit() {
            0 => Ok(()),
            _ => Err(self.damaged("it has a surplus line")),
        }
    }

    fn damaged(&self, reason: &'static str) -> SnapshotError {
        SnapshotError::Damaged {
            path: self.path.to_owned(),
            reason,
        }
    }
}

fn checksum_of(mut reader: impl BufRead) -> io::Result<u32> {
    let mut crc = crc32fast::Hasher::new();
    loop {
        let data = reader.fill_buf()?;
        let bytes = data.len();
        if bytes == 0 {
            return Ok(crc.finalize());
        }
        crc.update(data);
        reader.consume(bytes);
    }
}
