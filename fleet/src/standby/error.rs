//! Errors of the folders of VMs in standby.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Reasons why a folder cannot be used.
#[derive(Debug, Error)]
pub enum StandbyError {
    /// The name cannot be that of a folder.
    #[error("{name:?} cannot be the name of a VM in standby: it must be a plain file name")]
    Name {
        /// The name.
        name: String,
    },
    /// Another user could change records, or has created the folder of all VMs in standby.
    #[error("{} must belong to root or the agent's user, and only they may write to it", path.display())]
    Exposed {
        /// The folder.
        path: PathBuf,
    },
    /// The folder exists already.
    #[error("{} exists already", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// A link or something else is in the place of a folder.
    #[error("{} is not a folder", path.display())]
    NotAFolder {
        /// The path.
        path: PathBuf,
    },
    /// A link or something else is in the place of a file.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file of the snapshot is missing, so the VM was not saved to the end.
    #[error("{} does not exist: the snapshot is not complete", path.display())]
    Incomplete {
        /// The file.
        path: PathBuf,
    },
    /// The snapshot has more files than any VMM writes.
    #[error("{} has more than {max} files", path.display())]
    TooMany {
        /// The folder.
        path: PathBuf,
        /// The maximum.
        max: usize,
    },
    /// The record is cut or damaged.
    #[error("{} is not a record of a VM in standby", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// The parser's error.
        #[source]
        source: serde_json::Error,
    },
    /// The record is longer than any that an agent writes.
    #[error("{} is longer than {max} bytes", path.display())]
    Long {
        /// The file.
        path: PathBuf,
        /// The maximum.
        max: u64,
    },
    /// Another version of the agent wrote the record.
    #[error("{} has version {found}; only version {only} is supported", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The supported one.
        only: u32,
    },
    /// The folder was renamed.
    #[error("{} is the record of the VM {found:?}", path.display())]
    OtherVm {
        /// The file.
        path: PathBuf,
        /// The VM.
        found: String,
    },
    /// The system reported an error.
    #[error("Cannot use {}", path.display())]
    System {
        /// The path.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
}

impl StandbyError {
    /// Whether the snapshot itself is at fault, and not the system.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::NotAFolder { .. }
                | Self::NotAFile { .. }
                | Self::Incomplete { .. }
                | Self::TooMany { .. }
        )
    }

    pub(super) fn system(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::System { path, source }
    }
}
