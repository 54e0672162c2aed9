//! Errors of starting to fill RAM, and of filling it.

use std::error::Error;
use std::io;

use super::super::ContentError;

/// The device that creates descriptors; access to it is controlled by its file permissions.
pub const DEVICE: &str = "/dev/userfaultfd";

/// Reasons why RAM cannot be filled on demand.
#[derive(Debug, thiserror::Error)]
pub enum OnDemandError {
    /// The memory is not private memory without a file.
    #[error(
        "Memory zone {zone} is {backing}: only private memory without a file and without huge pages can be filled on demand"
    )]
    Backing {
        /// The zone.
        zone: String,
        /// Its kind, as in statistics.
        backing: &'static str,
    },
    /// The kernel rejects userfaultfd.
    #[error(
        "Cannot create a userfaultfd: {DEVICE}: {device}; userfaultfd(2), which needs CAP_SYS_PTRACE or \
         vm.unprivileged_userfaultfd=1"
    )]
    Unavailable {
        /// The error of the device.
        device: io::Error,
        /// The error of the call.
        #[source]
        source: io::Error,
    },
    /// The kernel is too old.
    #[error(
        "The kernel's userfaultfd does not report discarded memory (UFFD_FEATURE_EVENT_REMOVE)"
    )]
    Features(#[source] io::Error),
    /// A range cannot be registered.
    #[error("Cannot register guest RAM for page faults")]
    Register(#[source] io::Error),
    /// The files do not match the machine.
    #[error(transparent)]
    Content(ContentError),
    /// The system has no descriptor or thread left.
    #[error("Cannot start the thread that fills guest RAM")]
    Thread(#[source] io::Error),
}

/// Reasons why RAM cannot be filled any further.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// A file cannot be read or is damaged.
    #[error(transparent)]
    Content(ContentError),
    /// Another process has the pages, and does not send them.
    #[error("The process with the rest of guest RAM does not send it")]
    Elsewhere(#[source] Box<dyn Error + Send + Sync>),
    /// The kernel reports an error.
    #[error("Cannot handle page faults of guest RAM")]
    Faults(#[source] io::Error),
}
