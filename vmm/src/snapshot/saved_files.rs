//! Opens the files of one snapshot.

use std::fs::File;
use std::path::{Path, PathBuf};

use api::VmConfig;
use machine::memory::{MemoryState, ZoneContentState};
use machine::pc::PcState;
use state::Saved;

use super::bounds::{Bounds, CONFIG_BYTES_MAX};
use super::read::{open_file, read};
use super::saveable::require_content_is_ours;
use super::state_file::StateFile;
use super::{SnapshotError, SnapshotState};

pub(super) const CONFIG: &str = "config.json";
pub(super) const STATE: &str = "state.json";

pub(super) fn memory_name(zone: usize) -> String {
    format!("memory-{zone}")
}

/// The configuration of the snapshot in `folder`.
///
/// # Errors
/// The snapshot is incomplete, or the file is missing or not a configuration.
pub fn saved_config(folder: &Path) -> Result<VmConfig, SnapshotError> {
    // Without this file, the others may be those of a process that ended before it had written them.
    open_file(&folder.join(STATE))?;
    let path = folder.join(CONFIG);
    let text = read(&path, CONFIG_BYTES_MAX)?;
    serde_json::from_str(&text).map_err(|source| SnapshotError::Json { path, source })
}

/// A snapshot that was opened and checked, except for the content of its memory files.
#[derive(Debug)]
pub(super) struct SavedFiles {
    pub(super) folder: PathBuf,
    pub(super) config: VmConfig,
    pub(super) pc: PcState,
    pub(super) state: SnapshotState,
    /// The memory file of each zone and its table.
    pub(super) memory: Vec<(File, ZoneContentState)>,
}

impl SavedFiles {
    /// Opens the snapshot in `folder`.
    ///
    /// # Errors
    /// A file is missing, damaged, or of another version.
    pub(super) fn open(folder: &Path) -> Result<Self, SnapshotError> {
        let config = saved_config(folder)?;
        require_content_is_ours(&config)?;
        let bounds = Bounds::of(&config);
        let path = folder.join(STATE);
        let mut lines = StateFile::open(&path, bounds.file)?;
        let saved: Saved = lines.next(bounds.machine)?;
        let state: SnapshotState = saved.read().map_err(SnapshotError::State)?;
        let pc: PcState = state.pc.read().map_err(SnapshotError::State)?;
        let map: MemoryState = pc.memory.read().map_err(SnapshotError::State)?;
        let mut memory = Vec::new();
        for at in 0..map.zones.len() {
            let table: ZoneContentState = lines.next(bounds.table)?;
            let path = folder.join(memory_name(at));
            let (file, bytes) = open_file(&path)?;
            if bytes != table.bytes {
                let reason = "its size is not that of its zone";
                return Err(SnapshotError::Damaged { path, reason });
            }
            memory.push((file, table));
        }
        lines.end()?;
        Ok(Self {
            folder: folder.to_owned(),
            config,
            pc,
            state,
            memory,
        })
    }
}
