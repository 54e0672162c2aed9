//! Reads and writes the file with the reservations of a host.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Moment, Reservation};
use crate::state_file::{boot_id, replace};

/// Version of the file; another one is rejected rather than misread.
const VERSION: u32 = 1;

/// Reasons why the file could not be used.
#[derive(Debug, Error)]
pub enum FileError {
    /// The system reported an error.
    #[error("Cannot use {}", path.display())]
    System {
        /// The file.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// Its content is invalid.
    #[error("{} is not a list of reservations", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// The parser's error.
        #[source]
        source: serde_json::Error,
    },
    /// A newer agent wrote it.
    #[error("{} has version {found}; only version {VERSION} is supported", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
}

/// When a reservation's current phase began and when it is dropped, ms since the machine started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Times {
    pub(super) since_ms: u64,
    pub(super) deadline_ms: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    /// The boot of the machine to which `times` refer.
    #[serde(default)]
    boot: String,
    reservations: Vec<Reservation>,
    /// One for each reservation.
    #[serde(default)]
    times: Vec<Times>,
}

/// The reservations with their times. The current phase of reservations from another boot of the machine, or from an
/// older agent, begins now.
pub(super) fn read(path: &Path, now: Moment) -> Result<Vec<(Reservation, Times)>, FileError> {
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
    let same = saved.boot == boot_id() && saved.times.len() == saved.reservations.len();
    let mut times = saved.times.into_iter();
    let entries = saved.reservations.into_iter().map(|entry| {
        let known = times.next().filter(|_| same);
        let times = known.unwrap_or_else(|| Times {
            since_ms: now.ms,
            deadline_ms: entry.deadline_unix_ms.map(|deadline| {
                now.ms
                    .saturating_add(deadline.saturating_sub(entry.since_unix_ms))
            }),
        });
        (entry, times)
    });
    Ok(entries.collect())
}

pub(super) fn write<'a>(
    path: &Path,
    entries: impl Iterator<Item = (&'a Reservation, Times)>,
) -> Result<(), FileError> {
    let (reservations, times) = entries.map(|(entry, times)| (entry.clone(), times)).unzip();
    let saved = Saved {
        version: VERSION,
        boot: boot_id(),
        reservations,
        times,
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
