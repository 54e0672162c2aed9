//! One virtual machine: built from a checked configuration, booted, paused, shut down.
//!
//! Owned by the control thread alone. What other threads may read of a running
//! machine goes through [`VmObserver`], which never waits for the control
//! thread and, but for one call that says so, never for the guest.

mod build;
mod chassis;
mod consoles;
mod devices;
mod error;
mod exits;
mod hotplug;
mod network;
mod observer;
mod reclaim_report;
mod reporting;

use std::fmt;
use std::sync::Arc;

use api::config::{ConsoleOutputMode, NumaConfig, PayloadConfig, PlatformConfig};
use api::{HintingAction, ReportingPolicy, VmBalloonReporting, VmConfig};
use virtio_devices::balloon::BalloonHandle;
use virtio_devices::mem::MemHandle;
use virtio_devices::pci::PciFunction;
use vm_memory::GuestAddressSpace;

pub(crate) use build::BALLOON_ID;
pub use consoles::Consoles;
pub use error::VmError;
pub use hotplug::{HotplugError, NewDevice};
pub use machine::events::EventSink;
pub use machine::signals::VmSignals;
pub use machine::threads::ThreadStart;
use observer::OwnObserver;
pub use observer::{BalloonStatsError, VmObserver};

use crate::acpi::{self, AcpiParams, NumaNode, VcpuEntry};
use crate::boot::Payload;
use crate::cpu::Vcpus;
use crate::memory::layout::{MEM_32BIT_DEVICES_BYTES, MEM_32BIT_DEVICES_START};
use crate::memory::{GuestMemory, RamSlots};
use chassis::Chassis;
use devices::Plugged;

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

/// One virtual machine. Dropping it stops everything it started.
///
/// The order of the fields is the order in which they go: first who touches
/// guest RAM, at last the RAM.
#[derive(Debug)]
pub struct Vm {
    vcpus: Vcpus,
    plugged: Vec<Plugged>,
    /// Between [`Vm::pause`] and [`Vm::resume`].
    paused: bool,
    chassis: Chassis,
    balloon: Option<BalloonHandle>,
    /// Plugs memory in, if any can be.
    mem: Option<MemHandle>,
    observer: OwnObserver,
    /// Until boot.
    launch: Launch,
    /// For devices that come later.
    context: VmContext,
    /// Held for what its drop does.
    _slots: RamSlots,
    memory: GuestMemory,
}

/// What boot needs of the configuration.
#[derive(Debug)]
struct Launch {
    payload: PayloadConfig,
    platform: Option<PlatformConfig>,
    max_vcpus: u32,
    boot_vcpus: u32,
    has_serial: bool,
    numa: Vec<NumaConfig>,
}

impl Launch {
    fn of(config: &VmConfig) -> Self {
        Self {
            payload: config.payload.clone().unwrap_or_default(),
            platform: config.platform.clone(),
            max_vcpus: config.cpus.max_vcpus,
            boot_vcpus: config.cpus.boot_vcpus,
            has_serial: config.serial.mode != ConsoleOutputMode::Off,
            numa: config.numa.clone().unwrap_or_default(),
        }
    }
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
    pub fn new(config: &mut VmConfig, context: &VmContext) -> Result<Self, VmError> {
        build::build(config, context)
    }

    /// Loads the payload and starts the vCPUs.
    ///
    /// # Errors
    /// The payload cannot be loaded or a vCPU not be set up.
    pub fn boot(&mut self) -> Result<(), VmError> {
        let payload =
            Payload::load(&self.launch.payload, &self.memory).map_err(VmError::Payload)?;
        let rsdp_address = {
            let ram = self.memory.ram().memory();
            acpi::build(&self.acpi_params(), &*ram).map_err(VmError::Acpi)?
        };
        let entry = payload
            .write_boot_data(&self.memory, self.launch.platform.as_ref(), rsdp_address)
            .map_err(VmError::Payload)?;
        self.vcpus.configure(entry).map_err(VmError::Cpu)?;
        self.vcpus.start().map_err(VmError::Cpu)
    }

    fn acpi_params(&self) -> AcpiParams {
        let topology = self.vcpus.topology();
        AcpiParams {
            vcpus: (0..self.launch.max_vcpus)
                .map(|index| VcpuEntry {
                    apic_id: topology.apic_id(index),
                    enabled: index < self.launch.boot_vcpus,
                })
                .collect(),
            pci_mmio32: MEM_32BIT_DEVICES_START..MEM_32BIT_DEVICES_START + MEM_32BIT_DEVICES_BYTES,
            pci_mmio64: self.memory.map().devices_64bit.clone(),
            ged_address: self.chassis.ged_address,
            pci_hotplug_address: self.chassis.pci_hotplug_address,
            has_serial: self.launch.has_serial,
            numa: self.numa_nodes(),
        }
    }

    fn numa_nodes(&self) -> Vec<NumaNode> {
        let topology = self.vcpus.topology();
        let nodes = self.launch.numa.iter().map(|node| {
            let names = node.memory_zones.as_deref().unwrap_or_default();
            let zones = self.memory.zones().iter();
            let distances = node.distances.iter().flatten();
            NumaNode {
                domain: node.guest_numa_id,
                apic_ids: node
                    .cpus
                    .iter()
                    .flatten()
                    .map(|vcpu| topology.apic_id(*vcpu))
                    .collect(),
                ram: zones
                    .filter(|zone| names.contains(&zone.id))
                    .flat_map(|zone| zone.ranges.clone())
                    .collect(),
                distances: distances
                    .map(|distance| (distance.destination, distance.distance))
                    .collect(),
            }
        });
        nodes.collect()
    }

    /// Stops vCPUs and device workers; returns when guest memory stands still.
    ///
    /// # Errors
    /// A vCPU did not stop within its deadline; the machine runs on then.
    pub fn pause(&mut self) -> Result<(), VmError> {
        self.vcpus.pause().map_err(VmError::Cpu)?;
        for plugged in &self.plugged {
            plugged.function.pause();
        }
        self.paused = true;
        Ok(())
    }

    /// Undoes [`Vm::pause`].
    ///
    /// # Errors
    /// A vCPU could not be resumed.
    pub fn resume(&mut self) -> Result<(), VmError> {
        self.paused = false;
        for plugged in &self.plugged {
            plugged.function.resume();
        }
        self.vcpus.resume().map_err(VmError::Cpu)
    }

    /// Stops everything and gives all resources back.
    ///
    /// # Errors
    /// A vCPU did not end within its deadline.
    pub fn shutdown(mut self) -> Result<(), VmError> {
        self.vcpus.stop().map_err(VmError::Cpu)
    }

    /// Presses the ACPI power button.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn power_button(&self) -> Result<(), VmError> {
        self.chassis
            .ged
            .press_power_button()
            .map_err(VmError::PowerButton)
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
            balloon.set_reporting_policy(reporting::settings(policy));
        }
    }

    /// What other threads may look at.
    pub fn observer(&self) -> VmObserver {
        self.observer.handle()
    }
}
