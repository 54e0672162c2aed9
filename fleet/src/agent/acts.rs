//! Records the acts that the agent must undo (pauses, limits of control groups), and the VMs that it must not manage.
//!
//! An act is saved before it is executed, and removed after its reversal was confirmed. Therefore the next agent knows
//! which acts are in force, even if this one was killed. An act applies to one process and ends with it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::execute::{GroupFile, Order};
use crate::host::ProcessIdentity;
use crate::model::{Bytes, InForce, VmId};
use crate::state_file::replace;

/// Version of the file; another one is rejected rather than misread.
const VERSION: u32 = 1;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    process: Option<ProcessIdentity>,
    acts: InForce,
    /// Whether the operator excluded the VM.
    #[serde(default)]
    pinned: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    version: u32,
    vms: BTreeMap<VmId, Record>,
}

/// The acts in force, by VM.
#[derive(Debug, Default)]
pub(super) struct Acts {
    path: PathBuf,
    records: BTreeMap<VmId, Record>,
}

impl Acts {
    /// Opens the list in `state_dir`, without acts on processes that have ended.
    ///
    /// # Errors
    /// The list exists but cannot be read. Without it, VMs would stay paused or limited forever.
    pub(super) fn open(state_dir: &Path, proc: &Path) -> io::Result<Self> {
        let path = state_dir.join("acts.json");
        let mut records = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            text => {
                let saved: Saved = serde_json::from_str(&text?)?;
                if saved.version != VERSION {
                    let text = format!("version {} is unknown", saved.version);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                saved.vms
            }
        };
        records.retain(|_, record| {
            record
                .process
                .is_none_or(|process| !process.has_ended(proc))
        });
        Ok(Self { path, records })
    }

    /// The acts in force on a VM.
    pub(super) fn of(&self, vm: &VmId) -> InForce {
        self.records
            .get(vm)
            .map_or_else(InForce::default, |record| record.acts)
    }

    /// Records the effect of an order. The order must not be sent before that.
    ///
    /// # Errors
    /// It cannot be saved, so the order must not be executed.
    pub(super) fn begin(
        &mut self,
        vm: &VmId,
        process: Option<ProcessIdentity>,
        order: &Order,
    ) -> io::Result<()> {
        self.change_acts(vm, process, |acts| match *order {
            Order::Pause => acts.paused = true,
            Order::Group(GroupFile::MemoryHigh, Some(_)) => acts.high = true,
            Order::Group(GroupFile::SwapMax, Some(limit)) if limit > Bytes::ZERO => {
                acts.swap = true;
            }
            Order::Group(GroupFile::MemoryMax, Some(limit)) => acts.max = Some(limit),
            _ => {}
        })
    }

    /// Removes the acts that an order has undone.
    ///
    /// # Errors
    /// The change cannot be saved, so the act would be undone once more.
    pub(super) fn end(&mut self, vm: &VmId, order: &Order) -> io::Result<()> {
        self.change_acts(vm, None, |acts| match *order {
            Order::Resume => acts.paused = false,
            Order::Group(GroupFile::MemoryHigh, None) => acts.high = false,
            Order::Group(GroupFile::SwapMax, Some(Bytes::ZERO)) => acts.swap = false,
            Order::Group(GroupFile::MemoryMax, None) => acts.max = None,
            _ => {}
        })
    }

    /// Drops acts on any other process than this one. A process that could not be looked up does not count as another
    /// one.
    pub(super) fn follow(&mut self, vm: &VmId, process: Option<ProcessIdentity>) -> io::Result<()> {
        let other = self
            .records
            .get(vm)
            .and_then(|record| record.process)
            .is_some_and(|before| process.is_some_and(|process| process != before));
        if other {
            self.change(vm, |record| *record = Record::default())?;
        }
        Ok(())
    }

    /// Whether the operator excluded a VM.
    pub(super) fn is_pinned(&self, vm: &VmId) -> bool {
        self.records.get(vm).is_some_and(|record| record.pinned)
    }

    /// Excludes a VM while its process exists, or includes it again.
    ///
    /// # Errors
    /// It cannot be saved, so the next agent would not know.
    pub(super) fn pin(
        &mut self,
        vm: &VmId,
        process: Option<ProcessIdentity>,
        pinned: bool,
    ) -> io::Result<()> {
        self.change(vm, |record| {
            record.process = process.or(record.process);
            record.pinned = pinned;
        })
    }

    /// The orders that undo all acts on a VM.
    pub(super) fn undoing(&self, vm: &VmId) -> Vec<Order> {
        let acts = self.of(vm);
        let orders = [
            (acts.paused, Order::Resume),
            (acts.high, Order::Group(GroupFile::MemoryHigh, None)),
            (
                acts.swap,
                Order::Group(GroupFile::SwapMax, Some(Bytes::ZERO)),
            ),
            (acts.max.is_some(), Order::Group(GroupFile::MemoryMax, None)),
        ];
        orders
            .into_iter()
            .filter_map(|(is, order)| is.then_some(order))
            .collect()
    }

