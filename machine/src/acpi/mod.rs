//! ACPI tables, which describe the machine to the guest (ACPI 6.5).
//!
//! ```text
//! RSDP (0xa0000) ─► XSDT ─┬─► FADT ─► DSDT    power, reset, timer; devices
//!                         ├─► MADT            processors, I/O APIC
//!                         ├─► MCFG            PCI configuration space
//!                         ├─► SRAT, SLIT      NUMA nodes, if configured
//!                         └─► VIOT            devices behind the virtual IOMMU, if there is one
//! ```
//!
//! The platform is hardware-reduced: it has no fixed-feature registers, and events arrive through the generic event
//! device.

mod build;
mod cpu_hotplug;
mod dsdt;
mod fixed;
mod generation_id;
mod memory_hotplug;
mod numa;
mod params;
mod pci_hotplug;
mod table;
mod viot;

use vm_memory::GuestMemoryError;

pub use build::build;
pub use generation_id::renew_generation_id;
pub use numa::{LOCAL_DISTANCE, NumaNode, PROXIMITY_DOMAIN_MAX};
pub use params::{AcpiParams, PciSegmentEntry, VcpuEntry};
pub use viot::IommuEntry;

/// Reasons why the tables cannot be placed.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They overlap the next area.
    #[error("ACPI tables of {bytes} bytes do not fit into {max_bytes} bytes")]
    TooLarge {
        /// The required size.
        bytes: u64,
        /// The available size.
        max_bytes: u64,
    },
    /// The host has no random numbers.
    #[error("Cannot generate a VM generation identifier")]
    Random(#[source] std::io::Error),
    /// There is no guest RAM at the address.
    #[error("Cannot write ACPI data to guest memory at {address:#x}")]
    Write {
        /// Start of the data.
        address: u64,
        #[source]
        source: GuestMemoryError,
    },
}

#[cfg(test)]
mod tests;
