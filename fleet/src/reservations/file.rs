//! The book on disk: replaced as a whole, so that it is always either the old one or the new one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Reservation;

/// Form of the file; another one is refused rather than misread.
const VERSION: u32 = 1;

/// Why the file could not be used.
#[derive(Debug, Error)]
pub enum FileError {
    /// The system refused.
    #[error("Cannot use {}", path.display())]
    System {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It holds something else.
    #[error("{} is not a list of reservations", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// A newer agent wrote it.
    #[error("{} has version {found}, only {VERSION} is understood", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
}

#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    reservations: Vec<Reservation>,
}

pub(super) fn read(path: &Path) -> Result<Vec<Reservation>, FileError> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|source| FileError::System {
            path: path.to_owned(),
            source,
        })?,
    };
    let saved: Saved = serde_json::from_str(&text).map_err(|source| FileError::Form {
        path: path.to_owned(),
        source,
    })?;
    if saved.version != VERSION {
        return Err(FileError::Version {
            path: path.to_owned(),
            found: saved.version,
        });
    }
    Ok(saved.reservations)
}

pub(super) fn write(path: &Path, reservations: &[Reservation]) -> Result<(), FileError> {
    let saved = Saved {
        version: VERSION,
        reservations: reservations.to_vec(),
    };
    let text = serde_json::to_string_pretty(&saved).map_err(|source| FileError::Form {
        path: path.to_owned(),
        source,
    })?;
    replace(path, text.as_bytes()).map_err(|source| FileError::System {
        path: path.to_owned(),
        source,
    })
}

/// Writes beside the file, has it reach the disk, and then takes the file's name.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}