    fn change_acts(
        &mut self,
        vm: &VmId,
        process: Option<ProcessIdentity>,
        change: impl FnOnce(&mut InForce),
    ) -> io::Result<()> {
        self.change(vm, |record| {
            let before = record.acts;
            change(&mut record.acts);
            if record.acts != before {
                record.process = process.or(record.process);
            }
        })
    }

    fn change(&mut self, vm: &VmId, change: impl FnOnce(&mut Record)) -> io::Result<()> {
        let before = self.records.get(vm).cloned().unwrap_or_default();
        let mut record = before.clone();
        change(&mut record);
        if record == before {
            return Ok(());
        }
        let mut vms = self.records.clone();
        if record.acts == InForce::default() && !record.pinned {
            vms.remove(vm);
        } else {
            vms.insert(vm.clone(), record);
        }
        let saved = Saved {
            version: VERSION,
            vms,
        };
        replace(&self.path, &serde_json::to_vec_pretty(&saved)?)?;
        // Only saved acts count: an act that could not be saved is tried again as if it were new.
        self.records = saved.vms;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn act_that_could_not_be_saved_is_not_in_force() {
        let folder = tempfile::TempDir::new().unwrap();
        let proc = Path::new("/proc");
        let vm = VmId::from("a");
        let state_dir = folder.path().join("state");
        fs::create_dir(&state_dir).unwrap();
        let mut acts = Acts::open(&state_dir, proc).unwrap();
        fs::remove_dir(&state_dir).unwrap();
        for _ in 0..2 {
            acts.begin(&vm, None, &Order::Pause).unwrap_err();
            acts.pin(&vm, None, true).unwrap_err();
        }
        assert!(!acts.of(&vm).paused && !acts.is_pinned(&vm));
        fs::create_dir(&state_dir).unwrap();
        acts.begin(&vm, None, &Order::Pause).unwrap();
        assert!(acts.of(&vm).paused);
    }

    #[test]
    fn process_that_cannot_be_looked_up_is_no_other_one() {
        let folder = tempfile::TempDir::new().unwrap();
        let own = ProcessIdentity::of(
            Path::new("/proc"),
            i32::try_from(std::process::id()).unwrap(),
        );
        let vm = VmId::from("a");
        let mut acts = Acts::open(folder.path(), Path::new("/proc")).unwrap();
        acts.begin(&vm, own, &Order::Pause).unwrap();
        acts.follow(&vm, None).unwrap();
        assert!(acts.of(&vm).paused);
        // A file that cannot be read is not a process that has ended.
        let proc = folder.path().join("proc");
        let pid = std::process::id().to_string();
        fs::create_dir_all(proc.join(&pid).join("stat")).unwrap();
        assert!(Acts::open(folder.path(), &proc).unwrap().of(&vm).paused);
        fs::remove_dir_all(&proc).unwrap();
        assert!(!Acts::open(folder.path(), &proc).unwrap().of(&vm).paused);
    }

    #[test]
    fn act_is_on_disk_before_it_is_done_and_until_it_is_undone() {
        let folder = tempfile::TempDir::new().unwrap();
        let proc = Path::new("/proc");
        let own = ProcessIdentity::of(proc, i32::try_from(std::process::id()).unwrap());
        let vm = VmId::from("a");
        let open = || Acts::open(folder.path(), proc).unwrap();
        let mut acts = open();
        acts.begin(&vm, own, &Order::Pause).unwrap();
        let limit = Order::Group(GroupFile::MemoryMax, Some(Bytes::gib(1)));
        acts.begin(&vm, own, &limit).unwrap();
        let mut next = open();
        assert_eq!(
            next.undoing(&vm),
            [Order::Resume, Order::Group(GroupFile::MemoryMax, None)]
        );
        next.end(&vm, &Order::Resume).unwrap();
        assert!(!open().of(&vm).paused);
        assert_eq!(open().of(&vm).max, Some(Bytes::gib(1)));
    }

    #[test]
    fn act_ends_with_its_process() {
        let folder = tempfile::TempDir::new().unwrap();
        let proc = Path::new("/proc");
        let vm = VmId::from("a");
        let gone = ProcessIdentity {
            pid: i32::MAX,
            start_ticks: 1,
        };
        let mut acts = Acts::open(folder.path(), proc).unwrap();
        acts.begin(&vm, Some(gone), &Order::Pause).unwrap();
        assert!(acts.of(&vm).paused);
        assert!(!Acts::open(folder.path(), proc).unwrap().of(&vm).paused);
        let other = ProcessIdentity {
            pid: 7,
            start_ticks: 2,
        };
        acts.follow(&vm, Some(other)).unwrap();
        assert!(!acts.of(&vm).paused);
    }

    #[test]
    fn list_that_cannot_be_read_is_not_taken_for_an_empty_one() {
        let folder = tempfile::TempDir::new().unwrap();
        fs::write(folder.path().join("acts.json"), "{").unwrap();
        assert!(Acts::open(folder.path(), Path::new("/proc")).is_err());
    }
}
