//! One virtual machine: built from a checked configuration, booted, paused, shut down.
//!
//! Owned by the control thread alone. What other threads may read of a running
//! machine goes through [`VmObserver`], which never waits for the guest nor for
//! the control thread.

use std::sync::Arc;

/// What the machine reports back to the control thread, as eventfds.
#[derive(Debug)]
pub struct VmSignals {
    /// The guest powered off (ACPI S5, or the last vCPU is gone for good).
    pub shutdown: vmm_sys_util::eventfd::EventFd,
    /// The guest asked for a reset (ACPI reset register, i8042, triple fault).
    pub reset: vmm_sys_util::eventfd::EventFd,
}

/// Why a machine could not be built or steered.
#[derive(Debug, thiserror::Error)]
pub enum VmError {}

/// One virtual machine.
#[derive(Debug)]
pub struct Vm {}

/// Read-only access to a machine for API threads.
#[derive(Debug, Clone)]
pub struct VmObserver {
    _inner: Arc<()>,
}
