//! The life cycle of the VM, without threads: the effect of each request in each state.
//!
//! ```text
//!            create            boot                 pause
//!  nothing ─────────► Created ──────► Running ◄──────────────► Paused
//!     ▲                 │ ▲              │         resume         │
//!     │     delete      │ └──────────────┴──── shutdown ──────────┤
//!     └─────────────────┴──────────────── delete ─────────────────┘
//! ```
//! While a migration is under way, changes from outside are rejected.
//!
//! A snapshot requires Paused and keeps that state, unless it is live; a restore leads from nothing to Paused. If a boot
//! or reboot fails, the state is Created, and all resources have been released.
//!
//! `saving`, `live_snapshot`, `devices`, `resize` and `migration` have the requests of these subjects.

use std::sync::Arc;

use api::config::MemoryUnavailableAction;
use api::{Endpoint, ReclaimThresholdsChange, VmBalloonReporting, VmConfig, VmState};

use super::current_migration::Migration;
use super::current_snapshot::LiveSnapshot;
use super::error::{Done, LifecycleError, RequestError};
use super::reporting::Reporting;
use super::taps::Taps;
use crate::config::{self, DeviceNumbers};
use crate::events::EventKind;
use crate::landlock::Confinement;
use crate::snapshot::{Progress, Recorder, Snapshot};
use crate::thresholds::{Subjects, Thresholds};
use crate::view::{MachineView, PublishedView, View};
use crate::vm::{Machine, MachineFactory, VmContext, VmError};

/// The VM and every change that a request can make to it.
///
/// Endpoints call the public methods on the control thread.
pub struct Lifecycle {
    pub(super) config: Option<VmConfig>,
    /// Kept and discarded with the configuration.
    pub(super) device_numbers: DeviceNumbers,
    make_machine: MachineFactory,
    pub(super) machine: Option<Box<dyn Machine>>,
    /// Counts machines and hot-plugged balloons: figures start from zero with each.
    pub(super) generation: u64,
    /// The number of machines created so far; the number of the current one.
    machine_number: u64,
    pub(super) taps: Taps,
    pub(super) paused: bool,
    /// The guest has requested a reset that is still pending.
    pub(super) reset_requested: bool,
    view: Arc<PublishedView>,
    /// Kept across reboots; discarded with the configuration.
    pub(super) reporting: Reporting,
    events_are_read: bool,
    pub(super) context: VmContext,
    /// The confinement of the control thread, which calls every public method.
    pub(super) confinement: Confinement,
    ended: bool,
    pub(super) migration: Option<Migration>,
    /// The machine is being saved while it runs.
    pub(super) live_snapshot: Option<LiveSnapshot>,
    /// Records the writes of the machine since a snapshot.
    pub(super) recorder: Option<Recorder>,
    /// Snapshots are being merged.
    pub(super) merging: Option<Done>,
    /// The paused machine does not hold the locks of its disks.
    pub(super) disks_released: bool,
    /// The machine is older than its disks, which it has used in another process.
    pub(super) has_run_elsewhere: bool,
}

virtio_devices::debug_fields!(Lifecycle {});

impl Lifecycle {
    pub(super) fn new(
        make_machine: MachineFactory,
        view: Arc<PublishedView>,
        thresholds: Arc<Thresholds>,
        events_are_read: bool,
        context: VmContext,
    ) -> Self {
        Self {
            config: None,
            device_numbers: DeviceNumbers::default(),
            make_machine,
            machine: None,
            generation: 0,
            machine_number: 0,
            taps: Taps::default(),
            paused: false,
            reset_requested: false,
            view,
            reporting: Reporting::new(thresholds),
            events_are_read,
            context,
            confinement: Confinement::default(),
            ended: false,
            migration: None,
            live_snapshot: None,
            recorder: None,
            merging: None,
            disks_released: false,
            has_run_elsewhere: false,
        }
    }

    /// As [`Lifecycle::run`], for a request from outside.
    pub(super) fn run_request<T>(
        &mut self,
        endpoint: Endpoint,
        change: impl FnOnce(&mut Self) -> Result<T, LifecycleError>,
    ) -> Result<T, RequestError> {
        let is_allowed = matches!(
            endpoint,
            Endpoint::VmmShutdown
                | Endpoint::VmSendMigration
                | Endpoint::VmReceiveMigration
                | Endpoint::VmCancelMigration
        );
        if self.migration.is_some() && !is_allowed {
            let cause = LifecycleError::Migrating;
            return Err(RequestError { endpoint, cause });
        }
        self.run(endpoint, change)
    }

