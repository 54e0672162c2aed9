//! The life of the VM, without threads: what each request does in each state.
//!
//! ```text
//!            create            boot                 pause
//!  nothing ─────────► Created ──────► Running ◄──────────────► Paused
//!     ▲                 │ ▲              │         resume         │
//!     │     delete      │ └──────────────┴──── shutdown ──────────┤
//!     └─────────────────┴──────────────── delete ─────────────────┘
//! ```
//! A boot that fails leaves Created, with everything given back. A reboot that fails does, too.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use api::config::{HotplugMethod, MemoryConfig};
use api::{
    PciDeviceInfo, ReclaimThresholdsChange, ReportingAction, VmBalloonReporting, VmConfig,
    VmResize, VmState,
};

use super::machine::Machine;
use super::request::{ControlError, RequestError, VmAnswer, VmRequest};
use super::view::{MachineView, PublishedView, View};
use crate::config::{self, NewDevice, with_device, without_device};
use crate::thresholds::{Subjects, Thresholds};
use crate::vm::{HotplugError, VmContext, VmError};

/// The VM and everything that may be asked of it.
pub(super) struct Lifecycle<M: Machine> {
    config: Option<VmConfig>,
    machine: Option<M>,
    /// How many there have been, and how many balloons were added to one.
    machines: u64,
    /// Open taps that came with requests, by the numbers that the configuration has for them. They stay open for
    /// reboots.
    taps: BTreeMap<i32, OwnedFd>,
    paused: bool,
    view: Arc<PublishedView>,
    /// Kept over reboots; forgotten with the configuration.
    thresholds: Arc<Thresholds>,
    /// The operator has paused reporting. Kept and forgotten with the thresholds.
    reporting_paused: bool,
    events_are_read: bool,
    context: VmContext,
    ended: bool,
}

impl<M: Machine> Lifecycle<M> {
    pub(super) fn new(
        view: Arc<PublishedView>,
        thresholds: Arc<Thresholds>,
        events_are_read: bool,
        context: VmContext,
    ) -> Self {
        Self {
            config: None,
            machine: None,
            machines: 0,
            taps: BTreeMap::new(),
            paused: false,
            view,
            thresholds,
            reporting_paused: false,
            events_are_read,
            context,
            ended: false,
        }
    }

    /// Carries out a request and publishes what came of it, so that whoever gets the answer also sees the effect.
    pub(super) fn handle(&mut self, request: VmRequest) -> Result<VmAnswer, RequestError> {
        let kind = request.kind();
        let outcome = match request {
            VmRequest::AddDevice(device, fds) => self.add_device(*device, fds),
            other => self.change(other).map(|()| VmAnswer::Done),
        };
        self.close_unnamed_taps();
        self.publish();
        outcome.map_err(|cause| RequestError { kind, cause })
    }

    fn change(&mut self, request: VmRequest) -> Result<(), ControlError> {
        match request {
            VmRequest::Create(config) => self.create(*config),
            VmRequest::Boot => self.boot(),
            VmRequest::Delete => self.delete(),
            VmRequest::Shutdown => self.shutdown(),
            VmRequest::Reboot => self.reboot(),
            VmRequest::Pause => self.pause(),
            VmRequest::Resume => self.resume(),
            VmRequest::PowerButton => self.power_button(),
            VmRequest::Resize(resize) => self.resize(resize),
            VmRequest::SetReclaimThresholds(change) => self.set_thresholds(&change),
            VmRequest::BalloonHinting(action) => {
                self.on_machine(|machine| machine.balloon_hinting(action))
            }
            VmRequest::AddDevice(device, fds) => self.add_device(*device, fds).map(drop),
            VmRequest::RemoveDevice(id) => self.remove_device(&id),
            VmRequest::BalloonReporting(request) => self.balloon_reporting(request),
            VmRequest::ShutdownVmm => self.end(),
        }
    }

