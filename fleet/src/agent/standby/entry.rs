//! One VM that is in standby, or that is being saved or woken.

use std::path::Path;

use super::super::clock::unix_ms;
use super::super::journal::Journal;
use super::super::rounds::VmRounds;
use super::super::status::StandbyStatus;
use super::step::{EndOrder, Save, SeenVm, Sight, Step};
use crate::execute::Order;
use crate::host::{Process, ProcessIdentity, holds_vm};
use crate::model::{Bytes, Interlock};
use crate::standby::{Image, Phase, Record, StandbyError, StandbyFolder, images};
use crate::state_file::boot_id;

/// One VM.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) folder: StandbyFolder,
    /// Absent if it cannot be read.
    pub(super) record: Option<Record>,
    /// The reason why the VM can only be discarded.
    pub(super) fault: Option<String>,
    /// How far the save is.
    pub(super) save: Save,
    /// The result of the orders to end the VMM in this phase.
    pub(super) end: EndOrder,
    /// Whether the client that wakes the VM kills the VMM.
    pub(super) is_abandoned: bool,
    /// Disk space of the snapshot.
    disk: Bytes,
    /// The process of the record, if it can be looked up.
    process: Option<Process>,
    /// On the planner's clock: the start of the phase, as far as this agent knows, and the last order.
    since_ms: u64,
    tried_ms: Option<u64>,
}

/// Whether another step may follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    More,
    /// The same, and the memory of the VM is free.
    Freed,
    Last,
    /// The folder is gone.
    Removed,
}

impl Entry {
    /// A VM whose record was read or written.
    pub(super) fn new(folder: StandbyFolder, record: Record, proc: &Path, now_ms: u64) -> Self {
        let checked = folder.check();
        // In the other phases, the snapshot need not be complete, or the next step depends on it.
        let needed = record.phase == Phase::Standby;
        let fault = checked.as_ref().err().filter(|_| needed);
        Self {
            fault: fault.map(|error| api::error_line(error)),
            disk: checked.unwrap_or_default(),
            process: record
                .process_of_boot()
                .and_then(|process| hold(proc, process)),
            record: Some(record),
            ..Self::bare(folder, now_ms)
        }
    }

    /// A VM whose folder or record cannot be used.
    pub(super) fn unusable(folder: StandbyFolder, error: &StandbyError, now_ms: u64) -> Self {
        let fault = api::error_line(error);
        log::error!("{}: {fault}", folder.path().display());
        Self {
            fault: Some(fault),
            ..Self::bare(folder, now_ms)
        }
    }

    fn bare(folder: StandbyFolder, now_ms: u64) -> Self {
        Self {
            folder,
            record: None,
            fault: None,
            save: Save::Unknown,
            end: EndOrder::Unknown,
            is_abandoned: false,
            disk: Bytes::ZERO,
            process: None,
            since_ms: now_ms,
            tried_ms: None,
        }
    }

    /// The phase, unless there is a fault.
    pub(super) fn phase(&self) -> Option<Phase> {
        let record = self.record.as_ref().filter(|_| self.fault.is_none());
        record.map(|record| record.phase)
    }

    /// Whether its process must be left alone, because it is being saved or woken.
    pub(super) fn is_moving(&self) -> bool {
        self.phase().is_some_and(|phase| phase != Phase::Standby)
    }

    /// The phase or the fault, for refusals.
    pub(super) fn word(&self) -> String {
        match (&self.fault, &self.record) {
            (Some(fault), _) => fault.clone(),
            (None, Some(record)) => format!("its phase is {}", record.phase),
            (None, None) => "it has no record".to_owned(),
        }
    }

    pub(super) fn status(&self, name: &str) -> StandbyStatus {
        let record = self.record.as_ref();
        StandbyStatus {
            vm: name.to_owned(),
            phase: record.map(|record| record.phase),
            fault: self.fault.clone(),
            since_unix_ms: record.map_or(0, |record| record.since_unix_ms),
            memory: record.map_or(Bytes::ZERO, |record| record.memory),
            disk: self.disk,
            folder: self.folder.path().display().to_string(),
            socket: record.map_or_else(String::new, |record| record.socket.display().to_string()),
        }
    }