    /// Executes a change and publishes the result, so that a client that receives the response also sees the effect.
    pub(super) fn run<T>(
        &mut self,
        endpoint: Endpoint,
        change: impl FnOnce(&mut Self) -> Result<T, LifecycleError>,
    ) -> Result<T, RequestError> {
        let outcome = change(self);
        self.taps.close_unnamed(self.config.as_ref());
        self.publish();
        outcome.map_err(|cause| RequestError { endpoint, cause })
    }

    /// `vmm.shutdown`: stops the machine if there is one, and emits the final event of the VMM, once.
    ///
    /// # Errors
    /// A thread of the machine did not end in time. The VMM exits regardless.
    pub fn end(&mut self) -> Result<(), LifecycleError> {
        let deleted = self.delete();
        if !std::mem::replace(&mut self.ended, true) {
            self.emit(EventKind::VmmShutdown);
        }
        deleted
    }

    /// True after [`Lifecycle::end`].
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    pub(super) fn publish(&self) {
        self.publish_with(None);
    }

    /// Publishes the state, with the progress of the change that is being made.
    pub(super) fn publish_with(&self, snapshot: Option<Arc<Progress>>) {
        let live = self.live_snapshot.as_ref().map(LiveSnapshot::progress);
        self.view.publish(View {
            snapshot: snapshot.or(live),
            migration: self.migration.as_ref().and_then(Migration::progress),
            config: self.config.clone().map(Arc::new),
            machine: self.machine.as_ref().map(|machine| MachineView {
                generation: self.generation,
                state: self.machine_state(),
                observer: machine.observer(),
            }),
            thresholds: self.config.as_ref().map(|_| self.reporting.thresholds()),
        });
        let machine = self.machine.is_some();
        let has_balloon = |config: &VmConfig| config.balloon.is_some();
        self.reporting.thresholds().set_subjects(Subjects {
            machine,
            balloon: machine
                && self.events_are_read
                && self.config.as_ref().is_some_and(has_balloon),
        });
    }

    pub(super) fn machine_state(&self) -> VmState {
        if self.paused {
            VmState::Paused
        } else {
            VmState::Running
        }
    }

    pub(super) fn emit(&self, kind: EventKind) {
        (self.context.events)(&kind.into());
    }

    /// Checks that the machine is in state `from` and may change to state `to`.
    fn machine_in(&self, from: VmState, to: VmState) -> Result<(), LifecycleError> {
        if self.machine.is_none() {
            return Err(LifecycleError::VmNotRunning);
        }
        let state = self.machine_state();
        if state != from {
            return Err(LifecycleError::InvalidStateTransition { from: state, to });
        }
        Ok(())
    }

    /// Calls `action` on the machine.
    ///
    /// # Errors
    /// There is no machine, or `action` failed.
    pub fn on_machine(
        &mut self,
        action: impl FnOnce(&mut dyn Machine) -> Result<(), VmError>,
    ) -> Result<(), LifecycleError> {
        let machine = self.machine.as_mut().ok_or(LifecycleError::VmNotRunning)?;
        action(machine.as_mut()).map_err(LifecycleError::Machine)
    }

    /// `vm.create`: stores a configuration.
    ///
    /// # Errors
    /// There is one already.
    pub fn create(&mut self, config: VmConfig) -> Result<(), LifecycleError> {
        if self.config.is_some() {
            return Err(LifecycleError::VmAlreadyCreated);
        }
        self.config = Some(config);
        Ok(())
    }

    /// `vm.boot`: builds the machine of the stored configuration and starts it.
    ///
    /// # Errors
    /// There is no configuration, it is invalid, or a part could not be created; nothing is left behind.
    pub fn boot(&mut self) -> Result<(), LifecycleError> {
        if self.machine.is_some() {
            return Err(LifecycleError::VmAlreadyCreated);
        }
        let config = self
            .config
            .as_ref()
            .ok_or(LifecycleError::VmMissingConfig)?;
        config::validate(config).map_err(LifecycleError::ConfigValidation)?;
        self.confinement
            .admit(config)
            .map_err(LifecycleError::Landlock)?;
        self.emit(EventKind::Booting);
        self.start_machine()?;
        self.emit(EventKind::Booted);
        Ok(())
    }

