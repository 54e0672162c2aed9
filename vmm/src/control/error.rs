//! Why requests to the control thread fail.

use api::{Endpoint, VmState};

use crate::config::ValidationError;
use crate::thresholds::ThresholdError;
use crate::vm::{HotplugError, VmError};

/// A request that failed: which one, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}", endpoint.failure())]
pub struct RequestError {
    /// Which request.
    pub endpoint: Endpoint,
    /// Why.
    #[source]
    pub cause: LifecycleError,
}

/// Why the control thread refused or failed. The first texts are upstream's.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
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
