//! The machine as the control thread needs it: implemented by [`Vm`] and, in tests, by a fake.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use api::{
    BalloonStatsResponse, DeviceNode, HintingAction, PciDeviceInfo, ReclaimStats, ReportingPolicy,
    ReportingStatus, VmBalloonReporting, VmConfig, VmCounters,
};

use crate::config::NewDevice;
use crate::thresholds::PolicySight;
use crate::vm::{BalloonStatsError, Vm, VmContext, VmError, VmObserver};

/// One virtual machine. Every call comes from the control thread and none waits for the guest. See [`Vm`] for what
/// each does.
pub trait Machine: Sized + 'static {
    /// What API threads look at.
    type Observer: MachineObserver;

    /// See [`Vm::new`].
    ///
    /// # Errors
    /// A part could not be made; nothing is left behind.
    fn new(config: &mut VmConfig, context: &VmContext) -> Result<Self, VmError>;

    /// See [`Vm::boot`].
    ///
    /// # Errors
    /// The payload could not be loaded or a vCPU not be started.
    fn boot(&mut self) -> Result<(), VmError>;

    /// See [`Vm::pause`].
    ///
    /// # Errors
    /// A vCPU did not stop in time.
    fn pause(&mut self) -> Result<(), VmError>;

    /// See [`Vm::resume`].
    ///
    /// # Errors
    /// A vCPU could not be resumed.
    fn resume(&mut self) -> Result<(), VmError>;

    /// See [`Vm::shutdown`].
    ///
    /// # Errors
    /// A thread did not end in time.
    fn shutdown(self) -> Result<(), VmError>;

    /// See [`Vm::power_button`].
    ///
    /// # Errors
    /// The interrupt could not be raised.
    fn power_button(&self) -> Result<(), VmError>;

    /// See [`Vm::resize_balloon`].
    ///
    /// # Errors
    /// There is no balloon.
    fn resize_balloon(&self, bytes: u64) -> Result<(), VmError>;

    /// See [`Vm::resize_memory`].
    ///
    /// # Errors
    /// There is no memory to be plugged in, or not so much.
    fn resize_memory(&self, hotplugged_bytes: u64) -> Result<(), VmError>;

    /// See [`Vm::balloon_hinting`].
    ///
    /// # Errors
    /// There is no balloon, or the guest cannot do it now.
    fn balloon_hinting(&self, action: HintingAction) -> Result<(), VmError>;

    /// See [`Vm::add_device`].
    ///
    /// # Errors
    /// It cannot be made; nothing is left behind.
    fn add_device(&mut self, device: &mut NewDevice) -> Result<PciDeviceInfo, VmError>;

    /// See [`Vm::remove_device`].
    ///
    /// # Errors
    /// It cannot go.
    fn remove_device(&mut self, id: &str) -> Result<(), VmError>;

    /// See [`Vm::take_ejected`].
    fn take_ejected(&mut self) -> Vec<PciDeviceInfo>;

    /// See [`Vm::balloon_reporting`].
    ///
    /// # Errors
    /// There is no balloon, or the guest cannot do it now.
    fn balloon_reporting(&self, request: VmBalloonReporting) -> Result<(), VmError>;

    /// See [`Vm::set_reporting_policy`].
    fn set_reporting_policy(&self, policy: ReportingPolicy);

    /// See [`Vm::observer`].
    fn observer(&self) -> Self::Observer;
}

/// Read-only access to a machine from any thread; never waits for the control thread. See [`VmObserver`].
pub trait MachineObserver: fmt::Debug + Send + Sync + 'static {
    /// RAM less the balloon, bytes. O(1).
    fn memory_actual_size_bytes(&self) -> u64;

    /// Counters by device.
    fn counters(&self) -> VmCounters;

    /// A fresh sample from the guest; may wait for it until `deadline`.
    ///
    /// # Errors
    /// No balloon, or no answer in time.
    fn balloon_stats(&self, deadline: Instant) -> Result<BalloonStatsResponse, BalloonStatsError>;

    /// What came back to the host; takes milliseconds.
    ///
    /// # Errors
    /// No balloon.
    fn reclaim_stats(&self) -> Result<ReclaimStats, BalloonStatsError>;

    /// The same without residency, which is 0; takes microseconds.
    ///
    /// # Errors
    /// The machine has gone.
    fn balloon_figures(&self) -> Result<ReclaimStats, BalloonStatsError>;

    /// What the guest makes of the reporting policy. O(1).
    fn reporting_policy(&self) -> PolicySight;

    /// Whether reporting is at work; waits for a pause until `deadline`.
    ///
    /// # Errors
    /// No balloon.
    fn reporting(&self, deadline: Instant) -> Result<ReportingStatus, BalloonStatsError>;

    /// Devices by id.
    fn device_tree(&self) -> BTreeMap<String, DeviceNode>;
}

impl Machine for Vm {
    type Observer = VmObserver;

    fn new(config: &mut VmConfig, context: &VmContext) -> Result<Self, VmError> {
        Vm::new(config, context)
    }

    fn boot(&mut self) -> Result<(), VmError> {
        Vm::boot(self)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Vm::pause(self)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Vm::resume(self)
    }

    fn shutdown(self) -> Result<(), VmError> {
        Vm::shutdown(self)
    }

    fn power_button(&self) -> Result<(), VmError> {
        Vm::power_button(self)
    }

    fn resize_balloon(&self, bytes: u64) -> Result<(), VmError> {
        Vm::resize_balloon(self, bytes)
    }

    fn resize_memory(&self, hotplugged_bytes: u64) -> Result<(), VmError> {
        Vm::resize_memory(self, hotplugged_bytes)
    }

    fn balloon_hinting(&self, action: HintingAction) -> Result<(), VmError> {
        Vm::balloon_hinting(self, action)
    }

    fn add_device(&mut self, device: &mut NewDevice) -> Result<PciDeviceInfo, VmError> {
        Vm::add_device(self, device)
    }

    fn remove_device(&mut self, id: &str) -> Result<(), VmError> {
        Vm::remove_device(self, id)
    }

    fn take_ejected(&mut self) -> Vec<PciDeviceInfo> {
        Vm::take_ejected(self)
    }

    fn balloon_reporting(&self, request: VmBalloonReporting) -> Result<(), VmError> {
        Vm::balloon_reporting(self, request)
    }

    fn set_reporting_policy(&self, policy: ReportingPolicy) {
        Vm::set_reporting_policy(self, policy);
    }

    fn observer(&self) -> VmObserver {
        Vm::observer(self)
    }
}

impl MachineObserver for VmObserver {
    fn memory_actual_size_bytes(&self) -> u64 {
        VmObserver::memory_actual_size_bytes(self)
    }

    fn counters(&self) -> VmCounters {
        VmObserver::counters(self)
    }

    fn balloon_stats(&self, deadline: Instant) -> Result<BalloonStatsResponse, BalloonStatsError> {
        VmObserver::balloon_stats(self, deadline)
    }

    fn reclaim_stats(&self) -> Result<ReclaimStats, BalloonStatsError> {
        VmObserver::reclaim_stats(self)
    }

    fn balloon_figures(&self) -> Result<ReclaimStats, BalloonStatsError> {
        VmObserver::balloon_figures(self)
    }

    fn reporting_policy(&self) -> PolicySight {
        VmObserver::reporting_policy(self)
    }

    fn reporting(&self, deadline: Instant) -> Result<ReportingStatus, BalloonStatsError> {
        VmObserver::reporting(self, deadline)
    }

    fn device_tree(&self) -> BTreeMap<String, DeviceNode> {
        VmObserver::device_tree(self)
    }
}