    /// Builds and boots the machine of the stored configuration, which was valid when it was booted for the first time.
    fn start_machine(&mut self) -> Result<(), LifecycleError> {
        let stored = self
            .config
            .as_ref()
            .ok_or(LifecycleError::VmMissingConfig)?;
        // Values decided at creation (ids, names of taps) become part of the configuration only on success.
        let mut config = stored.clone();
        let mut numbers = self.device_numbers.clone();
        numbers.assign(&mut config);
        let mut machine = self.make(&mut config, None)?;
        self.reporting.steer(machine.as_ref());
        machine.boot().map_err(LifecycleError::Machine)?;
        self.install(config, numbers, machine);
        self.paused = false;
        Ok(())
    }

    /// Builds a machine, from a snapshot if there is one.
    pub(super) fn make(
        &self,
        config: &mut VmConfig,
        snapshot: Option<&Snapshot>,
    ) -> Result<Box<dyn Machine>, LifecycleError> {
        (self.make_machine)(config, &self.context, snapshot).map_err(LifecycleError::Machine)
    }

    pub(super) fn install(
        &mut self,
        config: VmConfig,
        numbers: DeviceNumbers,
        machine: Box<dyn Machine>,
    ) {
        self.config = Some(config);
        self.device_numbers = numbers;
        self.machine = Some(machine);
        self.generation += 1;
        self.machine_number += 1;
    }

    pub(super) fn stop_machine(&mut self) -> Result<(), LifecycleError> {
        let machine = self.machine.take().ok_or(LifecycleError::VmNotRunning)?;
        if let Some(migration) = &self.migration {
            migration.cancel();
        }
        if let Some(saving) = &self.live_snapshot {
            saving.cancel();
        }
        self.recorder = None;
        self.disks_released = false;
        self.has_run_elsewhere = false;
        self.paused = false;
        self.reset_requested = false;
        let stopped = machine.shutdown().map_err(LifecycleError::Machine);
        // Signals of the old machine must not affect the next one.
        for signal in [
            &self.context.signals.shutdown,
            &self.context.signals.reset,
            &self.context.signals.failed,
            &self.context.signals.memory,
        ] {
            // If there is nothing to read, the event was not signalled.
            let _ = signal.read();
        }
        stopped
    }

    /// `vm.shutdown`: stops the machine and keeps the configuration.
    ///
    /// # Errors
    /// There is no machine, or a thread of it did not end in time.
    pub fn shutdown(&mut self) -> Result<(), LifecycleError> {
        self.stop_machine()?;
        self.emit(EventKind::Shutdown);
        Ok(())
    }

    /// `vm.delete`: stops the machine, if there is one, and deletes the configuration.
    ///
    /// # Errors
    /// A thread of the machine did not end in time.
    pub fn delete(&mut self) -> Result<(), LifecycleError> {
        let stopped = match self.machine {
            Some(_) => self.shutdown(),
            None => Ok(()),
        };
        self.forget_vm();
        if self.config.take().is_some() {
            self.emit(EventKind::Deleted);
        }
        stopped
    }

    /// Drops everything that belongs to the configuration.
    pub(super) fn forget_vm(&mut self) {
        self.context.consoles.close();
        self.confinement.forget_vm();
        self.reporting.clear();
        self.device_numbers = DeviceNumbers::default();
    }

    /// `vm.reboot`: stops the machine and starts another one.
    ///
    /// # Errors
    /// There is no machine, or the new one could not be started.
    pub fn reboot(&mut self) -> Result<(), LifecycleError> {
        if self.machine.is_none() {
            return Err(LifecycleError::VmNotCreated);
        }
        self.emit(EventKind::Rebooting);
        self.stop_machine()?;
        // Not validated again: every change since the boot was.
        self.start_machine()?;
        self.emit(EventKind::Rebooted);
        Ok(())
    }

    /// `vm.pause`
    ///
    /// # Errors
    /// The machine is not running, or a vCPU did not stop in time.
    pub fn pause(&mut self) -> Result<(), LifecycleError> {
        self.machine_in(VmState::Running, VmState::Paused)?;
        self.emit(EventKind::Pausing);
        self.on_machine(|machine| machine.pause())?;
        self.paused = true;
        self.emit(EventKind::Paused);
        Ok(())
    }

