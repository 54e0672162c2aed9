//! Requests to the control thread and why they fail.

use std::fmt;
use std::os::fd::OwnedFd;

use api::{
    HintingAction, PciDeviceInfo, ReclaimThresholdsChange, VmBalloonReporting, VmConfig, VmResize,
    VmState,
};

use crate::config::{NewDevice, ValidationError};
use crate::thresholds::ThresholdError;
use crate::vm::{HotplugError, VmError};

/// Something that changes the VM.
#[derive(Debug)]
pub enum VmRequest {
    /// Store a configuration.
    Create(Box<VmConfig>),
    /// Build the machine and start it.
    Boot,
    /// Stop the machine and forget the configuration.
    Delete,
    /// Stop the machine, keep the configuration.
    Shutdown,
    /// Stop the machine and start it anew.
    Reboot,
    /// Stop the vCPUs.
    Pause,
    /// Let the vCPUs go on.
    Resume,
    /// Press the power button.
    PowerButton,
    /// Change vCPUs, RAM or balloon.
    Resize(VmResize),
    /// Change alerts or the reporting policy.
    SetReclaimThresholds(ReclaimThresholdsChange),
    /// Start or end a run of free page hinting.
    BalloonHinting(HintingAction),
    /// Add a device. A network interface takes the open taps that came with the request.
    AddDevice(Box<NewDevice>, Vec<OwnedFd>),
    /// Remove the device of this name.
    RemoveDevice(String),
    /// Pause or resume reporting, or ask for a report of everything.
    BalloonReporting(VmBalloonReporting),
    /// Stop everything and end the process.
    ShutdownVmm,
}

/// What a request that succeeded came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmAnswer {
    /// Nothing to tell.
    Done,
    /// A device was plugged into the running machine.
    Added(PciDeviceInfo),
}

/// A [`VmRequest`] without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// `vm.create`
    Create,
    /// `vm.boot`
    Boot,
    /// `vm.delete`
    Delete,
    /// `vm.shutdown`
    Shutdown,
    /// `vm.reboot`
    Reboot,
    /// `vm.pause`
    Pause,
    /// `vm.resume`
    Resume,
    /// `vm.power-button`
    PowerButton,
    /// `vm.resize`
    Resize,
    /// `PUT vm.reclaim-thresholds`
    SetReclaimThresholds,
    /// `vm.balloon-hinting`
    BalloonHinting,
    /// `vm.add-disk`
    AddDisk,
    /// `vm.add-net`
    AddNet,
    /// `vm.add-balloon`
    AddBalloon,
    /// `vm.remove-device`
    RemoveDevice,
    /// `vm.balloon-reporting`
    BalloonReporting,
    /// `vmm.shutdown`
    ShutdownVmm,
    /// `vm.info`, answered from the published view.
    Info,
    /// `vm.counters`, answered by the observer.
    Counters,
    /// `vm.balloon-stats`, answered by the observer.
    BalloonStats,
    /// `vm.reclaim-stats`, answered by the observer.
    ReclaimStats,
    /// `GET vm.reclaim-thresholds`, answered from the published view.
    ReclaimThresholds,
}

impl VmRequest {
    /// Which one it is.
    pub fn kind(&self) -> RequestKind {
        match self {
            Self::Create(_) => RequestKind::Create,
            Self::Boot => RequestKind::Boot,
            Self::Delete => RequestKind::Delete,
            Self::Shutdown => RequestKind::Shutdown,
            Self::Reboot => RequestKind::Reboot,
            Self::Pause => RequestKind::Pause,
            Self::Resume => RequestKind::Resume,
            Self::PowerButton => RequestKind::PowerButton,
            Self::Resize(_) => RequestKind::Resize,
            Self::SetReclaimThresholds(_) => RequestKind::SetReclaimThresholds,
            Self::BalloonHinting(_) => RequestKind::BalloonHinting,
            Self::AddDevice(device, _) => match **device {
                NewDevice::Disk(_) => RequestKind::AddDisk,
                NewDevice::Net(_) => RequestKind::AddNet,
                NewDevice::Balloon(_) => RequestKind::AddBalloon,
            },
            Self::RemoveDevice(_) => RequestKind::RemoveDevice,
            Self::BalloonReporting(_) => RequestKind::BalloonReporting,
            Self::ShutdownVmm => RequestKind::ShutdownVmm,
        }
    }
}

