//! One virtual machine: built from a validated configuration, booted, paused, shut down.
//!
//! The control thread owns the VM. Other threads read a running machine through [`MachineObserver`], which never waits
//! for the control thread. Except for one documented call, the observer never waits for the guest.

mod build;
mod consoles;
mod context;
mod devices;
mod error;
mod handles;
mod hotplug;
mod network;
mod observer;
mod pin;
mod rate_limits;
mod reclaim_report;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use api::config::{PlatformConfig, RateLimiterConfig};
use api::{HintingAction, PciDeviceInfo, ReportingPolicy, VmBalloonReporting, VmConfig};
use machine::boot::Payload;
use machine::cpu::VcpuBrake;
use machine::memory::on_demand::OnDemand;
use machine::memory::{GuestMemory, MemoryFailure, WriteTracker};
use machine::pc::{Pc, Plugged};
use machine::threads::DeviceKind;
use state::Saved;
use virtio_devices::balloon::BalloonHandle;
use virtio_devices::iommu::IommuHandle;
use virtio_devices::mem::MemHandle;
use virtio_devices::reclaim::InhibitGuard;

pub use build::prepare;
pub use context::{Consoles, VmContext};
pub use error::{HotplugError, VmError};
use handles::Handles;
pub use handles::WrittenFiles;
use observer::OwnObserver;
pub use observer::{BalloonStatsError, MachineObserver};

use crate::config::{NewDevice, rate_limits};
use crate::reporting_policy::requests;
use crate::snapshot::{Snapshot, SnapshotError};

/// The machine as the control thread uses it. Every call comes from that thread and none waits for the guest. Tests of
/// the control thread and of the API implement it without KVM.
pub trait Machine {
    /// Starts the vCPUs.
    ///
    /// # Errors
    /// A vCPU cannot be set up.
    fn boot(&mut self) -> Result<(), VmError>;

    /// Stops vCPUs and device workers; returns when guest memory no longer changes.
    ///
    /// # Errors
    /// A vCPU did not stop within its deadline; in this case the machine continues.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Undoes [`Machine::pause`].
    ///
    /// # Errors
    /// A vCPU could not be resumed.
    fn resume(&mut self) -> Result<(), VmError>;

    /// Completes a restored machine, which may run already, with what only makes it faster.
    fn complete(&self) {}

    /// Stops everything and releases all resources.
    ///
    /// # Errors
    /// A vCPU did not end within its deadline.
    fn shutdown(self: Box<Self>) -> Result<(), VmError>;

    /// The state of the paused machine, and its memory.
    ///
    /// # Errors
    /// The guest has not released a device yet, or KVM cannot return a part of the state.
    fn save(&self) -> Result<SavedMachine, VmError>;

    /// As [`Machine::save`], but data of disks may still be only in the host's page cache.
    ///
    /// # Errors
    /// As for [`Machine::save`].
    fn state(&self) -> Result<SavedMachine, VmError>;

    /// The files that its guest writes to.
    fn written_files(&self) -> WrittenFiles;

    /// Whether all of RAM has been restored; if not, the rest is filled in the background from now on.
    fn is_memory_complete(&self) -> bool;

    /// Starts to record the pages of RAM that are written.
    ///
    /// # Errors
    /// KVM cannot record writes.
    fn track_writes(&self) -> Result<WriteTracker, VmError>;

    /// A brake for its vCPUs. At most one may exist.
    fn brake(&self) -> Option<VcpuBrake>;

    /// Releases the locks of all disks of the paused machine, or takes them again.
    ///
    /// # Errors
    /// Another process has a conflicting lock.
    fn hold_disks(&self, hold: bool) -> Result<(), VmError>;

    /// Writes a core file of the paused machine.
    ///
    /// # Errors
    /// KVM refuses to show a part, or RAM or the file cannot be accessed.
    fn write_core(&self, file: &File) -> Result<(), VmError>;

    /// Presses the ACPI power button.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    fn power_button(&self) -> Result<(), VmError>;

    /// Sends a non-maskable interrupt to every vCPU that the guest has started, and returns immediately.
    fn nmi(&self);

    /// Changes the size of a disk and notifies the guest; returns immediately.
    ///
    /// # Errors
    /// There is no such disk, or its image cannot have this size.
    fn resize_disk(&self, id: &str, bytes: u64) -> Result<(), VmError>;

