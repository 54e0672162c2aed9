//! Errors of confining the process.

use std::io;
use std::path::PathBuf;

use api::config::JailConfig;
use rustix::io::Errno;

/// Reasons why the process cannot be confined as requested.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The file of users or groups cannot be read.
    #[error("Cannot read {}", path.display())]
    Accounts {
        /// The file.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// A name that the file does not contain.
    #[error("{} has no entry for {name:?}; numbers need none", path.display())]
    Unknown {
        /// The name.
        name: String,
        /// The file.
        path: PathBuf,
    },
    /// The number of a user without an entry, and no group.
    #[error("/etc/passwd has no entry for user {uid}, so its group is unknown: add --group")]
    NoGroup {
        /// The user.
        uid: u32,
    },
    /// The process may not change its user or group.
    #[error(
        "Running as user {uid} and group {gid} needs CAP_SETUID and CAP_SETGID: start the VMM as root or as that user"
    )]
    Unprivileged {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
    },
    /// A step failed.
    #[error("Cannot {what}")]
    Failed {
        /// The step.
        what: String,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The page map, from which the VMM measures resident memory.
    #[error("Cannot open /proc/self/pagemap")]
    Pagemap(#[source] io::Error),
    /// The value of a path's access.
    #[error("The access of the jail's path {} must be r or rw; got {:?}", .0.path.display(), .0.access)]
    Access(JailConfig),
    /// The jail would show everything.
    #[error(
        "The jail cannot show the root folder: name the files or folders in it that the VM needs"
    )]
    WholeRoot,
    /// There is no mount namespace to have.
    #[error("Cannot create a mount namespace; --jail needs CAP_SYS_ADMIN")]
    Namespace(#[source] io::Error),
    /// There is no pid namespace to have.
    #[error("Cannot start the VMM in a pid namespace; --jail needs CAP_SYS_ADMIN")]
    PidNamespace(#[source] io::Error),
    /// The filter of the process that waits for the VMM cannot be created.
    #[error("Cannot compile the seccomp filter of the waiter")]
    WaiterFilter(#[source] seccompiler::BackendError),
    /// The kernel rejects that filter.
    #[error("Cannot install the seccomp filter of the waiter")]
    WaiterConfined(#[source] seccompiler::Error),
    /// A path cannot be opened.
    #[error("Cannot show {} in the jail", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
}

impl JailError {
    pub(super) fn failed(what: impl Into<String>, source: Errno) -> Self {
        Self::Failed {
            what: what.into(),
            source: source.into(),
        }
    }
}
