//! Why a machine could not be built or steered.

use std::error::Error;
use std::io;

use crate::acpi::AcpiError;
use crate::boot::BootError;
use crate::bus::BusError;
use crate::cpu::CpuError;
use crate::memory::MemoryError;
use crate::pci::PciError;

/// Each variant names the part of the machine; the cause says the rest.
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
    /// Two of our own devices claim one address.
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
        /// What it said.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The guest cannot be told that a device comes or shall go.
    #[error("Cannot tell the guest of device {id}")]
    Announce {
        /// The device.
        id: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Kernel, firmware, initramfs or command line.
    #[error("Cannot load the payload")]
    Payload(#[source] BootError),
    /// ACPI tables.
    #[error("Cannot write the ACPI tables")]
    Acpi(#[source] AcpiError),
    /// The power button's interrupt.
    #[error("Cannot press the power button")]
    PowerButton(#[source] io::Error),
}

impl PcError {
    /// Whether the host cannot give what was asked for, rather than that something broke.
    pub fn is_of_configuration(&self) -> bool {
        match self {
            Self::Cpu(error) => error.is_of_configuration(),
            Self::Memory(error) => error.is_of_configuration(),
            _ => false,
        }
    }
}