    /// Changes the rate limit of a disk, a network interface or a group. The limit is in effect when this returns.
    ///
    /// # Errors
    /// There is no such device or group.
    fn set_rate_limit(&self, id: &str, limit: Option<&RateLimiterConfig>) -> Result<(), VmError>;

    /// Sets the balloon's target in bytes and returns immediately.
    ///
    /// # Errors
    /// [`VmError::MissingBalloon`].
    fn resize_balloon(&self, bytes: u64) -> Result<(), VmError>;

    /// Completes the removal of vCPUs that the guest has released. Without an error, the number of vCPUs can change.
    ///
    /// # Errors
    /// A removal is pending, or a vCPU did not end within its deadline.
    fn settle_vcpus(&mut self) -> Result<(), VmError>;

    /// Adds vCPUs, or requests the release of the last ones from the guest, and returns immediately.
    ///
    /// # Errors
    /// A removal is pending, or a vCPU cannot be added.
    fn resize_vcpus(&mut self, count: u32) -> Result<(), VmError>;

    /// Adds memory so that the guest has `total_bytes`, and returns immediately. Changes nothing if it has that much.
    ///
    /// # Errors
    /// There is no room for it, or the host does not have it.
    fn grow_memory(&mut self, total_bytes: u64) -> Result<(), VmError>;

    /// Sets how much memory the guest should plug in beyond what a zone had at boot, and returns immediately.
    ///
    /// # Errors
    /// [`VmError::MissingMem`], or [`VmError::MemoryResize`] with the reason.
    fn resize_memory(&self, zone_id: &str, hotplugged_bytes: u64) -> Result<(), VmError>;

    /// Starts or ends a run of free page hinting and returns immediately.
    ///
    /// # Errors
    /// [`VmError::MissingBalloon`], or [`VmError::Hinting`] with the reason.
    fn balloon_hinting(&self, action: HintingAction) -> Result<(), VmError>;

    /// Pauses or resumes reporting, or requests a report of everything; returns immediately.
    /// [`MachineObserver::reporting`] waits until a pause is complete.
    ///
    /// # Errors
    /// [`VmError::MissingBalloon`], or [`VmError::Reporting`] with the reason.
    fn balloon_reporting(&self, request: VmBalloonReporting) -> Result<(), VmError>;

    /// Sends a reporting policy to the guest, if there is a balloon and its driver supports one; returns immediately.
    fn set_reporting_policy(&self, policy: ReportingPolicy);

    /// Adds a device whose configuration has been checked and named, and interrupts the guest. On an error nothing is
    /// left behind. `device` is changed as [`Vm::new`] changes the configuration.
    ///
    /// # Errors
    /// The device cannot be created or named, or there is no slot for it.
    fn add_device(&mut self, device: &mut NewDevice) -> Result<PciDeviceInfo, VmError>;

    /// Requests the release of a device from the guest and returns immediately; may be repeated.
    ///
    /// # Errors
    /// There is no such device, it cannot be removed, or it is a balloon with memory in it.
    fn remove_device(&mut self, id: &str) -> Result<(), VmError>;

    /// Drops the devices that the guest has released, and returns their addresses and names. Ends the vCPUs that it has
    /// released. Waits at most for host I/O.
    fn take_ejected(&mut self) -> Vec<PciDeviceInfo>;

    /// Whether the host may fail to provide memory while the machine runs. [`Machine::memory_failure`] must be called
    /// at [`machine::cpu::STALL_CHECK_INTERVAL`] then.
    fn may_run_out_of_memory(&self) -> bool;

    /// RAM that the host has failed to provide since the last call.
    fn memory_failure(&mut self) -> Option<MemoryFailure>;

    /// Read access for other threads.
    fn observer(&self) -> Arc<dyn MachineObserver>;
}

/// Result of [`Machine::save`].
#[derive(Debug)]
pub struct SavedMachine {
    /// A `PcState`.
    pub pc: Saved,
    /// Its RAM, which stays with the machine.
    pub memory: GuestMemory,
}

/// Creates the machine of a validated configuration, as [`Vm::new`] does; from a snapshot, if there is one.
pub type MachineFactory =
    fn(&mut VmConfig, &VmContext, Option<&Snapshot>) -> Result<Box<dyn Machine>, VmError>;

