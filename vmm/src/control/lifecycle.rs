//! The life cycle of the VM, without threads: the effect of each request in each state.
//!
//! ```text
//!            create            boot                 pause
//!  nothing ─────────► Created ──────► Running ◄──────────────► Paused
//!     ▲                 │ ▲              │         resume         │
//!     │     delete      │ └──────────────┴──── shutdown ──────────┤
//!     └─────────────────┴──────────────── delete ─────────────────┘
//! ```
//! Changes from outside wait for no migration: while one is under way, they are rejected.
//!
//! A snapshot requires Paused and keeps that state; a restore leads from nothing to Paused. If a boot or reboot fails,
//! the state is Created, and all resources have been released.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use api::config::{HotplugMethod, MemoryConfig, MemoryUnavailableAction};
use api::{
    Endpoint, PciDeviceInfo, ReclaimThresholdsChange, ReportingAction, RestoreConfig,
    VmBalloonReporting, VmConfig, VmCoredumpData, VmResize, VmResizeDisk, VmSnapshotConfig,
    VmState, VmUpdateRateLimiter,
};

use machine::memory::GuestMemory;
use state::Saved;

use super::current_migration::Migration;
use super::error::{LifecycleError, RequestError};
use crate::config::{self, NewDevice, has_iommu, with_device, without_device};
use crate::events::{Event, EventKind};
use crate::landlock::{self, Confinement};
use crate::snapshot::{self, Filling, Progress, Snapshot, SnapshotState};
use crate::thresholds::{Subjects, Thresholds};
use crate::view::{MachineView, PublishedView, View};
use crate::vm::{HotplugError, Machine, MachineFactory, SavedMachine, VmContext, VmError};

