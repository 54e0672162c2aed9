//! Migrations as the control thread sees them: start, the steps that only it can make, and the end.

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::config::{MigrationMemoryMode, MigrationTimeoutStrategy};
use api::{Endpoint, VmConfig, VmReceiveMigrationData, VmSendMigrationData, VmState};
use machine::memory::on_demand::{Content, Faults, OnDemand};
use machine::memory::{GuestMemory, ZoneFiles};
use state::Saved;

use super::current_migration::{Migration, Prepared, Role};
use super::error::{Done, LifecycleError, RequestError};
use super::lifecycle::Lifecycle;
use super::thread::ControlHandle;
use crate::config;
use crate::events::{EventKind, EventSink};
use crate::landlock::{self, LandlockError, Need};
use crate::migration::{
    Address, Brake, CONNECTIONS_MAX, Cancel, Convergence, Destination, Incoming, Limits, Listener,
    MigrationError, Outgoing, Ram, SendProgress, SendReport, SourceEnd, SourceOwner, SourceTls,
    TargetOwner, TargetTls, TlsError, movable,
};
use crate::snapshot::{self, Received, Snapshot, SnapshotError, SnapshotState};
use crate::threads::{MIGRATION_THREAD, ThreadKind};
use crate::vm::{self, WrittenFiles};

const STACK_BYTES: usize = 1 << 20;

type ReceivedMut<'a> = (&'a mut Option<Box<Prepared>>, &'a mut Option<Faults>);

fn request(text: &'static str) -> LifecycleError {
    LifecycleError::Migration(MigrationError::Request(text))
}

