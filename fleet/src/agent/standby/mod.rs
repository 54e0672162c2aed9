//! Manages the VMs in standby, and those that are being saved or woken.
//!
//! The control loop takes the steps (`step.rs`), so the thread that gives orders also writes the records. Only the VM's
//! own thread waits for its VMM.

mod entry;
mod idle;
mod step;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::clock::{Clock, unix_ms};
use super::journal::Journal;
use super::locks::FolderLock;
use super::request::{DiscardRequest, StandbyRequest, WokenRequest};
use super::rounds::VmRounds;
use super::status::StandbyStatus;
use crate::agent_config::AgentConfig;
use crate::config::Millis;
use crate::execute::{Order, OrderError, SaveError};
use crate::host::{ProcessIdentity, ids_of};
use crate::http::{Request, Response};
use crate::sample::VMS_MAX;
use crate::standby::{Phase, Record, StandbyError, StandbyFolder, check_name, clean, names};
use crate::worker::{OrderDone, VmEvent, VmEventKind};
use entry::{Entry, Taken};
use idle::IdleVms;
use step::{EndOrder, Save};

/// Maximum number of steps of one VM at once; the longest way has fewer.
const STEPS_MAX: usize = 8;

/// Ends refusals that the client can override.
const FORCE: &str = "; ch-fleet wake --force loads the memory nevertheless";

/// All of them, by name.
#[derive(Debug)]
pub(super) struct Standbys {
    dir: Option<PathBuf>,
    proc: PathBuf,
    clock: Clock,
    entries: BTreeMap<String, Entry>,
    idle: IdleVms,
    /// Held as long as the agent runs: another one would resume VMs that this one saves.
    _lock: Option<FolderLock>,
}

impl Standbys {
    /// Reads the folders of all VMs. A folder that cannot be used has a fault, and does not keep the agent from starting.
    ///
    /// # Errors
    /// The folder of the folders cannot be used.
    pub(super) fn open(
        config: &AgentConfig,
        proc: PathBuf,
        clock: Clock,
        lock: Option<FolderLock>,
    ) -> Result<Self, StandbyError> {
        let dir = config.agent.standby_dir.clone();
        let mut all = Self {
            dir: dir.clone(),
            proc,
            clock,
            entries: BTreeMap::new(),
            idle: IdleVms::default(),
            _lock: lock,
        };
        let Some(dir) = dir else {
            return Ok(all);
        };
        clean(&dir)?;
        for name in names(&dir)? {
            let now_ms = clock.now_ms();
            let entry = match StandbyFolder::open(&dir, &name) {
                Ok((folder, record)) => Entry::new(folder, record, &all.proc, now_ms),
                Err(error) => Entry::unusable(StandbyFolder::at(&dir, &name), &error, now_ms),
            };
            all.entries.insert(name, entry);
        }
        Ok(all)
    }

    /// Whether a VM has this name here: it must neither be started nor reserved for otherwise.
    pub(super) fn holds(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Their names.
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.entries.keys().cloned().collect()
    }

    /// For the status.
    pub(super) fn status(&self) -> Vec<StandbyStatus> {
        let entries = self.entries.iter();
        entries.map(|(name, entry)| entry.status(name)).collect()
    }

    /// `PUT fleet.standby`
    pub(super) fn begin(
        &mut self,
        request: &Request,
        config: &AgentConfig,
        rounds: &mut VmRounds,
        journal: &mut Journal,
    ) -> Result<Response, Response> {
        let StandbyRequest { vm: name } = request.json()?;
        self.save(name, config, rounds, journal)
            .map(|()| Response::done())
    }