/// One virtual machine. Dropping it stops everything it started.
#[derive(Debug)]
pub struct Vm {
    /// Dropped first, so that nothing accesses guest RAM while the other fields are dropped.
    pc: Pc,
    /// The payload in guest RAM; boot adds the description of the machine. `None` in a restored machine.
    payload: Option<Payload>,
    platform: Option<PlatformConfig>,
    balloon: Option<BalloonHandle>,
    /// Hot-plug memory, by the zone that grows.
    mems: BTreeMap<String, MemHandle>,
    /// Translates the addresses of devices, if configured.
    iommu: Option<IommuHandle>,
    /// Keeps the balloon from discarding while devices have RAM pinned.
    pin: Option<InhibitGuard>,
    handles: Handles,
    observer: OwnObserver,
    /// Fills guest RAM, and so outlives everything that accesses it.
    on_demand: Option<OnDemand>,
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Otherwise an API thread that looks at a function could be the one that drops it.
        self.observer.forget_functions();
    }
}

impl Vm {
    /// Loads what a restored machine has not loaded yet: it would count as never touched.
    fn complete_memory(&self) -> Result<(), VmError> {
        match self.on_demand.as_ref().is_none_or(OnDemand::finish) {
            true => Ok(()),
            false => Err(VmError::Snapshot(SnapshotError::Incomplete)),
        }
    }
}

impl Machine for Vm {
    fn boot(&mut self) -> Result<(), VmError> {
        let Some(payload) = &self.payload else {
            return Ok(());
        };
        self.pc
            .boot(payload, self.platform.as_ref())
            .map_err(VmError::Pc)
    }

    fn save(&self) -> Result<SavedMachine, VmError> {
        // The saved guest relies on completed writes, flushed or not.
        self.handles.sync()?;
        self.state()
    }

    fn written_files(&self) -> WrittenFiles {
        self.handles.written_files()
    }

    fn is_memory_complete(&self) -> bool {
        self.on_demand.as_ref().is_none_or(OnDemand::is_complete)
    }

    fn track_writes(&self) -> Result<WriteTracker, VmError> {
        self.pc.track_writes().map_err(VmError::Pc)
    }

    fn brake(&self) -> Option<VcpuBrake> {
        Some(self.pc.brake())
    }

    fn hold_disks(&self, hold: bool) -> Result<(), VmError> {
        self.handles.hold(hold)
    }

    fn state(&self) -> Result<SavedMachine, VmError> {
        self.complete_memory()?;
        let state = self.pc.state().map_err(VmError::Pc)?;
        Ok(SavedMachine {
            pc: Saved::of(&state),
            memory: self.pc.memory().clone(),
        })
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.pc.pause().map_err(VmError::Pc)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.pc.resume();
        Ok(())
    }

    fn complete(&self) {
        self.pc.register_doorbells();
        if let Some(on_demand) = &self.on_demand {
            on_demand.begin();
        }
    }

    fn shutdown(mut self: Box<Self>) -> Result<(), VmError> {
        self.pc.shutdown().map_err(VmError::Pc)
    }

    fn write_core(&self, file: &File) -> Result<(), VmError> {
        self.complete_memory()?;
        self.pc.write_core(file).map_err(VmError::Pc)
    }

    fn power_button(&self) -> Result<(), VmError> {
        self.pc.power_button().map_err(VmError::Pc)
    }

    fn nmi(&self) {
        self.pc.nmi();
    }

    fn resize_disk(&self, id: &str, bytes: u64) -> Result<(), VmError> {
        let plugged = self.pc.devices().iter().find(|it| it.id == id);
        if plugged.is_some_and(|it| it.kind == DeviceKind::VhostUser) {
            let id = id.to_owned();
            return Err(VmError::Hotplug(HotplugError::OfBackEnd { id }));
        }
        let (Some(plugged), Some(disk)) = (plugged, self.handles.find_disk(id)) else {
            let id = id.to_owned();
            return Err(VmError::Hotplug(HotplugError::NoSuchDevice { id }));
        };
        self.pc
            .while_paused(plugged, || disk.resize(bytes))
            .map_err(VmError::DiskResize)
    }