fn owner(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> MigrationError {
    MigrationError::Owner(error.into())
}

impl Lifecycle {
    /// `vm.send-migration`: starts to move the machine and returns. `control` is for the thread of the migration.
    ///
    /// # Errors
    /// There is no machine, it cannot be moved, or another migration is under way. The machine is unchanged.
    pub fn send_migration(
        &mut self,
        request: &VmSendMigrationData,
        control: &ControlHandle,
    ) -> Result<(), LifecycleError> {
        if self.migration.is_some() {
            return Err(LifecycleError::Migrating);
        }
        if self.live_snapshot.is_some() {
            return Err(LifecycleError::Saving);
        }
        let Some(machine) = self.machine_number() else {
            return Err(LifecycleError::VmNotRunning);
        };
        self.check_disks()?;
        check_send(request)?;
        let address =
            Address::parse(&request.destination_url).map_err(LifecycleError::Migration)?;
        let tls = self.keys(&address, request.tls_dir.as_deref(), SourceTls::read)?;
        let config = self.config.as_ref().ok_or(LifecycleError::VmNotRunning)?;
        movable(config).map_err(LifecycleError::Migration)?;
        if !self
            .machine
            .as_ref()
            .is_none_or(|it| it.is_memory_complete())
        {
            return Err(LifecycleError::MemoryIncomplete);
        }
        let was_running = self.machine_state() == VmState::Running;
        let (config, state, memory) = self.state_to_check(was_running)?;
        let handed_over = request.local.then(|| Ram::handed_over(&memory));
        let handed_over = handed_over.transpose().map_err(LifecycleError::Migration)?;
        self.forget_writes("the VM is sent to another process");
        let owned = self.machine.as_ref().ok_or(LifecycleError::VmNotRunning)?;
        let ram = match handed_over {
            Some(ram) => ram,
            None => {
                let tracker = owned.track_writes().map_err(LifecycleError::Machine)?;
                Ram::Copied(Box::new(tracker))
            }
        };
        let brake = request.auto_converge.then(|| owned.brake()).flatten();
        let cancel = Cancel::default();
        let progress = Arc::new(SendProgress::default());
        let outgoing = Outgoing {
            target: Destination { address, tls },
            config,
            state,
            ram,
            connections: request.connections,
            bytes_per_second_max: request.bytes_per_second_max.and_then(NonZeroU64::new),
            convergence: Convergence {
                downtime: Duration::from_millis(request.downtime_ms),
                timeout: Duration::from_secs(request.timeout_s),
                pauses_at_timeout: request.timeout_strategy == MigrationTimeoutStrategy::Ignore,
            },
            postpones: request.memory_mode == MigrationMemoryMode::Postcopy,
            brake: brake.map(|brake| Arc::new(brake) as Arc<dyn Brake>),
            limits: Limits::default(),
            cancel: cancel.clone(),
            progress: Arc::clone(&progress),
        };
        let mut steps = self.steps(Endpoint::VmSendMigration, control);
        // This thread has the confinement of the control thread.
        self.start_thread(|| (), move || outgoing.run(&mut steps))?;
        self.migration = Some(Migration {
            cancel,
            is_committed: false,
            role: Role::Source {
                machine,
                was_running,
                progress,
            },
        });
        self.emit(EventKind::MigrationStarted);
        Ok(())
    }

    /// Configuration and state of the machine, as JSON, and its RAM. A running machine is paused for a moment.
    fn state_to_check(
        &mut self,
        runs: bool,
    ) -> Result<(String, String, GuestMemory), LifecycleError> {
        if runs {
            self.on_machine(|machine| machine.pause())?;
        }
        let described = self.described();
        if runs && let Err(error) = self.on_machine(|machine| machine.resume()) {
            self.stays_paused();
            return Err(error);
        }
        described
    }

    fn described(&self) -> Result<(String, String, GuestMemory), LifecycleError> {
        let (Some(machine), Some(config)) = (&self.machine, &self.config) else {
            return Err(LifecycleError::VmNotRunning);
        };
        if self.reset_requested {
            return Err(LifecycleError::ResetPending);
        }
        let saved = machine.state().map_err(LifecycleError::Machine)?;
        let (config, state) = self.description(config, saved.pc, &saved.memory);
        Ok((json(&config), Saved::of(&state).into_text(), saved.memory))
    }

    fn steps(&self, endpoint: Endpoint, control: &ControlHandle) -> Steps {
        Steps {
            control: control.clone(),
            events: Arc::clone(&self.context.events),
            endpoint,
        }
    }

    /// The keys in `folder`, if the connections to or from `address` are to be encrypted.
    fn keys<T>(
        &self,
        address: &Address,
        folder: Option<&Path>,
        read: impl FnOnce(&Path) -> Result<T, TlsError>,
    ) -> Result<Option<T>, LifecycleError> {
        let Some(folder) = folder else {
            return Ok(None);
        };
        if address.path().is_some() {
            return Err(request("tls_dir needs a URL of the form tcp:ADDRESS:PORT"));
        }
        self.confinement
            .check(&[landlock::of_restore(folder)])
            .map_err(LifecycleError::Landlock)?;
        let keys = read(folder).map_err(|error| MigrationError::Keys(Box::new(error)));
        keys.map(Some).map_err(LifecycleError::Migration)
    }

    /// `confine` is called first, without the filter of the thread.
    fn start_thread(
        &self,
        confine: impl FnOnce() + Send + 'static,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<(), LifecycleError> {
        let thread_start = Arc::clone(&self.context.thread_start);
        let started = std::thread::Builder::new()
            .name(MIGRATION_THREAD.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                confine();
                thread_start(ThreadKind::Migration);
                run();
            });
        started
            .map(drop)
            .map_err(|error| LifecycleError::Migration(MigrationError::Thread(error)))
    }

    /// `vm.cancel-migration`: ends the migration that is under way, without waiting for the end.
    ///
    /// # Errors
    /// There is none, or the machine may already belong to the other side.
    pub fn cancel_migration(&mut self) -> Result<(), LifecycleError> {
        let migration = self
            .migration
            .as_ref()
            .ok_or(LifecycleError::NotMigrating)?;
        match migration.cancel() {
            true => Ok(()),
            false => Err(LifecycleError::Committed),
        }
    }

    /// The machine that is being sent, if it is still the same.
    fn check_sent(&self) -> Result<(), LifecycleError> {
        match &self.migration {
            Some(Migration {
                role: Role::Source { machine, .. },
                ..
            }) if self.machine_number() == Some(*machine) => Ok(()),
            _ => Err(LifecycleError::VmNotRunning),
        }
    }

    fn files_to_send(&mut self) -> Result<WrittenFiles, LifecycleError> {
        self.check_sent()?;
        let machine = self.machine.as_ref();
        let machine = machine.ok_or(LifecycleError::VmNotRunning)?;
        Ok(machine.written_files())
    }

    fn pause_to_send(&mut self) -> Result<(), LifecycleError> {
        self.check_sent()?;
        match self.machine_state() {
            VmState::Paused => Ok(()),
            _ => self.pause(),
        }
    }

    fn save_to_send(&mut self) -> Result<String, LifecycleError> {
        self.check_sent()?;
        if self.reset_requested {
            return Err(LifecycleError::ResetPending);
        }
        let (Some(machine), Some(config)) = (&self.machine, &self.config) else {
            return Err(LifecycleError::VmNotRunning);
        };
        let saved = machine.save().map_err(LifecycleError::Machine)?;
        let (_, state) = self.description(config, saved.pc, &saved.memory);
        let released = machine.hold_disks(false).map_err(LifecycleError::Machine);
        self.disks_released = true;
        released.map(|()| Saved::of(&state).into_text())
    }

    /// Returns whether the machine was running.
    fn commit_sent(&mut self) -> Result<bool, LifecycleError> {
        self.check_sent()?;
        match &mut self.migration {
            Some(migration) if !migration.cancel.is_set() => {
                migration.is_committed = true;
                Ok(matches!(
                    migration.role,
                    Role::Source {
                        was_running: true,
                        ..
                    }
                ))
            }
            _ => Err(LifecycleError::Migration(MigrationError::Cancelled)),
        }
    }

    fn end_finished(&mut self, report: SendReport) -> Result<(), LifecycleError> {
        self.migration = None;
        log::info!("The VM has moved: {report:?}");
        if report.was_postponed {
            self.emit(EventKind::PostcopyMigrationCompleted);
        }
        self.emit(EventKind::MigrationFinished {
            passes: report.passes,
            wire_bytes: report.wire_bytes,
            data_bytes: report.data_bytes,
            downtime_ms: report.downtime_ms,
        });
        let forgotten = self.forget_machine();
        forgotten.and(self.end())
    }

    fn end_unconfirmed(&mut self, error: &MigrationError) {
        self.migration = None;
        self.has_run_elsewhere = matches!(error, MigrationError::Incomplete(_));
        let error = api::error_line(error);
        log::error!("{error}");
        self.emit(EventKind::MigrationUnconfirmed { error });
    }

    /// `vm.receive-migration`: listens, and returns. Takes `done` if it does, and calls it when the migration has ended.
    ///
    /// # Errors
    /// There is a VM, another migration is under way, or the address cannot be used.
    pub fn start_receiving(
        &mut self,
        request: &VmReceiveMigrationData,
        control: &ControlHandle,
        done: &mut Option<Done>,
    ) -> Result<(), LifecycleError> {
        if self.migration.is_some() {
            return Err(LifecycleError::Migrating);
        }
        if self.config.is_some() {
            return Err(LifecycleError::VmAlreadyCreated);
        }
        let faults = match request.memory_mode {
            MigrationMemoryMode::Precopy => None,
            MigrationMemoryMode::Postcopy => Some(open_faults()?),
        };
        let address = Address::parse(&request.receiver_url).map_err(LifecycleError::Migration)?;
        let socket: Vec<Need> = address.path().map(Need::socket).into_iter().collect();
        self.confinement
            .check(&socket)
            .map_err(LifecycleError::Landlock)?;
        let tls = self.keys(&address, request.tls_dir.as_deref(), TargetTls::read)?;
        let cancel = Cancel::default();
        let incoming = Incoming {
            listener: Listener::bind(&address, tls).map_err(LifecycleError::Migration)?,
            postpones: faults.is_some(),
            limits: Limits::default(),
            cancel: cancel.clone(),
        };
        let mut steps = self.steps(Endpoint::VmReceiveMigration, control);
        let confined = cancel.clone();
        let confine = move || confine_receiver(&address, &confined);
        self.start_thread(confine, move || incoming.run(&mut steps))?;
        self.migration = Some(Migration {
            cancel,
            is_committed: false,
            role: Role::Target {
                prepared: None,
                faults,
                done: done.take(),
            },
        });
        self.emit(EventKind::MigrationReceiveReady);
        Ok(())
    }

    /// The migration that is being received: the place for what is prepared, and the descriptor for postponed RAM.
    fn received(&mut self) -> Result<ReceivedMut<'_>, LifecycleError> {
        match &mut self.migration {
            Some(Migration {
                role: Role::Target {
                    prepared, faults, ..
                },
                cancel,
                ..
            }) if !cancel.is_set() => Ok((prepared, faults)),
            _ => Err(LifecycleError::Migration(MigrationError::Cancelled)),
        }
    }

    fn prepare_received(
        &mut self,
        config: VmConfig,
        state: &SnapshotState,
        files: ZoneFiles,
    ) -> Result<GuestMemory, LifecycleError> {
        let (_, faults) = self.received()?;
        let postpones = faults.is_some();
        self.emit(EventKind::Restoring);
        config::validate(&config).map_err(LifecycleError::ConfigValidation)?;
        movable(&config).map_err(LifecycleError::Migration)?;
        let state = state.pc.read();
        let state = state.map_err(|error| LifecycleError::Snapshot(SnapshotError::State(error)))?;
        let admitted = self.confinement.check_config(&config);
        admitted.map_err(LifecycleError::Landlock)?;
        let memory = snapshot::memory_of(&config, &state, files);
        let mut memory = memory.map_err(LifecycleError::Snapshot)?;
        if postpones {
            let checked = OnDemand::check(&memory).map_err(SnapshotError::OnDemand);
            checked.map_err(LifecycleError::Snapshot)?;
        }
        let pc = vm::prepare(&config, &self.context, &mut memory);
        let pc = pc.map_err(LifecycleError::Machine)?;
        if let Some(pc) = &pc {
            let checked = pc.check(&state).map_err(SnapshotError::State);
            checked.map_err(LifecycleError::Snapshot)?;
        }
        // The rules are permanent, so that a machine that cannot run here must not leave any.
        let admitted = self.confinement.admit(&config);
        admitted.map_err(LifecycleError::Landlock)?;
        let (prepared, _) = self.received()?;
        *prepared = Some(Box::new(Prepared { config, pc }));
        Ok(memory)
    }

    fn build_received(
        &mut self,
        state: SnapshotState,
        memory: GuestMemory,
        postponed: Option<Content>,
    ) -> Result<(), LifecycleError> {
        let (prepared, faults) = self.received()?;
        let (prepared, faults) = (prepared.take(), faults.take());
        let Prepared { config, pc } = *prepared.ok_or(LifecycleError::VmMissingConfig)?;
        let received = Received {
            memory,
            postponed: Mutex::new(faults.zip(postponed)),
            pc: Mutex::new(pc),
        };
        let snapshot = Snapshot::received(config, state, received);
        let snapshot = snapshot.map_err(LifecycleError::Snapshot)?;
        let config = snapshot.config.clone();
        self.create_restored(&snapshot, config)
    }

    /// The machine that is being received has failed. Returns whether it still belongs to the source, which then keeps it:
    /// the end of the migration drops it here.
    pub(super) fn refuse_received(&mut self) -> bool {
        match &self.migration {
            Some(migration) if matches!(migration.role, Role::Target { .. }) => migration.cancel(),
            _ => false,
        }
    }

    fn commit_received(&mut self, runs: bool) -> Result<(), LifecycleError> {
        self.received()?;
        if runs {
            self.resume()?;
        }
        if let Some(migration) = &mut self.migration {
            migration.is_committed = true;
        }
        Ok(())
    }

    fn end_received(&mut self, end: Result<(), MigrationError>) {
        let Some(Migration {
            role: Role::Target { done, .. },
            ..
        }) = self.migration.take()
        else {
            return;
        };
        let outcome = match end {
            Ok(()) => {
                self.emit(EventKind::MigrationReceiveFinished);
                // Only now: the source waits for the answer to its commit until the resume has returned.
                self.complete_machine();
                Ok(())
            }
            Err(error) => {
                if let Err(error) = self.forget_machine() {
                    log::error!("{}", api::error_line(&error));
                }
                let text = api::error_line(&error);
                log::warn!("No VM was received: {text}");
                self.emit(EventKind::MigrationReceiveFailed { error: text });
                Err(RequestError {
                    endpoint: Endpoint::VmReceiveMigration,
                    cause: LifecycleError::Migration(error),
                })
            }
        };
        // The response shows the state after the migration.
        self.publish();
        if let Some(done) = done {
            done(outcome);
        }
    }

    /// Drops a machine that runs elsewhere, or that has never run here, and its configuration, without their events.
    fn forget_machine(&mut self) -> Result<(), LifecycleError> {
        let stopped = match self.machine {
            Some(_) => self.stop_machine(),
            None => Ok(()),
        };
        self.config = None;
        self.forget_vm();
        stopped
    }
}

