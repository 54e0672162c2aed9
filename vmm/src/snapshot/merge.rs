//! Merges a chain of snapshots into a new one, without a machine.

use std::path::Path;

use machine::memory::MemoryState;

use super::chain::Admit;
use super::files::NewSnapshot;
use super::{Link, Snapshot, SnapshotError};

/// Merges the chain that ends with the snapshot in `source` into `destination`, an existing folder without a snapshot.
/// `admit` is asked for the folders of the bases. The old snapshots are unchanged. Every checksum is verified.
///
/// # Errors
/// A snapshot of the chain is damaged or missing, or the new one cannot be written; nothing of it is left then.
pub fn merge(source: &Path, destination: &Path, admit: &Admit<'_>) -> Result<(), SnapshotError> {
    let Snapshot {
        config,
        pc,
        mut state,
        memory,
        ..
    } = Snapshot::open(source, admit)?;
    let map: MemoryState = pc.memory.read().map_err(SnapshotError::State)?;
    let mut new = NewSnapshot::create(destination)?;
    let mut tables = Vec::new();
    for (at, (zone, saved)) in map.zones.iter().zip(&memory).enumerate() {
        let file = new.memory_file(at)?;
        let table = saved.merge(&zone.id, &file, |_| ());
        tables.push(table.map_err(SnapshotError::Content)?);
    }
    state.link = Some(Link::new(None).map_err(SnapshotError::Random)?);
    new.finish(&config, &state, &tables)
}