    /// Stops the machine if there is one and tells, once and last of all, that the VMM ends.
    fn end(&mut self) -> Result<(), ControlError> {
        let deleted = self.delete();
        if !std::mem::replace(&mut self.ended, true) {
            self.emit("vmm", "shutdown");
        }
        deleted
    }

    fn publish(&self) {
        self.view.publish(View {
            config: self.config.clone().map(Arc::new),
            machine: self.machine.as_ref().map(|machine| MachineView {
                number: self.machines,
                state: self.machine_state(),
                observer: Arc::new(machine.observer()),
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

    fn machine_state(&self) -> VmState {
        if self.paused {
            VmState::Paused
        } else {
            VmState::Running
        }
    }

    fn emit(&self, source: &str, event: &str) {
        (self.context.events)(source, event, &[]);
    }

    /// Checks that the machine is in state `from`, to go to state `to`.
    fn machine_in(&self, from: VmState, to: VmState) -> Result<(), ControlError> {
        if self.machine.is_none() {
            return Err(ControlError::VmNotRunning);
        }
        let state = self.machine_state();
        if state != from {
            return Err(ControlError::InvalidStateTransition { from: state, to });
        }
        Ok(())
    }

    /// Calls `action` on the machine.
    fn on_machine(
        &mut self,
        action: impl FnOnce(&mut M) -> Result<(), VmError>,
    ) -> Result<(), ControlError> {
        let machine = self.machine.as_mut().ok_or(ControlError::VmNotRunning)?;
        action(machine).map_err(ControlError::Machine)
    }

    fn create(&mut self, config: VmConfig) -> Result<(), ControlError> {
        if self.config.is_some() {
            return Err(ControlError::VmAlreadyCreated);
        }
        self.config = Some(config);
        Ok(())
    }

    fn boot(&mut self) -> Result<(), ControlError> {
        if self.machine.is_some() {
            return Err(ControlError::VmAlreadyCreated);
        }
        let config = self.config.as_ref().ok_or(ControlError::VmMissingConfig)?;
        config::validate(config).map_err(ControlError::ConfigValidation)?;
        self.emit("vm", "booting");
        self.start_machine()?;
        self.emit("vm", "booted");
        Ok(())
    }

    /// Builds and boots the machine of the stored configuration, which was valid when it was booted for the first time.
    fn start_machine(&mut self) -> Result<(), ControlError> {
        let stored = self.config.as_ref().ok_or(ControlError::VmMissingConfig)?;
        // What creation decides (ids, names of taps) becomes part of the configuration only when it succeeds.
        let mut config = stored.clone();
        config::assign_ids(&mut config);
        let mut machine = M::new(&mut config, &self.context).map_err(ControlError::Machine)?;
        steer_reporting(&machine, &self.thresholds, self.reporting_paused);
        machine.boot().map_err(ControlError::Machine)?;
        self.config = Some(config);
        self.machine = Some(machine);
        self.machines += 1;
        self.paused = false;
        Ok(())
    }

    fn stop_machine(&mut self) -> Result<(), ControlError> {
        let machine = self.machine.take().ok_or(ControlError::VmNotRunning)?;
        self.paused = false;
        let stopped = machine.shutdown().map_err(ControlError::Machine);
        // What the machine signalled while it went must not hit the next one.
        for signal in [
            &self.context.signals.shutdown,
            &self.context.signals.reset,
            &self.context.signals.failed,
        ] {
            // Nothing to read means that it was not signalled.
            let _ = signal.read();
        }
        stopped
    }

    fn shutdown(&mut self) -> Result<(), ControlError> {
        self.stop_machine()?;
        self.emit("vm", "shutdown");
        Ok(())
    }

    fn delete(&mut self) -> Result<(), ControlError> {
        let stopped = match self.machine {
            Some(_) => self.shutdown(),
            None => Ok(()),
        };
        self.context.consoles.close();
        self.thresholds.clear();
        self.reporting_paused = false;
        if self.config.take().is_some() {
            self.emit("vm", "deleted");
        }
        stopped
    }

    fn reboot(&mut self) -> Result<(), ControlError> {
        if self.machine.is_none() {
            return Err(ControlError::VmNotCreated);
        }
        self.emit("vm", "rebooting");
        self.stop_machine()?;
        // Not judged again: every change since the boot was.
        self.start_machine()?;
        self.emit("vm", "rebooted");
        Ok(())
    }

    fn pause(&mut self) -> Result<(), ControlError> {
        self.machine_in(VmState::Running, VmState::Paused)?;
        self.emit("vm", "pausing");
        self.on_machine(M::pause)?;
        self.paused = true;
        self.emit("vm", "paused");
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ControlError> {
        self.machine_in(VmState::Paused, VmState::Running)?;
        self.emit("vm", "resuming");
        self.on_machine(M::resume)?;
        self.paused = false;
        self.emit("vm", "resumed");
        Ok(())
    }

    fn power_button(&mut self) -> Result<(), ControlError> {
        self.on_machine(|machine| machine.power_button())
    }

    fn resize(&mut self, resize: VmResize) -> Result<(), ControlError> {
        let config = self.config.as_mut().ok_or(ControlError::VmNotCreated)?;
        let Some(machine) = &self.machine else {
            let mut wanted = config.clone();
            resize_stored(&mut wanted, resize);
            config::validate_balloon(&wanted).map_err(ControlError::ConfigValidation)?;
            *config = wanted;
            return Ok(());
        };
        (self.context.events)("vm", "resizing", &[]);
        if let Some(desired) = resize.desired_vcpus
            && desired != config.cpus.boot_vcpus
        {
            let current = config.cpus.boot_vcpus;
            return Err(ControlError::VcpuHotplug { current, desired });
        }
        let ram = resize
            .desired_ram
            .filter(|desired| Some(*desired) != config.memory.total_bytes());
        let mut wanted = config.clone();
        if let Some(desired) = ram {
            let added = hotplugged_bytes(&config.memory, desired)?;
            wanted.memory.hotplugged_size = (added > 0).then_some(added);
        }
        if let (Some(bytes), Some(balloon)) = (resize.desired_balloon, &mut wanted.balloon) {
            balloon.size = bytes;
        }
        // What could not be booted is refused before anything changes.
        config::validate_balloon(&wanted).map_err(ControlError::ConfigValidation)?;
        if ram.is_some() {
            machine
                .resize_memory(wanted.memory.hotplugged_size.unwrap_or(0))
                .map_err(ControlError::Machine)?;
            // Kept as the wish that it is: the guest may take a while, and a reboot starts from it.
            config.memory.hotplugged_size = wanted.memory.hotplugged_size;
        }
        if let Some(desired) = resize.desired_balloon {
            machine
                .resize_balloon(desired)
                .map_err(ControlError::Machine)?;
            if let Some(balloon) = &mut config.balloon {
                balloon.size = desired;
            }
        }
        (self.context.events)("vm", "resized", &[]);
        Ok(())
    }

    fn add_device(
        &mut self,
        mut device: NewDevice,
        fds: Vec<OwnedFd>,
    ) -> Result<VmAnswer, ControlError> {
        let config = self.config.as_ref().ok_or(ControlError::VmNotCreated)?;
        if let (NewDevice::Balloon(_), Some(balloon)) = (&device, &config.balloon) {
            let id = config::balloon_id(balloon).to_owned();
            return Err(ControlError::Device(HotplugError::BalloonPresent { id }));
        }
        if let NewDevice::Net(net) = &mut device
            && !fds.is_empty()
        {
            net.fds = Some(fds.iter().map(AsRawFd::as_raw_fd).collect());
        }
        let mut wanted = with_device(config, device.clone());
        config::validate_addition(&wanted, &device).map_err(ControlError::ConfigValidation)?;
        let Some(machine) = &mut self.machine else {
            self.config = Some(wanted);
            self.keep_taps(fds);
            return Ok(VmAnswer::Done);
        };
        config::assign_ids(&mut wanted);
        config::take_id(&wanted, &mut device);
        let added = machine
            .add_device(&mut device)
            .map_err(ControlError::Machine)?;
        if matches!(device, NewDevice::Balloon(_)) {
            self.machines += 1;
            steer_reporting(machine, &self.thresholds, self.reporting_paused);
        }
        self.config = Some(with_device(config, device));
        self.keep_taps(fds);
        self.emit_device("virtio-device", "added", &added);
        Ok(VmAnswer::Added(added))
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

    fn remove_device(&mut self, id: &str) -> Result<(), ControlError> {
        let config = self.config.as_ref().ok_or(ControlError::VmNotCreated)?;
        let without = without_device(config, id);
        match (&mut self.machine, without) {
            // One that the guest has been asked to let go of is in the machine alone.
            (Some(machine), without) => {
                machine.remove_device(id).map_err(ControlError::Machine)?;
                if let Some(without) = without {
                    self.config = Some(without);
                }
            }
            (None, Some(without)) => self.config = Some(without),
            (None, None) => {
                let id = id.to_owned();
                return Err(ControlError::Device(HotplugError::NoSuchDevice { id }));
            }
        }
        Ok(())
    }

    /// The guest has let go of devices.
    pub(super) fn finish_removals(&mut self) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        let gone = machine.take_ejected();
        for device in &gone {
            self.emit_device("vm", "device-removed", device);
        }
        if !gone.is_empty() {
            self.publish();
        }
    }

    fn emit_device(&self, source: &str, event: &str, device: &PciDeviceInfo) {
        let properties = [("id", device.id.clone()), ("bdf", device.bdf.clone())];
        (self.context.events)(source, event, &properties);
    }

    fn set_thresholds(&self, change: &ReclaimThresholdsChange) -> Result<(), ControlError> {
        if self.config.is_none() {
            return Err(ControlError::VmNotCreated);
        }
        self.thresholds
            .change(change)
            .map_err(ControlError::Thresholds)?;
        if let (Some(_), Some(policy), Some(machine)) = (
            change.reporting_policy,
            self.thresholds.policy(),
            &self.machine,
        ) {
            machine.set_reporting_policy(policy);
        }
        Ok(())
    }

    fn balloon_reporting(&mut self, request: VmBalloonReporting) -> Result<(), ControlError> {
        self.on_machine(|machine| machine.balloon_reporting(request))?;
        match request.action {
            ReportingAction::Pause => self.reporting_paused = true,
            ReportingAction::Resume => self.reporting_paused = false,
            ReportingAction::ReportNow => {}
        }
        Ok(())
    }

    /// True while a machine exists.
    pub(super) fn has_machine(&self) -> bool {
        self.machine.is_some()
    }
}

/// Tells a new balloon what the operator wants of the guest's reporting.
fn steer_reporting<M: Machine>(machine: &M, thresholds: &Thresholds, paused: bool) {
    if let Some(policy) = thresholds.policy() {
        machine.set_reporting_policy(policy);
    }
    if paused {
        let request = VmBalloonReporting {
            action: ReportingAction::Pause,
            again: false,
        };
        if let Err(error) = machine.balloon_reporting(request) {
            // Without a balloon, or with one that takes no reports, there is nothing to pause.
            log::info!("Reporting has nothing to pause: {error}");
        }
    }
}

/// What a guest shall have plugged in to have `desired` bytes in all.
fn hotplugged_bytes(memory: &MemoryConfig, desired: u64) -> Result<u64, ControlError> {
    let room = memory.hotplug_size.unwrap_or(0);
    if room == 0 || memory.hotplug_method != HotplugMethod::VirtioMem {
        let current = memory.total_bytes().unwrap_or(memory.size);
        return Err(ControlError::MemoryHotplug { current, desired });
    }
    let added = desired.checked_sub(memory.size);
    added
        .filter(|added| *added <= room)
        .ok_or(ControlError::MemoryOutOfRange {
            desired,
            least: memory.size,
            most: memory.size.saturating_add(room),
        })
}

/// Before boot only the configuration changes; whether it makes sense is decided at boot.
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