/// Confines the thread that receives a VM, where the kernel can. If that fails, nothing is received.
fn confine_receiver(address: &Address, cancel: &Cancel) {
    match landlock::confine_to_removal(address.path()) {
        Ok(()) => {}
        // A configuration that requires Landlock is rejected.
        Err(error @ LandlockError::Unavailable(_)) => {
            log::info!("{}", api::error_line(&error));
        }
        Err(error) => {
            log::error!("{}", api::error_line(&error));
            cancel.set();
        }
    }
}

fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data is always JSON")
}

/// For RAM that comes after the machine.
fn open_faults() -> Result<Faults, LifecycleError> {
    let opened = Faults::open().map_err(SnapshotError::OnDemand);
    opened.map_err(LifecycleError::Snapshot)
}

fn check_send(data: &VmSendMigrationData) -> Result<(), LifecycleError> {
    if data.memory_mode == MigrationMemoryMode::Postcopy {
        if data.local {
            return Err(request("memory_mode must be precopy with local=on"));
        }
        if data.connections != 1 {
            return Err(request("connections must be 1 with memory_mode=postcopy"));
        }
        if data.auto_converge {
            return Err(request(
                "auto_converge must be off with memory_mode=postcopy",
            ));
        }
    }
    if data.local && !data.destination_url.starts_with("unix:") {
        return Err(request(
            "local needs a destination_url of the form unix:PATH",
        ));
    }
    if data.preserve_source {
        return Err(request("preserve_source is not supported"));
    }
    if !(1..=CONNECTIONS_MAX).contains(&data.connections) {
        return Err(request("connections must be between 1 and 128"));
    }
    let rate_min = u64::from(data.connections) << 20;
    if data
        .bytes_per_second_max
        .is_some_and(|rate| rate < rate_min)
    {
        return Err(request(
            "bytes_per_second_max must be at least 1 MiB for each of the connections",
        ));
    }
    if data.local && data.connections != 1 {
        return Err(request("connections must be 1 with local=on"));
    }
    if data.downtime_ms == 0 {
        return Err(request("downtime_ms must be at least 1"));
    }
    if data.timeout_s == 0 {
        return Err(request("timeout_s must be at least 1"));
    }
    Ok(())
}