/// The VM and every change that a request can make to it.
///
/// Endpoints call the public methods on the control thread.
pub struct Lifecycle {
    pub(super) config: Option<VmConfig>,
    make_machine: MachineFactory,
    pub(super) machine: Option<Box<dyn Machine>>,
    /// Counts machines and hot-plugged balloons: figures start from zero with each.
    generation: u64,
    /// The number of machines created so far; the number of the current one.
    machine_number: u64,
    /// Open taps received with requests, by their numbers in the configuration. They stay open across reboots.
    taps: BTreeMap<i32, OwnedFd>,
    paused: bool,
    /// The guest has requested a reset that is still pending.
    pub(super) reset_requested: bool,
    view: Arc<PublishedView>,
    /// Kept across reboots; discarded with the configuration.
    thresholds: Arc<Thresholds>,
    /// The operator has paused reporting. Kept and discarded with the thresholds.
    reporting_paused: bool,
    events_are_read: bool,
    pub(super) context: VmContext,
    /// The confinement of the control thread, which calls every public method.
    pub(super) confinement: Confinement,
    ended: bool,
    pub(super) migration: Option<Migration>,
    /// The paused machine does not hold the locks of its disks.
    pub(super) disks_released: bool,
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
            make_machine,
            machine: None,
            generation: 0,
            machine_number: 0,
            taps: BTreeMap::new(),
            paused: false,
            reset_requested: false,
            view,
            thresholds,
            reporting_paused: false,
            events_are_read,
            context,
            confinement: Confinement::default(),
            ended: false,
            migration: None,
            disks_released: false,
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
        self.close_unnamed_taps();
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
    fn publish_with(&self, snapshot: Option<Arc<Progress>>) {
        self.view.publish(View {
            snapshot,
            migration: self.migration.as_ref().and_then(Migration::progress),
            config: self.config.clone().map(Arc::new),
            machine: self.machine.as_ref().map(|machine| MachineView {
                generation: self.generation,
                state: self.machine_state(),
                observer: machine.observer(),
            }),
            thresholds: self.config.as_ref().map(|_| Arc::clone(&self.thresholds)),
        });
        let machine = self.machine.is_some();
        let has_balloon = |config: &VmConfig| config.balloon.is_some();
        self.thresholds.set_subjects(Subjects {
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
        config::assign_ids(&mut config);
        let mut machine = (self.make_machine)(&mut config, &self.context, None)
            .map_err(LifecycleError::Machine)?;
        steer_reporting(machine.as_ref(), &self.thresholds, self.reporting_paused);
        machine.boot().map_err(LifecycleError::Machine)?;
        self.install(config, machine);
        self.paused = false;
        Ok(())
    }

    fn install(&mut self, config: VmConfig, machine: Box<dyn Machine>) {
        self.config = Some(config);
        self.machine = Some(machine);
        self.generation += 1;
        self.machine_number += 1;
    }

    pub(super) fn stop_machine(&mut self) -> Result<(), LifecycleError> {
        let machine = self.machine.take().ok_or(LifecycleError::VmNotRunning)?;
        if let Some(migration) = &self.migration {
            migration.cancel();
        }
        self.disks_released = false;
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
        self.thresholds.clear();
        self.reporting_paused = false;
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
        self.hold_disks_again()?;
        self.emit(EventKind::Resuming);
        self.on_machine(|machine| machine.resume())?;
        self.paused = false;
        self.emit(EventKind::Resumed);
        Ok(())
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

    /// `vm.snapshot`: saves the paused machine. Returns when all files are on stable storage.
    ///
    /// # Errors
    /// The machine is not paused or about to be reset, or it cannot be saved. In these cases the folder is unchanged.
    pub fn snapshot(&mut self, request: &VmSnapshotConfig) -> Result<(), LifecycleError> {
        let (Some(machine), Some(config)) = (&self.machine, &self.config) else {
            return Err(LifecycleError::VmNotRunning);
        };
        if !self.paused {
            return Err(LifecycleError::NotPaused);
        }
        if self.reset_requested {
            return Err(LifecycleError::ResetPending);
        }
        self.emit(EventKind::Snapshotting);
        let saved = self.save(machine.as_ref(), config, request);
        self.emit(match &saved {
            Ok(()) => EventKind::Snapshotted,
            Err(error) => EventKind::SnapshotFailed {
                error: api::error_line(error),
            },
        });
        saved
    }

    fn save(
        &self,
        machine: &dyn Machine,
        config: &VmConfig,
        request: &VmSnapshotConfig,
    ) -> Result<(), LifecycleError> {
        let folder = snapshot::folder_of(&request.destination_url);
        let folder = folder.map_err(LifecycleError::Snapshot)?;
        self.confinement
            .check(&[landlock::of_snapshot(&folder)])
            .map_err(LifecycleError::Landlock)?;
        let SavedMachine { pc, memory } = machine.save().map_err(LifecycleError::Machine)?;
        let (config, state) = self.description(config, pc, &memory);
        let events = Arc::clone(&self.context.events);
        let progress = Arc::new(Progress::of_snapshot(&memory, events));
        self.publish_with(Some(Arc::clone(&progress)));
        snapshot::write(&folder, &config, &state, &memory, &progress)
            .map_err(LifecycleError::Snapshot)
    }

    /// The configuration and the state from which another process can continue the machine.
    pub(super) fn description(
        &self,
        config: &VmConfig,
        pc: Saved,
        memory: &GuestMemory,
    ) -> (VmConfig, SnapshotState) {
        let mut config = config.clone();
        // RAM that a reboot takes away is still there.
        let next = (config.memory.size > 0)
            .then(|| std::mem::replace(&mut config.memory.size, memory.own_bytes()));
        let state = SnapshotState {
            pc,
            thresholds: self.thresholds.as_change(),
            reporting_paused: self.reporting_paused,
            memory_size_after_reboot: next.filter(|next| *next != config.memory.size),
        };
        (config, state)
    }

    /// `vm.coredump`: writes a core file of the guest. A running machine is paused meanwhile.
    ///
    /// # Errors
    /// There is no machine, it did not pause, or the file cannot be written. There is no file then, and the machine is
    /// paused if it could not be written.
    pub fn coredump(&mut self, request: &VmCoredumpData) -> Result<(), LifecycleError> {
        if self.machine.is_none() {
            return Err(LifecycleError::VmNotRunning);
        }
        let url = &request.destination_url;
        let path = url.strip_prefix("file://").map(Path::new);
        let path = path.filter(|path| path.is_absolute());
        let (Some(path), Some(folder)) = (path, path.and_then(Path::parent)) else {
            let url = url.clone();
            return Err(LifecycleError::CoreUrl { url });
        };
        self.confinement
            .check(&[landlock::of_core_file(folder)])
            .map_err(LifecycleError::Landlock)?;
        let mut options = File::options();
        let options = options.write(true).create_new(true).mode(0o600);
        let file = options
            .open(path)
            .map_err(|source| LifecycleError::CoreFile {
                path: path.to_owned(),
                source,
            })?;
        let runs = !self.paused;
        let written = match runs {
            true => self.pause(),
            false => Ok(()),
        };
        let written = written.and_then(|()| {
            self.emit(EventKind::Coredumping);
            self.on_machine(|machine| machine.write_core(&file))
        });
        if written.is_err()
            && let Err(error) = std::fs::remove_file(path)
        {
            log::warn!("Cannot remove {}: {error}", path.display());
        }
        written?;
        match runs {
            true => self.resume(),
            false => Ok(()),
        }
    }

    /// `vm.restore`: creates a machine from a snapshot, paused unless the request says otherwise. Network interfaces
    /// use the open taps received with the request.
    ///
    /// # Errors
    /// There is a configuration already, or the snapshot cannot be restored; in this case nothing is left behind. If
    /// only the resume fails, the machine stays paused.
    pub fn restore(
        &mut self,
        request: &RestoreConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(), LifecycleError> {
        if self.config.is_some() {
            return Err(LifecycleError::VmAlreadyCreated);
        }
        self.emit(EventKind::Restoring);
        let restored = self.restore_machine(request, fds);
        if let Err(error) = &restored {
            self.context.consoles.close();
            self.confinement.forget_vm();
            self.thresholds.clear();
            let error = api::error_line(error);
            self.emit(EventKind::RestoreFailed { error });
        }
        restored?;
        match request.resume {
            true => self.resume(),
            false => Ok(()),
        }
    }

    fn restore_machine(
        &mut self,
        request: &RestoreConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(), LifecycleError> {
        let folder = snapshot::folder_of(&request.source_url);
        let folder = folder.map_err(LifecycleError::Snapshot)?;
        self.confinement
            .check(&[landlock::of_restore(&folder)])
            .map_err(LifecycleError::Landlock)?;
        let filling = Filling::of(request).map_err(LifecycleError::Snapshot)?;
        let mut snapshot = Snapshot::open(&folder).map_err(LifecycleError::Snapshot)?;
        snapshot.filling = filling;
        let mut config = snapshot.config.clone();
        let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        snapshot::adapt(&mut config, request, &numbers).map_err(LifecycleError::Snapshot)?;
        config::validate(&config).map_err(LifecycleError::ConfigValidation)?;
        self.confinement
            .admit(&config)
            .map_err(LifecycleError::Landlock)?;
        self.create_restored(&snapshot, config)?;
        self.keep_taps(fds);
        Ok(())
    }

    /// Creates the machine of `snapshot` with the checked `config`. It is paused.
    pub(super) fn create_restored(
        &mut self,
        snapshot: &Snapshot,
        mut config: VmConfig,
    ) -> Result<(), LifecycleError> {
        self.thresholds
            .change(&snapshot.state.thresholds)
            .map_err(LifecycleError::Thresholds)?;
        let machine = (self.make_machine)(&mut config, &self.context, Some(snapshot));
        let machine = machine.map_err(LifecycleError::Machine)?;
        if let Some(bytes) = snapshot.state.memory_size_after_reboot {
            config.memory.size = bytes;
        }
        self.install(config, machine);
        self.paused = true;
        // The balloon's saved state already includes the pause.
        self.reporting_paused = snapshot.state.reporting_paused;
        self.emit(EventKind::Restored);
        Ok(())
    }

    /// `vm.resize`: changes the stored configuration, or the running machine.
    ///
    /// # Errors
    /// There is no VM, or the size is invalid.
    pub fn resize(&mut self, resize: VmResize) -> Result<(), LifecycleError> {
        let config = self.config.as_mut().ok_or(LifecycleError::VmNotCreated)?;
        let Some(machine) = &mut self.machine else {
            let mut wanted = config.clone();
            resize_stored(&mut wanted, resize);
            config::validate_balloon(&wanted).map_err(LifecycleError::ConfigValidation)?;
            *config = wanted;
            return Ok(());
        };
        (self.context.events)(&EventKind::Resizing.into());
        let max = config.cpus.max_vcpus;
        if let Some(desired) = resize.desired_vcpus
            && !(1..=max).contains(&desired)
        {
            return Err(LifecycleError::VcpusOutOfRange { desired, max });
        }
        let vcpus = resize
            .desired_vcpus
            .filter(|desired| *desired != config.cpus.boot_vcpus);
        let ram = resize
            .desired_ram
            .filter(|desired| Some(*desired) != config.memory.total_bytes());
        let mut wanted = config.clone();
        if let Some(desired) = ram {
            wanted.memory = resized_memory(&config.memory, desired)?;
        }
        if let (Some(bytes), Some(balloon)) = (resize.desired_balloon, &mut wanted.balloon) {
            balloon.size = bytes;
        }
        // A size with which the VM could not boot is rejected before anything changes.
        config::validate_sizes(&wanted).map_err(LifecycleError::ConfigValidation)?;
        if let Some(desired) = vcpus {
            machine
                .resize_vcpus(desired)
                .map_err(LifecycleError::Machine)?;
            // The requested count is stored at once: the guest may take time to comply, and a reboot uses the new
            // count.
            config.cpus.boot_vcpus = desired;
        }
        if let Some(desired) = ram {
            match wanted.memory.hotplug_method {
                HotplugMethod::Acpi => machine.grow_memory(desired),
                HotplugMethod::VirtioMem => {
                    machine.resize_memory(wanted.memory.hotplugged_size.unwrap_or(0))
                }
            }
            .map_err(LifecycleError::Machine)?;
            // The requested size is stored at once: the guest may take time to comply, and a reboot uses the new size.
            config.memory = wanted.memory;
        }
        if let Some(desired) = resize.desired_balloon {
            machine
                .resize_balloon(desired)
                .map_err(LifecycleError::Machine)?;
            if let Some(balloon) = &mut config.balloon {
                balloon.size = desired;
            }
        }
        (self.context.events)(&EventKind::Resized.into());
        Ok(())
    }

    /// `vm.resize-disk`
    ///
    /// # Errors
    /// There is no running machine, no such disk, the disk cannot have this size, or it is released.
    pub fn resize_disk(&mut self, resize: &VmResizeDisk) -> Result<(), LifecycleError> {
        if self.config.is_none() {
            return Err(LifecycleError::VmNotCreated);
        }
        self.check_disks()?;
        self.on_machine(|machine| machine.resize_disk(&resize.id, resize.desired_size))
    }

    /// `vm.update-rate-limiter`
    ///
    /// # Errors
    /// There is no VM, nothing of this name, or the limit is invalid; in this case nothing has changed.
    pub fn update_rate_limiter(
        &mut self,
        update: &VmUpdateRateLimiter,
    ) -> Result<(), LifecycleError> {
        let config = self.config.as_ref().ok_or(LifecycleError::VmNotCreated)?;
        let limit = update.rate_limiter_config;
        let wanted = config::with_rate_limit(config, &update.id, limit)
            .map_err(LifecycleError::RateLimiter)?;
        config::validate_rate_limits(&wanted).map_err(LifecycleError::ConfigValidation)?;
        if let Some(machine) = &self.machine {
            machine
                .set_rate_limit(&update.id, limit.as_ref())
                .map_err(LifecycleError::Machine)?;
        }
        self.config = Some(wanted);
        Ok(())
    }

    /// Adds a device. A network interface uses the open taps received with the request. Returns `None` if no machine is
    /// running, because the device has no address yet.
    ///
    /// # Errors
    /// There is no VM, or the device cannot be created; nothing is left behind.
    pub fn add_device(
        &mut self,
        mut device: NewDevice,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<PciDeviceInfo>, LifecycleError> {
        let config = self.config.as_ref().ok_or(LifecycleError::VmNotCreated)?;
        if let (NewDevice::Balloon(_), Some(balloon)) = (&device, &config.balloon) {
            let id = config::balloon_id(balloon).to_owned();
            return Err(LifecycleError::Device(HotplugError::BalloonPresent { id }));
        }
        if let (NewDevice::Vsock(_), Some(vsock)) = (&device, &config.vsock) {
            let id = vsock.id.clone().unwrap_or_default();
            return Err(LifecycleError::Device(HotplugError::VsockPresent { id }));
        }
        if let NewDevice::Net(net) = &mut device
            && !fds.is_empty()
        {
            net.fds = Some(fds.iter().map(AsRawFd::as_raw_fd).collect());
        }
        let mut wanted = with_device(config, device.clone());
        config::validate_addition(&wanted, &device).map_err(LifecycleError::ConfigValidation)?;
        self.confinement
            .check(&landlock::of_device(&device))
            .map_err(LifecycleError::Landlock)?;
        let Some(machine) = &mut self.machine else {
            self.config = Some(wanted);
            self.keep_taps(fds);
            return Ok(None);
        };
        config::assign_ids(&mut wanted);
        config::take_id(&wanted, &mut device);
        let added = machine
            .add_device(&mut device)
            .map_err(LifecycleError::Machine)?;
        if matches!(device, NewDevice::Balloon(_)) {
            self.generation += 1;
            steer_reporting(machine.as_ref(), &self.thresholds, self.reporting_paused);
        }
        self.config = Some(with_device(config, device));
        self.keep_taps(fds);
        let bdf = added.bdf.clone();
        self.emit_device(EventKind::DeviceAdded { bdf }, &added.id);
        Ok(Some(added))
    }

    fn keep_taps(&mut self, fds: Vec<OwnedFd>) {
        self.taps
            .extend(fds.into_iter().map(|fd| (fd.as_raw_fd(), fd)));
    }

    fn close_unnamed_taps(&mut self) {
        let nets = self.config.iter().flat_map(|config| &config.net).flatten();
        let named: Vec<i32> = nets.flat_map(|net| &net.fds).flatten().copied().collect();
        self.taps.retain(|fd, _| named.contains(fd));
    }

    /// `vm.remove-device`: a running guest must release the device first.
    ///
    /// # Errors
    /// There is no such device, or it cannot be removed.
    pub fn remove_device(&mut self, id: &str) -> Result<(), LifecycleError> {
        let config = self.config.as_ref().ok_or(LifecycleError::VmNotCreated)?;
        let without = without_device(config, id);
        match (&mut self.machine, without) {
            // A device with a pending removal exists only in the machine, not in the configuration.
            (Some(machine), without) => {
                machine.remove_device(id).map_err(LifecycleError::Machine)?;
                if let Some(mut without) = without {
                    // The machine keeps its IOMMU, and its saved state needs one.
                    without.iommu |= has_iommu(config);
                    self.config = Some(without);
                }
            }
            (None, Some(without)) => self.config = Some(without),
            (None, None) => {
                let id = id.to_owned();
                return Err(LifecycleError::Device(HotplugError::NoSuchDevice { id }));
            }
        }
        Ok(())
    }

    /// Called when the guest has released devices.
    pub(super) fn finish_removals(&mut self) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        let gone = machine.take_ejected();
        for device in &gone {
            let bdf = device.bdf.clone();
            self.emit_device(EventKind::DeviceRemoved { bdf }, &device.id);
        }
        if !gone.is_empty() {
            self.publish();
        }
    }

    fn emit_device(&self, kind: EventKind, id: &str) {
        (self.context.events)(&Event::of_device(kind, id));
    }

    /// `PUT vm.reclaim-thresholds`
    ///
    /// # Errors
    /// There is no VM, or the change is invalid; in this case nothing has changed.
    pub fn set_thresholds(&self, change: &ReclaimThresholdsChange) -> Result<(), LifecycleError> {
        if self.config.is_none() {
            return Err(LifecycleError::VmNotCreated);
        }
        self.thresholds
            .change(change)
            .map_err(LifecycleError::Thresholds)?;
        if let (Some(_), Some(policy), Some(machine)) = (
            change.reporting_policy,
            self.thresholds.policy(),
            &self.machine,
        ) {
            machine.set_reporting_policy(policy);
        }
        Ok(())
    }

    /// `vm.balloon-reporting`: only requests a pause, without waiting for it.
    ///
    /// # Errors
    /// There is no balloon, or the guest does not support the request in its current state.
    pub fn balloon_reporting(&mut self, request: VmBalloonReporting) -> Result<(), LifecycleError> {
        self.on_machine(|machine| machine.balloon_reporting(request))?;
        match request.action {
            ReportingAction::Pause => self.reporting_paused = true,
            ReportingAction::Resume => self.reporting_paused = false,
            ReportingAction::ReportNow => {}
        }
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

/// Passes the operator's reporting settings to a new balloon.
fn steer_reporting(machine: &dyn Machine, thresholds: &Thresholds, paused: bool) {
    if let Some(policy) = thresholds.policy() {
        machine.set_reporting_policy(policy);
    }
    if paused {
        let request = VmBalloonReporting {
            action: ReportingAction::Pause,
            again: false,
        };
        if let Err(error) = machine.balloon_reporting(request) {
            // There is no balloon, or its reporting is off.
            log::info!("Reporting cannot be paused, because it is not active: {error}");
        }
    }
}

/// The configuration of a guest that has `desired` bytes of RAM.
fn resized_memory(memory: &MemoryConfig, desired: u64) -> Result<MemoryConfig, LifecycleError> {
    let has_zones = memory.zones.iter().flatten().next().is_some();
    let room = memory.room_bytes(HotplugMethod::VirtioMem);
    let mut resized = memory.clone();
    match memory.hotplug_method {
        HotplugMethod::Acpi if !has_zones => resized.size = desired,
        HotplugMethod::VirtioMem if room > 0 => {
            let added = desired.checked_sub(memory.size);
            let added = added.filter(|added| *added <= room);
            let added = added.ok_or(LifecycleError::MemoryOutOfRange {
                desired,
                least: memory.size,
                most: memory.size.saturating_add(room),
            })?;
            resized.hotplugged_size = (added > 0).then_some(added);
        }
        _ => {
            let current = memory.total_bytes().unwrap_or(memory.size);
            return Err(LifecycleError::MemoryHotplug { current, desired });
        }
    }
    Ok(resized)
}

/// Before boot only the configuration changes; it is validated at boot.
fn resize_stored(config: &mut VmConfig, resize: VmResize) {
    if let Some(vcpus) = resize.desired_vcpus {
        config.cpus.boot_vcpus = vcpus;
    }
    if let Some(bytes) = resize.desired_ram {
        config.memory.size = bytes;
    }
    if let (Some(bytes), Some(balloon)) = (resize.desired_balloon, &mut config.balloon) {
        balloon.size = bytes;
    }
}
