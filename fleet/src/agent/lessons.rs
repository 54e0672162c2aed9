//! Saves what the agent learned about VMs for its successor.
//!
//! A lesson concerns one process and ends with it. The planner's clock counts from the start of the machine. Times in
//! the file are therefore valid for the next agent, until the machine restarts. The file need not be synced to disk,
//! because the VMs end with the machine.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::host::ProcessIdentity;
use crate::model::{Lessons, VmId};
use crate::state_file::{boot_id, replace_in_memory};

/// Version of the file; a file of another version is ignored.
const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    process: Option<ProcessIdentity>,
    lessons: Lessons,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Saved {
    version: u32,
    boot: String,
    vms: BTreeMap<VmId, Record>,
}

/// Lessons by VM.
#[derive(Debug, Default)]
pub(super) struct SavedLessons {
    path: PathBuf,
    /// This start of the machine.
    boot: String,
    records: BTreeMap<VmId, Record>,
    changed: bool,
}

impl SavedLessons {
    /// Opens the lessons in `state_dir`. Without a readable file, everything is learned again.
    pub(super) fn open(state_dir: &Path) -> Self {
        let path = state_dir.join("lessons.json");
        let saved: Saved = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Saved::default(),
            Err(error) => {
                log::error!("cannot read {}: {error}", path.display());
                Saved::default()
            }
            Ok(text) => serde_json::from_str(&text).unwrap_or_else(|error| {
                log::error!("cannot parse {}: {error}", path.display());
                Saved::default()
            }),
        };
        let boot = boot_id();
        let holds = saved.version == VERSION && saved.boot == boot;
        Self {
            path,
            boot,
            records: if holds { saved.vms } else { BTreeMap::new() },
            changed: false,
        }
    }

    /// The lessons about a VM while this process ran it. A process that could not be looked up counts as the same one.
    pub(super) fn of(&self, vm: &VmId, process: Option<ProcessIdentity>) -> Lessons {
        self.records
            .get(vm)
            .filter(|record| process.is_none() || record.process == process)
            .map_or_else(Lessons::default, |record| record.lessons.clone())
    }

    /// Records the current knowledge. A process that could not be looked up counts as the previous one.
    pub(super) fn enter(&mut self, vm: &VmId, process: Option<ProcessIdentity>, lessons: Lessons) {
        let before = self.records.get(vm);
        let process = process.or_else(|| before?.process);
        let record = Record { process, lessons };
        if before != Some(&record) {
            self.records.insert(vm.clone(), record);
            self.changed = true;
        }
    }

    /// Drops VMs that are gone, and saves changes.
    ///
    /// # Errors
    /// It cannot be saved. The next agent knows less; nothing else is lost.
    pub(super) fn save(&mut self, is_there: impl Fn(&VmId) -> bool) -> io::Result<()> {
        let before = self.records.len();
        self.records.retain(|vm, _| is_there(vm));
        if !self.changed && self.records.len() == before {
            return Ok(());
        }
        let saved = Saved {
            version: VERSION,
            boot: self.boot.clone(),
            vms: self.records.clone(),
        };
        replace_in_memory(&self.path, &serde_json::to_vec(&saved)?)?;
        self.changed = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PROCESS: Option<ProcessIdentity> = Some(ProcessIdentity {
        pid: 7,
        start_ticks: 2,
    });

    #[test]
    fn lessons_outlive_the_agent_and_end_with_the_process() {
        let folder = tempfile::TempDir::new().unwrap();
        let vm = VmId::from("a");
        let lessons = Lessons {
            turns_ms: vec![5, 6],
            ..Lessons::default()
        };
        let mut book = SavedLessons::open(folder.path());
        book.enter(&vm, PROCESS, lessons.clone());
        book.save(|_| true).unwrap();
        let mut next = SavedLessons::open(folder.path());
        assert_eq!(next.of(&vm, PROCESS), lessons);
        assert_eq!(next.of(&vm, None), lessons);
        let other = PROCESS.map(|process| ProcessIdentity {
            start_ticks: process.start_ticks + 1,
            ..process
        });
        assert_eq!(next.of(&vm, other), Lessons::default());
        next.save(|_| false).unwrap();
        let last = SavedLessons::open(folder.path());
        assert_eq!(last.of(&vm, PROCESS), Lessons::default());
    }

    #[test]
    fn lessons_hold_when_the_process_could_not_be_looked_up_for_a_while() {
        let folder = tempfile::TempDir::new().unwrap();
        let vm = VmId::from("a");
        let lessons = |turn_ms| Lessons {
            turns_ms: vec![turn_ms],
            ..Lessons::default()
        };
        let mut book = SavedLessons::open(folder.path());
        book.enter(&vm, PROCESS, lessons(5));
        book.enter(&vm, None, lessons(6));
        assert_eq!(book.of(&vm, PROCESS), lessons(6));
    }

    #[test]
    fn lessons_that_cannot_be_read_are_learned_anew() {
        let folder = tempfile::TempDir::new().unwrap();
        fs::write(folder.path().join("lessons.json"), "{").unwrap();
        let book = SavedLessons::open(folder.path());
        assert_eq!(book.of(&VmId::from("a"), PROCESS), Lessons::default());
    }
}