    /// Puts a VM in standby if it has been idle for the time in its policy. Called after each of its samples.
    pub(super) fn watch(
        &mut self,
        name: &str,
        config: &AgentConfig,
        rounds: &mut VmRounds,
        journal: &mut Journal,
    ) {
        let Some(vm) = rounds.vm(name) else {
            return;
        };
        let activity = vm.reading.as_ref().and_then(|reading| reading.activity);
        let at_ms = vm
            .reading
            .as_ref()
            .map_or(0, |reading| reading.sample.at_ms);
        let (Some(activity), Some(process)) = (activity, vm.process()) else {
            return;
        };
        let policy = config.idle_policy(name);
        // A pinned VM, for example, is not put in standby, and may be idle for long.
        let Some(policy) = policy.filter(|_| vm.interlock().is_none()) else {
            self.idle.forget(name);
            return;
        };
        let idle_ms = self.idle.sampled(name, process, (at_ms, activity), policy);
        if idle_ms < policy.idle_standby.0 {
            return;
        }
        // If this fails, it is tried again after the same time.
        self.idle.forget(name);
        let text = match self.save(name.to_owned(), config, rounds, journal) {
            Ok(()) => format!("idle for {}", Millis(idle_ms)),
            Err(refusal) => format!(
                "idle for {}, but not saved: {}",
                Millis(idle_ms),
                String::from_utf8_lossy(&refusal.body)
            ),
        };
        journal.enter("standby", name, text);
    }

    fn save(
        &mut self,
        name: String,
        config: &AgentConfig,
        rounds: &mut VmRounds,
        journal: &mut Journal,
    ) -> Result<(), Response> {
        let Some(dir) = self.dir.clone() else {
            let text = "Set agent.standby_dir to put VMs in standby".to_owned();
            return Err(Response::error(400, &[text]));
        };
        require_orders(config)?;
        check_name(&name).map_err(|error| Response::error(400, &api::error_chain(&error)))?;
        if let Some(entry) = self.entries.get(&name) {
            return Err(conflict(&format!(
                "{name:?} is in standby already: {}",
                entry.word()
            )));
        }
        if self.entries.len() >= VMS_MAX {
            return Err(conflict(&format!("{VMS_MAX} VMs are in standby already")));
        }
        let record = self.record(&name, rounds)?;
        let failed = |error| Response::error(500, &api::error_chain(&error));
        let folder = StandbyFolder::create(&dir, &record).map_err(failed)?;
        let order = Order::Save {
            folder: folder.snapshot(),
            deadline: config.agent.standby_deadline.duration(),
        };
        let mut entry = Entry::new(folder, record, &self.proc, self.clock.now_ms());
        entry.save = Save::Ordered;
        if !rounds.order(&name, order) {
            entry.folder.remove().map_err(failed)?;
            return Err(no_vm(&name));
        }
        rounds.hold(&name, true);
        journal.enter("standby", &name, "saving".to_owned());
        self.entries.insert(name, entry);
        Ok(())
    }

    /// The agent's data about a VM that may be saved now.
    fn record(&self, name: &str, rounds: &VmRounds) -> Result<Record, Response> {
        let vm = rounds.vm(name).ok_or_else(|| no_vm(name))?;
        let Some(reading) = vm.reading.as_ref().filter(|_| vm.missed == 0) else {
            return Err(conflict(&format!("{name:?} does not respond")));
        };
        if let Some(interlock) = vm.interlock() {
            return Err(conflict(&format!(
                "{name:?} must not be changed: {interlock}"
            )));
        }
        let process = vm.process().ok_or_else(|| {
            conflict(&format!(
                "The process of {name:?} is unknown, so it could not be ended"
            ))
        })?;
        let (uid, gid) = ids_of(&self.proc, process.pid).map_err(|error| {
            let text = format!("The user of process {} is unknown", process.pid);
            Response::error(500, &[text, error.to_string()])
        })?;
        Ok(Record::saving(
            name,
            vm.socket.clone(),
            (process, uid, gid),
            (reading.configured, reading.huge_pages),
            unix_ms(),
        ))
    }