    /// Writes another phase to the record.
    ///
    /// # Errors
    /// It cannot be written. The phase is unchanged then.
    pub(super) fn enter(&mut self, phase: Phase, now_ms: u64) -> Result<(), StandbyError> {
        let Some(mut record) = self.in_phase(phase) else {
            return Ok(());
        };
        if self.phase() == Some(Phase::Ending) && phase == Phase::Standby {
            record.images = self.images();
        }
        self.folder.write(&record)?;
        self.set(record, now_ms);
        Ok(())
    }

    /// The writable images. A VMM does not load a configuration that cannot be read.
    fn images(&self) -> Vec<Image> {
        images(&self.folder.snapshot()).unwrap_or_else(|error| {
            log::warn!("{}", api::error_line(&error));
            Vec::new()
        })
    }

    /// Writes that the VM is another process than before.
    ///
    /// # Errors
    /// As [`Entry::enter`].
    pub(super) fn run_as(
        &mut self,
        process: ProcessIdentity,
        proc: &Path,
        now_ms: u64,
    ) -> Result<(), StandbyError> {
        let Some(record) = self.in_phase(Phase::Running) else {
            return Ok(());
        };
        let boot_id = boot_id();
        let record = Record {
            process,
            boot_id,
            ..record
        };
        self.folder.write(&record)?;
        self.process = hold(proc, process);
        self.set(record, now_ms);
        Ok(())
    }

    fn in_phase(&self, phase: Phase) -> Option<Record> {
        let record = self.record.clone()?;
        Some(Record {
            phase,
            since_unix_ms: unix_ms(),
            ..record
        })
    }

    fn set(&mut self, record: Record, now_ms: u64) {
        self.record = Some(record);
        self.since_ms = now_ms;
        self.tried_ms = None;
        self.fault = None;
        self.end = EndOrder::Unknown;
        self.is_abandoned = false;
    }

