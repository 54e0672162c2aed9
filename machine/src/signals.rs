//! Signals from a machine to its owner.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// The machine's reports to the control thread.
#[derive(Debug)]
pub struct VmSignals {
    /// The guest powered off (ACPI S5).
    pub shutdown: EventFd,
    /// The guest requested a reset (ACPI reset register, i8042, triple fault).
    pub reset: EventFd,
    /// A vCPU stopped on an exit that the VMM cannot handle; the machine is lost.
    pub failed: EventFd,
    /// The host cannot provide RAM. A signal handler writes to it.
    pub memory: Arc<EventFd>,
    /// The guest released devices on request.
    pub ejected: EventFd,
}

impl VmSignals {
    /// No signal is raised yet.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new() -> std::io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self {
            shutdown: event()?,
            reset: event()?,
            failed: event()?,
            memory: Arc::new(event()?),
            ejected: event()?,
        })
    }
}