    /// The VM that a request wants to wake, if that is possible now. The client must hold the lock.
    pub(super) fn to_wake(
        &self,
        (name, force): (&str, bool),
        config: &AgentConfig,
        rounds: &VmRounds,
    ) -> Result<Record, Response> {
        require_orders(config)?;
        let entry = self.entries.get(name).ok_or_else(|| not_there(name))?;
        let is_still = entry.phase() == Some(Phase::Standby);
        let may_wake = is_still || force && entry.may_have_run();
        let Some(record) = entry.record.as_ref().filter(|_| may_wake) else {
            let hint = if entry.may_have_run() { FORCE } else { "" };
            return Err(conflict(&format!(
                "{name:?} cannot be woken: {}{hint}",
                entry.word()
            )));
        };
        let changed = record.images.iter().find(|image| image.has_changed());
        if let Some(image) = changed.filter(|_| !force) {
            return Err(conflict(&format!(
                "{name:?} cannot be woken: {} was changed after the VM had been saved, so its memory does not match{FORCE}",
                image.path.display()
            )));
        }
        // The socket of a VMM that was killed stays, until another one replaces it.
        let other = rounds.vm(name).is_some_and(|vm| {
            let is_former = vm.process().is_some() && vm.process() == record.process_of_boot();
            !vm.has_ended() && !is_former
        });
        if other {
            return Err(conflict(&format!(
                "another VM {name:?} runs already: end it first"
            )));
        }
        let failed = |error| Response::error(409, &api::error_chain(&error));
        entry.folder.check().map_err(failed)?;
        match entry.folder.is_locked().map_err(failed)? {
            true => Ok(record.clone()),
            false => Err(conflict(&format!(
                "Lock {} first",
                entry.folder.lock().display()
            ))),
        }
    }

    /// Records that the client that holds the lock starts a VMM. Returns the folder of the snapshot.
    pub(super) fn wake(&mut self, name: &str, journal: &mut Journal) -> Result<PathBuf, Response> {
        let now_ms = self.clock.now_ms();
        let entry = self.entries.get_mut(name).ok_or_else(|| not_there(name))?;
        entry
            .enter(Phase::Waking, now_ms)
            .map_err(|error| Response::error(500, &api::error_chain(&error)))?;
        journal.enter("standby", name, "waking".to_owned());
        Ok(entry.folder.snapshot())
    }

    /// `PUT fleet.woken`: a VMM has loaded the snapshot, and is going to run.
    pub(super) fn woken(
        &mut self,
        request: &Request,
        journal: &mut Journal,
    ) -> Result<Response, Response> {
        let WokenRequest {
            vm: name,
            pid,
            failed,
        } = request.json()?;
        if failed {
            return self.abandon(&name);
        }
        let now_ms = self.clock.now_ms();
        let entry = self
            .entries
            .get_mut(&name)
            .ok_or_else(|| not_there(&name))?;
        let process = ProcessIdentity::of(&self.proc, pid);
        let phase = entry
            .record
            .as_ref()
            .map(|record| (record.phase, record.process));
        match (phase, process) {
            (Some((Phase::Running, known)), Some(process)) if known == process => {}
            (Some((Phase::Waking, _)), Some(process))
                if entry.folder.is_open_in(&self.proc, pid) =>
            {
                entry
                    .run_as(process, &self.proc, now_ms)
                    .map_err(|error| Response::error(500, &api::error_chain(&error)))?;
                journal.enter("standby", &name, format!("woken as process {pid}"));
            }
            (Some((Phase::Waking, _)), _) => {
                let lock = entry.folder.lock();
                let text = format!(
                    "Process {pid} did not inherit {}: the command must start the VMM in its own process",
                    lock.display()
                );
                return Err(conflict(&text));
            }
            _ => {
                return Err(conflict(&format!(
                    "{name:?} is not being woken: {}",
                    entry.word()
                )));
            }
        }
        Ok(Response::done())
    }

    /// The client that wakes the VM is going to kill the VMM. From now on the VM does not become its process.
    fn abandon(&mut self, name: &str) -> Result<Response, Response> {
        let entry = self.entries.get_mut(name).ok_or_else(|| not_there(name))?;
        match entry.phase() {
            Some(Phase::Waking | Phase::Standby) => {
                entry.is_abandoned = true;
                Ok(Response::done())
            }
            _ => Err(conflict(&format!(
                "{name:?} must not be killed: {}",
                entry.word()
            ))),
        }
    }

