//! Why a machine could not be built or steered.

use std::error::Error;

use crate::acpi::AcpiError;
use crate::boot::BootError;
use crate::bus::BusError;
use crate::cpu::CpuError;
use crate::memory::MemoryError;
use crate::pci::PciError;
use crate::serial::SerialError;

/// Each variant names the part of the machine; the cause says the rest.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The configuration has no balloon.
    #[error("Missing virtio-balloon, can't proceed as expected")]
    MissingBalloon,
    /// The guest cannot have so much memory.
    #[error("The size of RAM cannot be changed so")]
    MemoryResize(#[source] virtio_devices::mem::ResizeError),
    /// The configuration gives no memory to be plugged in.
    #[error("Missing virtio-mem, can't proceed as expected")]
    MissingMem,
    /// A run of hinting cannot be started or stopped.
    #[error("The balloon does not take it")]
    Hinting(#[source] virtio_devices::balloon::HintingError),
    /// A device cannot come or go.
    #[error(transparent)]
    Hotplug(super::HotplugError),
    /// Reporting cannot be steered so.
    #[error("The balloon does not take it")]
    Reporting(#[source] virtio_devices::balloon::policy::ControlError),
    /// KVM itself.
    #[error("Cannot create a virtual machine with KVM")]
    Kvm(#[source] hypervisor::Error),
    /// Guest RAM.
    #[error("Cannot create guest memory")]
    Memory(#[source] MemoryError),
    /// Residency of guest RAM cannot be measured.
    #[error("Cannot measure the residency of guest memory")]
    Residency(#[source] virtio_devices::reclaim::ResidencyError),
    /// vCPUs.
    #[error("Cannot manage the vCPUs")]
    Cpu(#[source] CpuError),
    /// Two of our own devices claim one address.
    #[error("Cannot lay out the machine's devices")]
    Bus(#[source] BusError),
    /// The PCI bus.
    #[error("Cannot create the PCI bus")]
    Pci(#[source] PciError),
    /// A console or the serial port.
    #[error("Cannot create console device {id}")]
    Console {
        /// The device.
        id: String,
        /// Why.
        #[source]
        source: SerialError,
    },
    /// A virtio device.
    #[error("Cannot create device {id}")]
    Device {
        /// The device.
        id: String,
        /// What it said.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// Kernel, firmware, initramfs or command line.
    #[error("Cannot load the payload")]
    Payload(#[source] BootError),
    /// ACPI tables.
    #[error("Cannot write the ACPI tables")]
    Acpi(#[source] AcpiError),
    /// The power button's interrupt.
    #[error("Cannot press the power button")]
    PowerButton(#[source] std::io::Error),
}
