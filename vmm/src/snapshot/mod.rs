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
//! A folder without `state.json` is not a snapshot, so a crash or a full disk leaves none. [`LiveSave`] writes the
//! memory files of a running machine in several passes. File names are fixed and never read from the files. The formats of the states are in `docs/state.md`.

mod adapt;
mod bounds;
mod error;
mod files;
mod live;
mod on_demand;
mod progress;
mod read;
mod state_file;
#[cfg(test)]
mod tests;

use api::ReclaimThresholdsChange;
use serde::{Deserialize, Serialize};
use state::{Fields, Part, Saved, State, StateError, parts};

pub use adapt::adapt;
pub use bounds::state_bytes_max;
pub use error::SnapshotError;
pub use files::{Snapshot, folder_of, memory_of, require_content_is_ours, saved_config, write};
pub use live::{LiveOwner, LiveReport, LiveSave, require_steady_disks, require_tracked_writes};
pub use on_demand::{Filling, RestoreContext};
pub use progress::Progress;

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
}

impl State for SnapshotState {
    const PART: Part = parts::SNAPSHOT;

    /// In version 2, RAM had the size of the configuration.
    fn upgrade(_from: u32, fields: &mut Fields) -> Result<(), StateError> {
        fields.insert("memory_size_after_reboot".to_owned(), ().into());
        Ok(())
    }
}