/// Asks the control thread for each step of a migration.
pub(super) struct Steps {
    control: ControlHandle,
    events: EventSink,
    /// The request that started it.
    endpoint: Endpoint,
}

impl Steps {
    pub(super) fn step<T: Send + 'static>(
        &self,
        step: impl FnOnce(&mut Lifecycle) -> Result<T, LifecycleError> + Send + 'static,
    ) -> Result<T, MigrationError> {
        let made = self.control.step(self.endpoint, step);
        made.map_err(|error| owner(error.cause))
    }

    fn last_step(
        &self,
        step: impl FnOnce(&mut Lifecycle) -> Result<(), LifecycleError> + Send + 'static,
    ) {
        if let Err(error) = self.step(step) {
            log::error!("{}", api::error_line(&error));
        }
    }
}

impl SourceOwner for Steps {
    fn throttled(&mut self, percent: u8) {
        (self.events)(&EventKind::MigrationThrottled { percent }.into());
    }

    fn begin_pass(&mut self, pass: u32) {
        (self.events)(&EventKind::MigrationMemoryIteration { id: pass }.into());
    }

    fn sync(&mut self) -> Result<(), MigrationError> {
        // Here, because a slow disk must not delay the control thread.
        let files = self.step(Lifecycle::files_to_send)?;
        let error = |error| owner(LifecycleError::Machine(error));
        files.write_back().map_err(error)
    }

