//! Errors of requests to the control thread.

use std::io;
use std::path::PathBuf;

use api::{Endpoint, VmState};

use crate::config::{RateLimiterError, ValidationError};
use crate::landlock::LandlockError;
use crate::migration::MigrationError;
use crate::snapshot::SnapshotError;
use crate::thresholds::ThresholdError;
use crate::vm::{HotplugError, VmError};

/// A failed request and its cause.
#[derive(Debug, thiserror::Error)]
#[error("{}", endpoint.failure())]
pub struct RequestError {
    /// The request.
    pub endpoint: Endpoint,
    /// The reason.
    #[source]
    pub cause: LifecycleError,
}

/// Called with the outcome of a request that ends after it has been started, on the control thread.
pub type Done = Box<dyn FnOnce(Result<(), RequestError>) + Send>;

/// Reasons why the control thread rejected or failed a request. The first messages are upstream's.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// There is no machine, or no configuration, where one is needed.
    #[error("VM is not created")]
    VmNotCreated,
    /// A configuration, or a machine, exists already.
    #[error("VM is already created")]
    VmAlreadyCreated,
    /// There is no configuration to boot.
    #[error("VM config is missing")]
    VmMissingConfig,
    /// There is no running machine.
    #[error("VM is not running")]
    VmNotRunning,
    /// The machine's state does not allow the request.
    #[error("Invalid VM state transition: {from} to {to}")]
    InvalidStateTransition {
        /// The current state.
        from: VmState,
        /// The requested state.
        to: VmState,
    },
    /// The configuration is invalid or uses unsupported features.
    #[error("Failed to validate config")]
    ConfigValidation(#[source] ValidationError),
    /// A path is outside the rules of the process, or rules cannot be enforced.
    #[error(transparent)]
    Landlock(LandlockError),
    /// The thresholds are invalid.
    #[error("Failed to validate thresholds")]
    Thresholds(#[source] ThresholdError),
    /// No vCPU, or more than the maximum.
    #[error("The number of vCPUs must be between 1 and the maximum ({max}); got {desired}")]
    VcpusOutOfRange {
        /// The requested value.
        desired: u32,
        /// The maximum.
        max: u32,
    },
    /// RAM is in zones, or virtio-mem has no room.
    #[error(
        "RAM cannot be changed from {current} to {desired} bytes: it is in zones, or hotplug_size is not set"
    )]
    MemoryHotplug {
        /// The current size.
        current: u64,
        /// The requested value.
        desired: u64,
    },
    /// Less RAM than at boot, or more than the maximum.
    #[error("RAM of this VM must be between {least} and {most} bytes; got {desired}")]
    MemoryOutOfRange {
        /// The requested value.
        desired: u64,
        /// RAM at boot.
        least: u64,
        /// RAM at boot plus the maximum of hot-plugged memory.
        most: u64,
    },
    /// RAM has no such zone.
    #[error("There is no memory zone {id}")]
    NoSuchZone {
        /// The requested name.
        id: String,
    },
    /// A smaller zone than at boot, or a larger one than the maximum.
    #[error("Memory zone {id} must have between {least} and {most} bytes; got {desired}")]
    ZoneOutOfRange {
        /// Its name.
        id: String,
        /// The requested value.
        desired: u64,
        /// Its size at boot.
        least: u64,
        /// Its size at boot plus the maximum of hot-plugged memory.
        most: u64,
    },
    /// A device that cannot be removed, or one that prevents adding another.
    #[error(transparent)]
    Device(HotplugError),
    /// There is no such rate limit.
    #[error(transparent)]
    RateLimiter(RateLimiterError),
    /// Only a paused machine can be saved.
    #[error("The VM is running: pause it before it is saved, or set live")]
    NotPaused,
    /// The guest has requested a reset, which a snapshot does not contain.
    #[error("The guest has requested a reset: resume the VM, and save it after the reset")]
    ResetPending,
    /// Saving failed, or the request or the files to restore are invalid.
    #[error(transparent)]
    Snapshot(SnapshotError),
    /// A migration is under way.
    #[error("The VM is being migrated")]
    Migrating,
    /// A snapshot of the running machine is being written.
    #[error("The VM is being saved: wait for the event snapshotted or snapshot-failed")]
    Saving,
    /// After a migration that failed, another process may have them.
    #[error(
        "The VM's disks are still locked elsewhere after a failed migration: wait until the VM resumes, or call vm.resume"
    )]
    DisksReleased,
    /// The machine would be paused until its RAM is complete.
    #[error("RAM is still being restored: send the VM after the event memory-filled")]
    MemoryIncomplete,
    /// There is no migration to cancel.
    #[error("No migration is under way")]
    NotMigrating,
    /// The target may have the machine.
    #[error("The migration can no longer be cancelled")]
    Committed,
    /// Its disks are newer than its memory.
    #[error("The VM has run in another process: delete or reboot it")]
    HasRunElsewhere,
    /// One merge at a time.
    #[error("Snapshots are being merged: wait until that has ended")]
    Merging,
    /// A migration cannot start or failed.
    #[error(transparent)]
    Migration(MigrationError),
    /// Not a file's URL.
    #[error("destination_url must be file:// and the absolute path of a file; got {url:?}")]
    CoreUrl {
        /// The URL.
        url: String,
    },
    /// The core file cannot be created.
    #[error("Cannot create the core file {}", path.display())]
    CoreFile {
        /// The file.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The machine failed.
    #[error(transparent)]
    Machine(VmError),
    /// The queue is full, or the control thread has ended.
    #[error("The request queue of the control thread is full")]
    QueueFull,
}