    /// `vm.resume`
    ///
    /// # Errors
    /// The machine is not paused, another process uses its disks, or a vCPU could not be resumed.
    pub fn resume(&mut self) -> Result<(), LifecycleError> {
        self.machine_in(VmState::Paused, VmState::Running)?;
        if self.has_run_elsewhere {
            return Err(LifecycleError::HasRunElsewhere);
        }
        self.hold_disks_again()?;
        self.emit(EventKind::Resuming);
        self.on_machine(|machine| machine.resume())?;
        self.paused = false;
        self.emit(EventKind::Resumed);
        if self.migration.is_none() {
            self.complete_machine();
        }
        Ok(())
    }

    /// Does what a restored machine has left for the time after the resume.
    pub(super) fn complete_machine(&self) {
        if let Some(machine) = &self.machine {
            machine.complete();
        }
    }

    /// Takes the locks of all disks again, if they were released.
    pub(super) fn hold_disks_again(&mut self) -> Result<(), LifecycleError> {
        if self.disks_released {
            self.on_machine(|machine| machine.hold_disks(true))?;
            self.disks_released = false;
        }
        Ok(())
    }

    /// Rejects what needs the disks while they are released.
    pub(super) fn check_disks(&self) -> Result<(), LifecycleError> {
        match self.disks_released {
            true => Err(LifecycleError::DisksReleased),
            false => Ok(()),
        }
    }

    /// `PUT vm.reclaim-thresholds`
    ///
    /// # Errors
    /// There is no VM, or the change is invalid; in this case nothing has changed.
    pub fn set_thresholds(&self, change: &ReclaimThresholdsChange) -> Result<(), LifecycleError> {
        if self.config.is_none() {
            return Err(LifecycleError::VmNotCreated);
        }
        self.reporting
            .change(change, self.machine.as_deref())
            .map_err(LifecycleError::Thresholds)
    }

    /// `vm.balloon-reporting`: only requests a pause, without waiting for it.
    ///
    /// # Errors
    /// There is no balloon, or the guest does not support the request in its current state.
    pub fn balloon_reporting(&mut self, request: VmBalloonReporting) -> Result<(), LifecycleError> {
        self.on_machine(|machine| machine.balloon_reporting(request))?;
        self.reporting.note(request.action);
        Ok(())
    }

    /// Whether [`Lifecycle::take_memory_failure`] must be called regularly.
    pub(super) fn needs_memory_checks(&self) -> bool {
        let machine = self.machine.as_ref();
        !self.paused && machine.is_some_and(|machine| machine.may_run_out_of_memory())
    }

    /// Reports RAM that the host has failed to provide, and returns what must happen to the machine.
    pub(super) fn take_memory_failure(&mut self) -> Option<MemoryUnavailableAction> {
        let failure = self.machine.as_mut()?.memory_failure()?;
        let wanted = self.config.as_ref()?.memory.on_unavailable;
        let (action, name) = match wanted {
            MemoryUnavailableAction::Pause if failure.can_continue => (wanted, "pause"),
            _ => (MemoryUnavailableAction::Shutdown, "shutdown"),
        };
        let error = failure.reason;
        log::error!("{error} (action: {name})");
        self.emit(EventKind::MemoryUnavailable {
            error,
            action: name,
        });
        // A vCPU that found no memory while it was being paused tries again after the resume.
        (!(self.paused && action == MemoryUnavailableAction::Pause)).then_some(action)
    }

    /// True while a machine exists.
    pub(super) fn has_machine(&self) -> bool {
        self.machine.is_some()
    }

    /// The number of the machine; `None` if there is none.
    pub(super) fn machine_number(&self) -> Option<u64> {
        self.machine.as_ref().map(|_| self.machine_number)
    }

    /// The operator has paused the machine.
    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    /// The machine has been paused and could not be resumed.
    pub(super) fn stays_paused(&mut self) {
        self.paused = true;
    }

    /// A migration is under way.
    pub(super) fn is_migrating(&self) -> bool {
        self.migration.is_some()
    }

    /// The guest has requested a reset. A migration of its machine would be in vain.
    pub(super) fn note_reset_request(&mut self) {
        self.reset_requested = true;
        if let Some(migration) = &self.migration {
            migration.cancel();
        }
    }

    /// Delays a reset that the guest requested. Its vCPUs do not run until then.
    ///
    /// # Errors
    /// A vCPU did not stop in time.
    pub(super) fn delay_reboot(&mut self) -> Result<(), LifecycleError> {
        self.emit(EventKind::RebootDelayed);
        self.on_machine(|machine| machine.pause())
    }
}
