//! One virtual machine: built from a checked configuration, booted, paused, shut down.
//!
//! Owned by the control thread alone. What other threads may read of a running
//! machine goes through [`VmObserver`], which never waits for the control
//! thread and, but for one call that says so, never for the guest.

mod build;
mod consoles;
mod devices;
mod error;
mod hotplug;
mod network;
mod observer;
mod reclaim_report;
mod reporting;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::Arc;

use api::config::PlatformConfig;
use api::{HintingAction, ReportingPolicy, VmBalloonReporting, VmConfig};
use machine::boot::Payload;
use machine::events::DeviceEvent;
use machine::pc::{Pc, PcContext};
use machine::signals::VmSignals;
use virtio_devices::balloon::BalloonHandle;
use virtio_devices::mem::MemHandle;

pub use consoles::Consoles;
pub use error::VmError;
pub use hotplug::HotplugError;
use observer::OwnObserver;
pub use observer::{BalloonStatsError, VmObserver};

use crate::events::EventSink;
use crate::threads::{ThreadKind, ThreadStart};

/// What a machine needs from the program around it.
#[derive(Clone)]
pub struct VmContext {
    /// The way back to the control thread.
    pub signals: Arc<VmSignals>,
    /// Seccomp hook for every thread.
    pub thread_start: ThreadStart,
    /// Event monitor.
    pub events: EventSink,
    /// What the serial port and the console are connected to; kept over reboots.
    pub consoles: Arc<Consoles>,
}

impl fmt::Debug for VmContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmContext")
            .field("signals", &self.signals)
            .finish_non_exhaustive()
    }
}

impl VmContext {
    /// Signals that are not raised, and no consoles yet.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new(thread_start: ThreadStart, events: EventSink) -> io::Result<Self> {
        Ok(Self {
            signals: Arc::new(VmSignals::new()?),
            thread_start,
            events,
            consoles: Arc::default(),
        })
    }

    /// What the machine itself gets of it.
    fn of_machine(&self) -> PcContext {
        let events = Arc::clone(&self.events);
        PcContext {
            signals: Arc::clone(&self.signals),
            thread_start: self.start_of_machine_threads(),
            events: Arc::new(move |event| {
                let (event, id) = match event {
                    DeviceEvent::Activated(id) => ("activated", id),
                    DeviceEvent::Reset(id) => ("reset", id),
                };
                events("virtio-device", event, &[("id", id.to_owned())]);
            }),
        }
    }

    fn start_of_machine_threads(&self) -> machine::threads::ThreadStart {
        let thread_start = Arc::clone(&self.thread_start);
        Arc::new(move |thread| thread_start(ThreadKind::Machine(thread)))
    }
}

/// One virtual machine. Dropping it stops everything it started.
#[derive(Debug)]
pub struct Vm {
    /// First, so that nobody touches guest RAM when the others go.
    pc: Pc,
    /// In guest RAM, until boot tells it about the machine.
    payload: Payload,
    platform: Option<PlatformConfig>,
    balloon: Option<BalloonHandle>,
    /// Plugs memory in, if any can be.
    mem: Option<MemHandle>,
    observer: OwnObserver,
}

impl Vm {
    /// Opens everything a validated configuration names, loads the payload, and creates
    /// memory, vCPUs and devices. On an error nothing is left behind.
    ///
    /// `config` is changed where creation decides something: the path of a
    /// pseudo-terminal, the name of a tap.
    ///
    /// # Errors
    /// Whatever part could not be made, with its cause.
    pub fn new(config: &mut VmConfig, context: &VmContext) -> Result<Self, VmError> {
        build::build(config, context)
    }

    /// Starts the vCPUs.
    ///
    /// # Errors
    /// A vCPU cannot be set up.
    pub fn boot(&mut self) -> Result<(), VmError> {
        self.pc
            .boot(&self.payload, self.platform.as_ref())
            .map_err(VmError::Pc)
    }

    /// Stops vCPUs and device workers; returns when guest memory stands still.
    ///
    /// # Errors
    /// A vCPU did not stop within its deadline; the machine runs on then.
    pub fn pause(&mut self) -> Result<(), VmError> {
        self.pc.pause().map_err(VmError::Pc)
    }

    /// Undoes [`Vm::pause`].
    ///
    /// # Errors
    /// A vCPU could not be resumed.
    pub fn resume(&mut self) -> Result<(), VmError> {
        self.pc.resume().map_err(VmError::Pc)
    }

    /// Stops everything and gives all resources back.
    ///
    /// # Errors
    /// A vCPU did not end within its deadline.
    pub fn shutdown(mut self) -> Result<(), VmError> {
        self.pc.shutdown().map_err(VmError::Pc)
    }

    /// Presses the ACPI power button.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn power_button(&self) -> Result<(), VmError> {
        self.pc.power_button().map_err(VmError::Pc)
    }

    /// Sets the balloon's target in bytes and returns at once.
    ///
    /// # Errors
    /// [`VmError::MissingBalloon`].
    pub fn resize_balloon(&self, bytes: u64) -> Result<(), VmError> {
        let balloon = self.balloon.as_ref().ok_or(VmError::MissingBalloon)?;
        balloon.set_target_bytes(bytes);
        Ok(())
    }

    /// Sets how much memory the guest shall have plugged in, beyond what it booted with, and returns at once.
    ///
    /// # Errors
    /// [`VmError::MissingMem`], or [`VmError::MemoryResize`] with the reason.
    pub fn resize_memory(&self, hotplugged_bytes: u64) -> Result<(), VmError> {
        let mem = self.mem.as_ref().ok_or(VmError::MissingMem)?;
        mem.set_requested_bytes(hotplugged_bytes)
            .map_err(VmError::MemoryResize)
    }

    /// Starts or ends a run of free page hinting and returns at once.
    ///
    /// # Errors
    /// [`VmError::MissingBalloon`], or [`VmError::Hinting`] with the reason.
    pub fn balloon_hinting(&self, action: HintingAction) -> Result<(), VmError> {
        let balloon = self.balloon.as_ref().ok_or(VmError::MissingBalloon)?;
        match action {
            HintingAction::Start => balloon.start_hinting().map(drop),
            HintingAction::Stop => balloon.stop_hinting(),
        }
        .map_err(VmError::Hinting)
    }

    /// Pauses or resumes reporting, or asks for a report of everything; returns at once. Whether a pause is one
    /// is for [`VmObserver::reporting`] to wait for.
    ///
    /// # Errors
    /// [`VmError::MissingBalloon`], or [`VmError::Reporting`] with the reason.
    pub fn balloon_reporting(&self, request: VmBalloonReporting) -> Result<(), VmError> {
        let balloon = self.balloon.as_ref().ok_or(VmError::MissingBalloon)?;
        reporting::steer(balloon, request).map_err(VmError::Reporting)
    }

    /// Tells the guest how to report, if there is a balloon and its driver takes a policy; returns at once.
    pub fn set_reporting_policy(&self, policy: ReportingPolicy) {
        if let Some(balloon) = &self.balloon {
            balloon.set_reporting_policy(policy);
        }
    }

    /// What other threads may look at.
    pub fn observer(&self) -> VmObserver {
        self.observer.handle()
    }
}
