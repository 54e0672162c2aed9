//! One virtual machine: built from a checked configuration, booted, paused, shut down.
//!
//! Owned by the control thread alone. What other threads may read of a running
//! machine goes through [`VmObserver`], which never waits for the control
//! thread and, but for one call that says so, never for the guest.

mod observer;

use std::fmt;
use std::sync::Arc;

use api::VmConfig;
use vmm_sys_util::eventfd::EventFd;

pub use observer::{BalloonStatsError, VmObserver};

/// Called first on every thread the VMM starts, with the thread's name; it
/// installs the seccomp filter for that kind of thread.
pub type ThreadStart = Arc<dyn Fn(&str) + Send + Sync>;

/// Takes `(source, event, properties)` for the event monitor. Never blocks.
pub type EventSink = Arc<dyn Fn(&str, &str, &[(&str, String)]) + Send + Sync>;

/// What the machine reports back to the control thread.
#[derive(Debug)]
pub struct VmSignals {
    /// The guest powered off (ACPI S5).
    pub shutdown: EventFd,
    /// The guest asked for a reset (ACPI reset register, i8042, triple fault).
    pub reset: EventFd,
    /// A vCPU stopped on something the VMM cannot handle; the machine is lost.
    pub failed: EventFd,
}

impl VmSignals {
    /// Signals that are not raised.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new() -> std::io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self {
            shutdown: event()?,
            reset: event()?,
            failed: event()?,
        })
    }
}

/// What a machine needs from the program around it.
#[derive(Clone)]
pub struct VmContext {
    /// The way back to the control thread.
    pub signals: Arc<VmSignals>,
    /// Seccomp hook for every thread.
    pub thread_start: ThreadStart,
    /// Event monitor.
    pub events: EventSink,
}

impl fmt::Debug for VmContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmContext")
            .field("signals", &self.signals)
            .finish_non_exhaustive()
    }
}

/// Why a machine could not be built or steered.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The configuration has no balloon.
    #[error("Missing virtio-balloon, can't proceed as expected")]
    MissingBalloon,
}

/// One virtual machine. Dropping it stops everything it started.
#[derive(Debug)]
pub struct Vm {
    observer: VmObserver,
}

impl Vm {
    /// Creates memory, vCPUs and devices from a validated configuration. On an
    /// error nothing is left behind.
    ///
    /// `config` is changed where creation decides something: the path of a
    /// pseudo-terminal, the name of a tap.
    ///
    /// # Errors
    /// Whatever part could not be made, with its cause.
    pub fn new(config: &mut VmConfig, _context: &VmContext) -> Result<Self, VmError> {
        Ok(Self {
            observer: VmObserver::new(config),
        })
    }

    /// Loads the payload and starts the vCPUs.
    ///
    /// # Errors
    /// The payload cannot be loaded or a vCPU not be set up.
    pub fn boot(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Stops vCPUs and device workers; returns when guest memory stands still.
    ///
    /// # Errors
    /// A vCPU did not stop within its deadline.
    pub fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Undoes [`Vm::pause`].
    ///
    /// # Errors
    /// A vCPU could not be resumed.
    pub fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Stops everything and gives all resources back.
    ///
    /// # Errors
    /// A thread did not end within its deadline.
    pub fn shutdown(self) -> Result<(), VmError> {
        Ok(())
    }

    /// Presses the ACPI power button.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn power_button(&self) -> Result<(), VmError> {
        Ok(())
    }

    /// Sets the balloon's target in bytes and returns at once.
    ///
    /// # Errors
    /// [`VmError::MissingBalloon`].
    pub fn resize_balloon(&self, _bytes: u64) -> Result<(), VmError> {
        Err(VmError::MissingBalloon)
    }

    /// What other threads may look at.
    pub fn observer(&self) -> VmObserver {
        self.observer.clone()
    }
}