    /// The data on which the next step depends; `None` if the operator must act.
    pub(super) fn sight(
        &self,
        name: &str,
        rounds: &VmRounds,
        proc: &Path,
        now_ms: u64,
    ) -> Option<Sight<'_>> {
        let phase = self.phase()?;
        let record = self.record.as_ref()?;
        let has_ended = self.process.as_ref().is_some_and(Process::has_ended)
            || record
                .process_of_boot()
                .is_none_or(|process| process.has_ended(proc));
        Some(Sight {
            phase,
            age_ms: now_ms.saturating_sub(self.since_ms),
            save: &self.save,
            end: self.end,
            tried_ms_ago: self.tried_ms.map(|at| now_ms.saturating_sub(at)),
            has_ended,
            is_complete: self.is_complete(phase, has_ended),
            // If that is unknown, the VM must not be loaded again.
            is_locked: phase == Phase::Waking && self.folder.is_locked().unwrap_or(true),
            is_abandoned: self.is_abandoned,
            vm: self.seen(name, rounds, proc),
        })
    }

    fn is_complete(&self, phase: Phase, has_ended: bool) -> bool {
        match phase {
            Phase::Saving if has_ended => self.folder.check().is_ok(),
            Phase::Ending => !self.folder.check().is_err_and(|error| error.is_damage()),
            _ => false,
        }
    }

    /// Whether the VM may have run since it was saved, and has ended.
    pub(super) fn may_have_run(&self) -> bool {
        let phase = self.record.as_ref().map(|record| record.phase);
        self.fault.is_some() && matches!(phase, Some(Phase::Saving | Phase::Ending))
    }

    /// Checks a snapshot again that could not be used: its file system may have failed for a while.
    pub(super) fn check_again(&mut self) {
        let record = self.record.as_ref();
        if self.fault.is_none() || record.is_none_or(|record| record.phase != Phase::Standby) {
            return;
        }
        match self.folder.check() {
            Ok(disk) => (self.fault, self.disk) = (None, disk),
            Err(error) => self.fault = Some(api::error_line(&error)),
        }
    }

    /// The VM at the socket, if it is this one.
    fn seen(&self, name: &str, rounds: &VmRounds, proc: &Path) -> Option<SeenVm> {
        let record = self.record.as_ref()?;
        let vm = rounds.vm(name)?;
        let reading = vm.reading.as_ref()?;
        let is_this = match record.phase {
            Phase::Waking => self.folder.is_open_in(proc, reading.pid),
            _ => vm.process().is_some() && vm.process() == record.process_of_boot(),
        };
        is_this.then(|| SeenVm {
            runs: vm.runs_unasked(),
            is_paused: reading.interlock == Some(Interlock::Paused),
            is_busy: vm.orders > 0,
        })
    }

    /// Takes a step.
    pub(super) fn take(
        &mut self,
        step: Step,
        name: &str,
        rounds: &mut VmRounds,
        (proc, now_ms): (&Path, u64),
        journal: &mut Journal,
    ) -> Taken {
        match step {
            Step::Wait => return Taken::Last,
            Step::End | Step::Resume => {
                let order = match step {
                    Step::End => Order::End,
                    _ => Order::Resume,
                };
                if order == Order::End && self.end == EndOrder::Unknown {
                    self.end = EndOrder::InProgress;
                }
                rounds.order(name, order);
                self.tried_ms = Some(now_ms);
            }
            Step::Kill => {
                self.kill(name, proc, journal);
                self.tried_ms = Some(now_ms);
            }
            Step::GiveUp(why) => {
                journal.enter("standby", name, why.to_owned());
                self.fault = Some(why.to_owned());
            }
            Step::Remove(why) => match self.folder.remove() {
                Ok(()) => {
                    journal.enter("standby", name, format!("snapshot removed: {why}"));
                    return Taken::Removed;
                }
                Err(error) => log::error!("{}", api::error_line(&error)),
            },
            Step::Become(phase, why) => {
                let process = rounds.vm(name).and_then(|vm| vm.process());
                return self.become_phase(phase, process, (proc, now_ms), |text| {
                    journal.enter("standby", name, format!("{text}: {why}"));
                });
            }
        }
        Taken::Last
    }

    fn become_phase(
        &mut self,
        phase: Phase,
        process: Option<ProcessIdentity>,
        (proc, now_ms): (&Path, u64),
        tell: impl FnOnce(&str),
    ) -> Taken {
        let before = self.phase();
        let written = match (before, phase, process) {
            (Some(Phase::Waking), Phase::Running, Some(process)) => {
                self.run_as(process, proc, now_ms)
            }
            // The record would name the former process, which has ended.
            (Some(Phase::Waking), Phase::Running, None) => return Taken::Last,
            _ => self.enter(phase, now_ms),
        };
        if let Err(error) = written {
            let why = api::error_line(&error);
            log::error!("{why}");
            match (before, phase) {
                // The VM must not be ended.
                (_, Phase::Ending) => {
                    self.save = Save::Ended(Err(why));
                    return Taken::More;
                }
                // The VM must not stay paused, and the next agent would take the same step again.
                (Some(Phase::Saving), Phase::Running) => {
                    let record = self.in_phase(phase);
                    record
                        .into_iter()
                        .for_each(|record| self.set(record, now_ms));
                }
                // Only this agent knows what it has seen, so the step waits until it can be recorded.
                _ => return Taken::Last,
            }
        }
        match (phase, self.folder.check()) {
            (Phase::Standby, Ok(disk)) => {
                self.disk = disk;
                tell(&format!("in standby, {disk} on disk"));
            }
            (Phase::Standby, Err(error)) => {
                let fault = api::error_line(&error);
                tell(&fault);
                self.fault = Some(fault);
            }
            _ => tell(phase.name()),
        }
        match (before, phase) {
            (Some(_), Phase::Standby) => Taken::Freed,
            _ => Taken::More,
        }
    }

    /// Kills the process of the record, if it still runs a VM.
    fn kill(&self, name: &str, proc: &Path, journal: &mut Journal) {
        let Some(process) = &self.process else {
            log::error!("the process of {name:?} cannot be looked up, so it cannot be killed");
            return;
        };
        let pid = process.pid();
        // The observation applies to the process only if it has not ended in the meantime.
        if holds_vm(proc, pid).unwrap_or(false) && process.lives() {
            let text = match process.kill() {
                Ok(()) => format!("process {pid} did not end and was killed"),
                Err(error) => format!("process {pid} cannot be killed: {error}"),
            };
            journal.enter("standby", name, text);
        }
    }
}

/// The process, if it still exists.
fn hold(proc: &Path, identity: ProcessIdentity) -> Option<Process> {
    let process = Process::hold(proc, identity.pid, None);
    process.filter(|process| process.identity() == identity)
}