    fn pause(&mut self) -> Result<(), MigrationError> {
        self.step(Lifecycle::pause_to_send)
    }

    fn save(&mut self) -> Result<String, MigrationError> {
        self.step(Lifecycle::save_to_send)
    }

    fn commit(&mut self) -> Result<bool, MigrationError> {
        self.step(Lifecycle::commit_sent)
    }

    fn end(&mut self, end: SourceEnd) {
        match end {
            SourceEnd::Finished(report) => self.last_step(move |vm| vm.end_finished(report)),
            SourceEnd::Failed(error) => self.end_failed(&error),
            SourceEnd::Unconfirmed(error) => self.last_step(move |vm| {
                vm.end_unconfirmed(&error);
                Ok(())
            }),
        }
    }
}

impl TargetOwner for Steps {
    fn begin(&mut self) {
        (self.events)(&EventKind::MigrationReceiveStarted.into());
    }

    fn prepare(
        &mut self,
        config: VmConfig,
        state: SnapshotState,
        files: ZoneFiles,
    ) -> Result<GuestMemory, MigrationError> {
        self.step(move |vm| vm.prepare_received(config, &state, files))
    }

    fn build(
        &mut self,
        state: SnapshotState,
        memory: GuestMemory,
        postponed: Option<Content>,
    ) -> Result<(), MigrationError> {
        self.step(move |vm| vm.build_received(state, memory, postponed))
    }

    fn commit(&mut self, runs: bool) -> Result<(), MigrationError> {
        self.step(move |vm| vm.commit_received(runs))
    }

    fn end(&mut self, end: Result<(), MigrationError>) {
        self.last_step(move |vm| {
            vm.end_received(end);
            Ok(())
        });
    }
}
