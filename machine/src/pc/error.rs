//! Errors of building and controlling a machine.

use std::error::Error;
use std::io;

use state::StateError;
use virtio_devices::WorkerError;

use crate::acpi::AcpiError;
use crate::assigned::AssignError;
use crate::boot::BootError;
use crate::bus::BusError;
use crate::cpu::CpuError;
use crate::memory::{ContentError, DimmError, MemoryError};
use crate::pci::PciError;

/// Each variant names the part of the machine; the cause has the details.
#[derive(Debug, thiserror::Error)]
pub enum PcError {
    /// KVM itself.
    #[error("Cannot create a virtual machine with KVM")]
    Kvm(#[source] hypervisor::Error),
    /// Guest RAM.
    #[error("Cannot create guest memory")]
    Memory(#[source] MemoryError),
    /// vCPUs.
    #[error("Cannot manage the vCPUs")]
    Cpu(#[source] CpuError),
    /// Built-in devices use overlapping addresses.
    #[error("Cannot lay out the machine's devices")]
    Bus(#[source] BusError),
    /// The PCI bus.
    #[error("Cannot create the PCI bus")]
    Pci(#[source] PciError),
    /// A device cannot be plugged in.
    #[error("Cannot create device {id}")]
    Device {
        /// The device.
        id: String,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A device of the host.
    #[error("Cannot assign device {id}")]
    Assign {
        /// The device.
        id: String,
        #[source]
        source: AssignError,
    },
    /// The state of a device of the host is unknown.
    #[error(
        "Device {id} is assigned: remove it before the machine is saved, moved, or gets more memory"
    )]
    IsAssigned {
        /// The device.
        id: String,
    },
    /// A device does not respond.
    #[error("Cannot save device {id}")]
    DeviceState {
        /// The device.
        id: String,
        #[source]
        source: WorkerError,
    },
    /// The guest has not released a device.
    #[error(
        "Device {id} is being removed: the machine can be saved once the guest has released it"
    )]
    Leaving {
        /// The device.
        id: String,
    },
    /// A saved state that cannot be restored.
    #[error("Cannot restore the machine from its saved state")]
    State(#[source] StateError),
    /// The guest cannot be notified that a device was added or should be removed.
    #[error("Cannot notify the guest about device {id}")]
    Announce {
        /// The device.
        id: String,
        #[source]
        source: io::Error,
    },
    /// The guest has not released vCPUs.
    #[error("{count} vCPUs are being removed: try again once the guest has released them")]
    LeavingVcpus {
        /// Number of vCPUs.
        count: usize,
    },
    /// The guest cannot be notified that vCPUs were added or should be removed.
    #[error("Cannot notify the guest about its vCPUs")]
    AnnounceVcpus(#[source] io::Error),
    /// KVM rejects the routes of the restored interrupts.
    #[error("Cannot restore the routes of interrupts")]
    Routes(#[source] io::Error),
    /// The guest cannot be notified of its new generation.
    #[error("Cannot notify the guest that it was restored")]
    Generation(#[source] io::Error),
    /// A memory device cannot be added.
    #[error("Cannot change the size of RAM")]
    Grow(#[source] DimmError),
    /// The assigned devices cannot access added memory.
    #[error("Cannot add memory to a VM with an assigned device")]
    PinMemory(#[source] AssignError),
    /// The guest cannot be notified that memory was added.
    #[error("Cannot notify the guest about its memory")]
    AnnounceMemory(#[source] io::Error),
    /// A core file cannot be written.
    #[error(transparent)]
    Core(CoreError),
    /// Kernel, firmware, initramfs or command line.
    #[error("Cannot load the payload")]
    Payload(#[source] BootError),
    /// ACPI tables, or the generation identifier.
    #[error("Cannot write the ACPI data")]
    Acpi(#[source] AcpiError),
    /// The power button's interrupt.
    #[error("Cannot press the power button")]
    PowerButton(#[source] io::Error),
}

impl PcError {
    /// Whether the host cannot provide the configured machine, as opposed to an internal failure.
    pub fn is_of_configuration(&self) -> bool {
        match self {
            Self::Cpu(error) => error.is_of_configuration(),
            Self::Memory(error) | Self::Grow(DimmError::Memory(error)) => {
                error.is_of_configuration()
            }
            Self::Grow(_) | Self::PinMemory(_) | Self::Assign { .. } | Self::IsAssigned { .. } => {
                true
            }
            _ => false,
        }
    }
}

/// Reasons why a core file cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// The file.
    #[error("Cannot write the core file")]
    File(#[source] io::Error),
    /// RAM.
    #[error(transparent)]
    Content(ContentError),
}
