//! Errors of snapshots.

use std::io;
use std::path::{Path, PathBuf};

use machine::memory::on_demand::OnDemandError;
use machine::memory::{ContentError, CopyOnWriteError, MemoryError};
use state::StateError;

use super::link::CHAIN_MAX;

/// Reasons why a snapshot cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// An unsupported URL.
    #[error("{url:?} is not the URL of a folder: file:// and an absolute path")]
    Url {
        /// The URL.
        url: String,
    },
    /// No folder there.
    #[error("{} is not an existing folder", path.display())]
    NotAFolder {
        /// The path.
        path: PathBuf,
    },
    /// The folder already contains a snapshot.
    #[error("{} already exists: a snapshot does not replace files", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A zone whose content is in a file of the host.
    #[error("Memory zone {zone} is in a file: a VM with such a zone cannot be saved")]
    ZoneInFile {
        /// The zone.
        zone: String,
    },
    /// A shared folder: only its back end knows which files the guest has open.
    #[error("Shared folder {tag} keeps its state in its back end: a VM with one cannot be saved")]
    SharedFolder {
        /// The name by which the guest mounts it.
        tag: String,
    },
    /// The state of the device is in another process.
    #[error("Device {id} keeps its state in its back end: a VM with it cannot be saved")]
    OtherProcess {
        /// The name of the device.
        id: String,
    },
    /// Its writes to memory are not recorded, or its image changes.
    #[error("Device {id} prevents this snapshot: {reason}")]
    NotLive {
        /// The name of the device.
        id: String,
        /// Its current use.
        reason: &'static str,
    },
    /// A link of a chain is broken.
    #[error("{} breaks the chain of snapshots: {reason}", path.display())]
    Chain {
        /// The snapshot.
        path: PathBuf,
        /// The fault.
        reason: &'static str,
    },
    /// More snapshots than a chain may have.
    #[error(
        "A chain has at most {CHAIN_MAX} snapshots: merge it (ch-remote snapshot-merge), or save all of RAM"
    )]
    ChainTooLong,
    /// The difference from another snapshot is unknown.
    #[error(
        "Writes have not been recorded since snapshot {}: it must be the VM's last one, saved with track_writes",
        path.display()
    )]
    NotRecorded {
        /// The folder of the base.
        path: PathBuf,
    },
    /// Memory that is recorded cannot be plugged or unplugged.
    #[error(
        "Writes of a VM with hotplug_method=virtio-mem cannot be recorded: during a recording, no memory could be plugged"
    )]
    VirtioMem,
    /// The VMM must not open the folder of a base.
    #[error(transparent)]
    NotAdmitted(Box<dyn std::error::Error + Send + Sync>),
    /// A new snapshot has no id.
    #[error("The host provides no random numbers")]
    Random(#[source] io::Error),
    /// The VM ended or was reset while it was being saved.
    #[error("The snapshot was cancelled because the VM ended or was reset")]
    Cancelled,
    /// KVM does not report which pages the guest writes.
    #[error("Cannot record which pages of guest RAM are written")]
    Track(#[source] MemoryError),
    /// The owner of the running machine cannot pause, save or resume it.
    #[error(transparent)]
    Owner(Box<dyn std::error::Error + Send + Sync>),
    /// The thread cannot be started.
    #[error("Cannot start the thread that saves the running VM")]
    Thread(#[source] io::Error),
    /// A file or the folder.
    #[error("Cannot {action} {}", path.display())]
    File {
        /// The failed operation.
        action: &'static str,
        /// Its path.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The file differs from what was written.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The fault.
        reason: &'static str,
    },
    /// Not JSON, or not a configuration.
    #[error("Cannot read {}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's error.
        #[source]
        source: serde_json::Error,
    },
    /// An unsupported version, or impossible values.
    #[error("Cannot use the saved state")]
    State(#[source] StateError),
    /// The content of RAM is invalid.
    #[error(transparent)]
    Content(ContentError),
    /// The configured RAM cannot be created.
    #[error("Cannot create guest memory")]
    Memory(#[source] MemoryError),
    /// RAM cannot be filled on demand.
    #[error("Cannot restore memory on demand")]
    OnDemand(#[source] OnDemandError),
    /// The VM to save was restored on demand.
    #[error("Guest RAM is incomplete and cannot be filled from its snapshot")]
    Incomplete,
    /// RAM cannot show the files.
    #[error("Cannot restore memory by copy-on-write")]
    CopyOnWrite(#[source] CopyOnWriteError),
    /// Advice for a mapping is lost when a part of it is replaced.
    #[error("Memory zone {zone} has {setting}, which copy-on-write memory cannot have")]
    CopyOnWriteZone {
        /// The zone.
        zone: String,
        /// The actual value.
        setting: &'static str,
    },
    /// Populating RAM would demand all of it.
    #[error("prefault=on needs memory_restore_mode=copy")]
    Prefault,
    /// A copy has no background.
    #[error("background_fill=off needs memory_restore_mode=ondemand")]
    NoBackground,
    /// An interface that was created from descriptors needs new ones.
    #[error("Network device {id} needs {needed} file descriptors in net_fds; got {got}")]
    NetFds {
        /// The interface.
        id: String,
        /// Its queue pairs.
        needed: usize,
        /// Descriptors that the request contains.
        got: usize,
    },
    /// An interface is named twice.
    #[error("net_fds lists network device {id} twice")]
    NetTwice {
        /// The interface.
        id: String,
    },
    /// A zone is named twice.
    #[error("zone_updates lists memory zone {id} twice")]
    ZoneTwice {
        /// The zone.
        id: String,
    },
    /// The saved VM has no such zone.
    #[error("zone_updates lists memory zone {id}, which the VM does not have")]
    NoZone {
        /// The zone.
        id: String,
    },
    /// The number of received descriptors differs from the announced one.
    #[error("net_fds announces {announced} file descriptors; got {got}")]
    FdCount {
        /// The sum of `num_fds`.
        announced: usize,
        /// Received descriptors.
        got: usize,
    },
}

impl SnapshotError {
    pub(super) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }

    /// True if the request or the files are invalid; false if the host failed.
    pub fn is_of_request(&self) -> bool {
        match self {
            Self::Url { .. }
            | Self::NotAFolder { .. }
            | Self::Exists { .. }
            | Self::ZoneInFile { .. }
            | Self::SharedFolder { .. }
            | Self::OtherProcess { .. }
            | Self::NotLive { .. }
            | Self::Chain { .. }
            | Self::ChainTooLong
            | Self::NotRecorded { .. }
            | Self::VirtioMem
            | Self::NotAdmitted(_)
            | Self::Damaged { .. }
            | Self::Json { .. }
            | Self::NetFds { .. }
            | Self::NetTwice { .. }
            | Self::ZoneTwice { .. }
            | Self::NoZone { .. }
            | Self::Prefault
            | Self::CopyOnWriteZone { .. }
            | Self::NoBackground
            | Self::FdCount { .. } => true,
            Self::State(error) => !error.is_of_host(),
            Self::Memory(error) => error.is_of_configuration(),
            Self::Content(error)
            | Self::CopyOnWrite(CopyOnWriteError::Content(error))
            | Self::OnDemand(OnDemandError::Content(error)) => {
                matches!(error, ContentError::Damaged { .. } | ContentError::Table(_))
            }
            Self::CopyOnWrite(error) => matches!(
                error,
                CopyOnWriteError::Backing { .. } | CopyOnWriteError::Chain { .. }
            ),
            Self::OnDemand(error) => matches!(error, OnDemandError::Backing { .. }),
            Self::Incomplete
            | Self::Cancelled
            | Self::Random(_)
            | Self::Track(_)
            | Self::Owner(_)
            | Self::Thread(_) => false,
            Self::File { source, .. } => source.kind() == io::ErrorKind::NotFound,
        }
    }
}