    /// `PUT fleet.discard`
    pub(super) fn discard(
        &mut self,
        request: &Request,
        config: &AgentConfig,
        rounds: &mut VmRounds,
        journal: &mut Journal,
    ) -> Result<Response, Response> {
        require_orders(config)?;
        let DiscardRequest { vm: name } = request.json()?;
        let entry = self.entries.get(&name).ok_or_else(|| not_there(&name))?;
        let is_still = matches!(entry.phase(), None | Some(Phase::Standby));
        // The folder of an unusable VM may have no lock.
        if !is_still || entry.folder.is_locked().unwrap_or(false) {
            return Err(conflict(&format!(
                "{name:?} cannot be discarded: {}",
                entry.word()
            )));
        }
        let removed = entry.folder.remove();
        removed.map_err(|error| Response::error(500, &api::error_chain(&error)))?;
        journal.enter("standby", &name, "discarded".to_owned());
        self.entries.remove(&name);
        rounds.hold(&name, false);
        Ok(Response::done())
    }

    /// Notes the end of an order of this module; true if the event was one.
    pub(super) fn note(&mut self, event: &VmEvent) -> bool {
        let VmEventKind::Done(OrderDone { order, result }) = &event.kind else {
            return false;
        };
        let Some(entry) = self.entries.get_mut(event.id.as_str()) else {
            return false;
        };
        match order {
            Order::Save { folder, .. } if *folder == entry.folder.snapshot() => {
                let result = result.as_ref();
                let result = result.map(|&()| ()).map_err(|error| api::error_line(error));
                entry.save = Save::Ended(result);
            }
            Order::End => {
                entry.end = match result {
                    Ok(()) | Err(OrderError::Save(SaveError::NotEnded(_))) => EndOrder::Paused,
                    Err(OrderError::Save(SaveError::State { .. })) => EndOrder::Resumed,
                    Err(_) if entry.end == EndOrder::InProgress => EndOrder::Unknown,
                    Err(_) => entry.end,
                };
            }
            _ => return false,
        }
        true
    }

    /// Takes all steps that are possible now. Returns the VMs whose memory is free since then.
    pub(super) fn follow(
        &mut self,
        config: &AgentConfig,
        rounds: &mut VmRounds,
        journal: &mut Journal,
    ) -> Vec<String> {
        let (mut freed, mut removed) = (Vec::new(), Vec::new());
        let at = (self.proc.as_path(), self.clock.now_ms());
        self.idle.keep(|name| rounds.has_vm(name));
        for (name, entry) in &mut self.entries {
            rounds.hold(name, entry.is_moving());
            if config.agent.dry_run {
                continue;
            }
            entry.check_again();
            for _ in 0..STEPS_MAX {
                let sight = entry.sight(name, rounds, at.0, at.1);
                let Some(step) = sight.map(|sight| sight.step()) else {
                    break;
                };
                match entry.take(step, name, rounds, at, journal) {
                    Taken::More => {}
                    Taken::Freed => freed.push(name.clone()),
                    Taken::Removed => {
                        removed.push(name.clone());
                        break;
                    }
                    Taken::Last => break,
                }
            }
        }
        for name in removed {
            self.entries.remove(&name);
            rounds.hold(&name, false);
        }
        freed
    }
}

/// With `dry_run`, the agent changes no VM and no folder.
fn require_orders(config: &AgentConfig) -> Result<(), Response> {
    if config.agent.dry_run {
        return Err(conflict(
            "The agent changes nothing: it was started with dry_run",
        ));
    }
    Ok(())
}

fn conflict(text: &str) -> Response {
    Response::error(409, &[text.to_owned()])
}

fn no_vm(name: &str) -> Response {
    Response::error(404, &[format!("There is no VM {name:?}")])
}

fn not_there(name: &str) -> Response {
    Response::error(404, &[format!("There is no VM {name:?} in standby")])
}