impl fmt::Display for RequestKind {
    /// What upstream says when the request failed; people match on these texts.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Create => "The VM could not be created",
            Self::Boot => "The VM could not boot",
            Self::Delete => "The VM could not be deleted",
            Self::Shutdown => "The VM could not shutdown",
            Self::Reboot => "The VM could not reboot",
            Self::Pause => "The VM could not be paused",
            Self::Resume => "The VM could not resume",
            Self::PowerButton => "Error triggering power button",
            Self::Resize => "The VM could not be resized",
            Self::SetReclaimThresholds => "The reclaim thresholds could not be changed",
            Self::BalloonHinting => "Free page hinting could not be started or stopped",
            Self::AddDisk => "The disk could not be added to the VM",
            Self::AddNet => "The network device could not be added to the VM",
            Self::AddBalloon => "The balloon could not be added to the VM",
            Self::RemoveDevice => "The device could not be removed from the VM",
            Self::BalloonReporting => "Free page reporting could not be steered",
            Self::ShutdownVmm => "The VMM could not shutdown",
            Self::Info => "The VM info is not available",
            Self::Counters => "The VM counters are not available",
            Self::BalloonStats => "The balloon statistics are not available",
            Self::ReclaimStats => "The reclaim statistics are not available",
            Self::ReclaimThresholds => "The reclaim thresholds are not available",
        })
    }
}

/// A request that failed: which one, and why.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct RequestError {
    /// Which request.
    pub kind: RequestKind,
    /// Why.
    #[source]
    pub cause: ControlError,
}

/// Why the control thread refused or failed. The first texts are upstream's.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no machine, or no configuration, where one is needed.
    #[error("VM is not created")]
    VmNotCreated,
    /// A configuration, or a machine, is there already.
    #[error("VM is already created")]
    VmAlreadyCreated,
    /// Nothing to boot.
    #[error("VM config is missing")]
    VmMissingConfig,
    /// There is no running machine.
    #[error("VM is not running")]
    VmNotRunning,
    /// The machine is not in a state from which this can be done.
    #[error("Invalid VM state transition: {from} to {to}")]
    InvalidStateTransition {
        /// The state it is in.
        from: VmState,
        /// The state that was asked for.
        to: VmState,
    },
    /// The configuration makes no sense or asks for what is not built.
    #[error("Failed to validate config")]
    ConfigValidation(#[source] ValidationError),
    /// The thresholds make no sense.
    #[error("Failed to validate thresholds")]
    Thresholds(#[source] ThresholdError),
    /// Hotplug is not built.
    #[error("The number of vCPUs of a running VM cannot be changed from {current} to {desired}")]
    VcpuHotplug {
        /// What it has.
        current: u32,
        /// What was asked for.
        desired: u32,
    },
    /// There is no room for more RAM.
    #[error("The RAM of a running VM cannot be changed from {current} to {desired} bytes")]
    MemoryHotplug {
        /// What it has.
        current: u64,
        /// What was asked for.
        desired: u64,
    },
    /// Less RAM than at boot, or more than there is room for.
    #[error("The RAM of this VM can have {least} to {most} bytes, not {desired}")]
    MemoryOutOfRange {
        /// What was asked for.
        desired: u64,
        /// What it booted with.
        least: u64,
        /// That, and all that can be plugged in.
        most: u64,
    },
    /// A device to be removed, or one in the way of a new one.
    #[error(transparent)]
    Device(HotplugError),
    /// The machine itself.
    #[error(transparent)]
    Machine(VmError),
    /// The queue is full, or the control thread has ended.
    #[error("The control thread takes no more requests")]
    QueueFull,
}