    fn set_rate_limit(&self, id: &str, limit: Option<&RateLimiterConfig>) -> Result<(), VmError> {
        let Some(users) = self.handles.limit(id, rate_limits(limit)) else {
            let id = id.to_owned();
            let mut devices = self.pc.devices().iter();
            if devices.any(|it| it.id == id && it.kind == DeviceKind::VhostUser) {
                return Err(VmError::Hotplug(HotplugError::OfBackEnd { id }));
            }
            return Err(VmError::Hotplug(HotplugError::NoSuchDevice { id }));
        };
        let devices = self.pc.devices().iter();
        for device in devices.filter(|it| users.contains(&it.id.as_str())) {
            // A queue that waits for tokens of the old limit reads the new limit when it is resumed.
            self.pc.while_paused(device, || ());
        }
        Ok(())
    }

    fn resize_balloon(&self, bytes: u64) -> Result<(), VmError> {
        let balloon = self.balloon.as_ref().ok_or(VmError::MissingBalloon)?;
        balloon.set_target_bytes(bytes);
        Ok(())
    }

    fn settle_vcpus(&mut self) -> Result<(), VmError> {
        self.pc.settle_vcpus().map_err(VmError::Pc)
    }

    fn resize_vcpus(&mut self, count: u32) -> Result<(), VmError> {
        self.pc.resize_vcpus(count).map_err(VmError::Pc)
    }

    fn grow_memory(&mut self, total_bytes: u64) -> Result<(), VmError> {
        let Some(zone) = self.pc.grow_memory(total_bytes).map_err(VmError::Pc)? else {
            return Ok(());
        };
        self.observer.add_zone(zone);
        self.pc.announce_memory().map_err(VmError::Pc)
    }

    fn resize_memory(&self, zone_id: &str, hotplugged_bytes: u64) -> Result<(), VmError> {
        let mem = self.mems.get(zone_id).ok_or(VmError::MissingMem)?;
        mem.set_requested_bytes(hotplugged_bytes)
            .map_err(VmError::MemoryResize)
    }

    fn balloon_hinting(&self, action: HintingAction) -> Result<(), VmError> {
        let balloon = self.balloon.as_ref().ok_or(VmError::MissingBalloon)?;
        match action {
            HintingAction::Start => balloon.start_hinting().map(drop),
            HintingAction::Stop => balloon.stop_hinting(),
        }
        .map_err(VmError::Hinting)
    }

    fn balloon_reporting(&self, request: VmBalloonReporting) -> Result<(), VmError> {
        let balloon = self.balloon.as_ref().ok_or(VmError::MissingBalloon)?;
        requests::steer(balloon, request).map_err(VmError::Reporting)
    }

    fn set_reporting_policy(&self, policy: ReportingPolicy) {
        if let Some(balloon) = &self.balloon {
            balloon.set_reporting_policy(policy);
        }
    }

    fn may_run_out_of_memory(&self) -> bool {
        self.pc.may_run_out_of_memory()
    }

    fn memory_failure(&mut self) -> Option<MemoryFailure> {
        self.pc.memory_failure()
    }

    fn observer(&self) -> Arc<dyn MachineObserver> {
        Arc::new(self.observer.handle())
    }

    fn add_device(&mut self, device: &mut NewDevice) -> Result<PciDeviceInfo, VmError> {
        self.check_addition(device).map_err(VmError::Hotplug)?;
        self.plug(device)
    }

    fn remove_device(&mut self, id: &str) -> Result<(), VmError> {
        let plugged = self.removable(id).map_err(VmError::Hotplug)?;
        let is_balloon = plugged.kind == DeviceKind::Balloon;
        self.pc.request_removal(plugged).map_err(VmError::Pc)?;
        if is_balloon {
            // The balloon must not be inflated any more. Its figures are dropped with it.
            self.balloon = None;
        }
        Ok(())
    }

    fn take_ejected(&mut self) -> Vec<PciDeviceInfo> {
        if let Err(error) = self.pc.take_ejected_vcpus() {
            log::error!("{}", api::error_line(&error));
        }
        let gone = self.pc.take_ejected().into_iter();
        let gone = gone.map(|plugged| {
            let is_balloon = plugged.kind == DeviceKind::Balloon;
            self.observer.remove(&plugged.id, is_balloon);
            self.handles.remove(&plugged.id);
            info(&plugged)
        });
        let gone = gone.collect();
        self.pin_or_unpin();
        gone
    }
}

/// A device as the API shows it.
fn info(plugged: &Plugged) -> PciDeviceInfo {
    PciDeviceInfo {
        id: plugged.id.clone(),
        bdf: plugged.bdf.to_string(),
    }
}
