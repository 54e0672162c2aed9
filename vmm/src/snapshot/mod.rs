//! Snapshots: a paused VM in a folder.
//!
//! | File | Content |
//! | --- | --- |
//! | `config.json` | the configuration; may be edited before a restore |
//! | `memory-N` | the content of the N-th zone of RAM, sparse |
//! | `state.json` | a line with the machine and the thresholds, a line with the table of each memory file, a line with the checksum |
//!
//! ```text
//!  write:  config.json, memory-N (new files, synced) ─► state.json.partial, synced ─► renamed ─► folder synced
//!  open:   config.json ─► state.json: size, checksum, versions ─► memory-N opened ─► VM created
//! ```
//! A folder without `state.json` is not a snapshot, so a crash or a full disk leaves no damaged one. [`LiveSave`]
//! writes the memory files of a running machine in several passes. A snapshot may have only the difference from another
//! one ([`Link`]). File names are fixed and never read from the files. The formats of the states are in
//! `docs/state.md`.

mod adapt;
mod bounds;
mod chain;
mod error;
mod files;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod link;
mod live;
mod merge;
mod on_demand;
mod pass;
mod progress;
mod read;
mod recorder;
mod saveable;
mod saved_files;
mod state_file;
#[cfg(test)]
mod tests;
mod touched;

use api::ReclaimThresholdsChange;
use serde::{Deserialize, Serialize};
use state::{Fields, Part, Saved, State, StateError, parts};

pub use adapt::adapt;
pub use bounds::state_bytes_max;
pub use chain::{Admit, folders};
pub use error::SnapshotError;
pub use files::{Snapshot, folder_of, memory_of, write};
pub use link::{Base, CHAIN_MAX, Link};
pub use live::{LiveOwner, LiveReport, LiveSave};
pub use merge::merge;
pub use on_demand::{Filling, Received, RestoreContext};
pub use progress::Progress;
pub use recorder::Recorder;
pub use saveable::{
    SERVED_ELSEWHERE, require_content_is_ours, require_recordable, require_recorded,
    require_steady_disks, served_elsewhere,
};
pub use saved_files::saved_config;

/// The machine as it was paused, and the operator's settings that are not in the configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotState {
    /// A `PcState`.
    pub pc: Saved,
    /// Alerts, and the reporting policy if one was set.
    pub thresholds: ReclaimThresholdsChange,
    /// The operator has paused reporting.
    pub reporting_paused: bool,
    /// The requested size of RAM that takes effect at the next reboot, if any.
    pub memory_size_after_reboot: Option<u64>,
    /// The place in a chain of snapshots; none in a migration and in earlier versions.
    pub link: Option<Link>,
    /// The first number that no generated device name has used.
    pub next_device_number: u64,
}

impl SnapshotState {
    /// Whether the snapshot has only the difference from another one.
    pub fn is_difference(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.base.is_some())
    }
}

impl State for SnapshotState {
    const PART: Part = parts::SNAPSHOT;

    /// In version 2, RAM had the size of the configuration. In version 3, there were no chains. In version 4, only the
    /// names in the configuration were taken. In version 5, memory had one checksum for each 2 MiB.
    fn upgrade(from: u32, fields: &mut Fields) -> Result<(), StateError> {
        let (new, value) = match from {
            2 => ("memory_size_after_reboot", ().into()),
            3 => ("link", ().into()),
            4 => ("next_device_number", 0.into()),
            _ => return Ok(()),
        };
        fields.insert(new.to_owned(), value);
        Ok(())
    }
}
