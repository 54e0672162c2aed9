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

mod cpu_hotplug;
mod dsdt;
mod fixed;
mod generation_id;
mod memory_hotplug;
mod numa;
mod pci_hotplug;
mod viot;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use crate::memory::layout;
use crate::pci::WindowRanges;

pub use generation_id::renew_generation_id;
pub use numa::{LOCAL_DISTANCE, NumaNode, PROXIMITY_DOMAIN_MAX};
pub use viot::IommuEntry;

/// The platform's name in the tables.
const OEM_ID: [u8; 6] = *b"CLOUDH";
const OEM_REVISION: u32 = 1;
/// Tables start at a cache line.
const TABLE_ALIGNMENT: u64 = 64;

/// A vCPU as described to the guest, in order of its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuEntry {
    /// Local APIC id.
    pub apic_id: u32,
    /// Runs from the start; otherwise it may come online later.
    pub enabled: bool,
    /// Its NUMA node.
    pub domain: Option<u32>,
}

/// A PCI segment as described to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciSegmentEntry {
    /// The addresses of its functions' memory.
    pub windows: WindowRanges,
    /// The NUMA node to which it is assigned.
    pub domain: Option<u32>,
}

/// The properties that differ between machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiParams {
    /// Every possible vCPU.
    pub vcpus: Vec<VcpuEntry>,
    /// Every PCI segment, in order of its number.
    pub pci_segments: Vec<PciSegmentEntry>,
    /// The generic event device's register.
    pub ged_address: u64,
    /// The PCI hot-plug controller's registers.
    pub pci_hotplug_address: u64,
    /// The vCPU hot-plug controller's registers.
    pub cpu_hotplug_address: u64,
    /// The memory hotplug controller's registers, if there is one.
    pub memory_hotplug_address: Option<u64>,
    /// Whether there is a serial port.
    pub has_serial: bool,
    /// NUMA nodes; none if the machine is not divided.
    pub numa: Vec<NumaNode>,
    /// The virtual IOMMU, if there is one.
    pub iommu: Option<IommuEntry>,
}

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

/// Builds all tables and writes them and a generation identifier to guest memory; returns the address of the root
/// pointer.
///
/// # Errors
/// The tables do not fit, there is no guest RAM at their address, or the host has no random numbers.
pub fn build<M: GuestMemory>(params: &AcpiParams, memory: &M) -> Result<GuestAddress, AcpiError> {
    let mut placer = Placer::new(layout::RSDP_START + Rsdp::len() as u64);
    let dsdt = placer.place(dsdt::dsdt(params));
    let mut xsdt = XSDT::new(OEM_ID, *b"CHXSDT  ", OEM_REVISION);
    let mut tables = vec![
        fixed::fadt(dsdt),
        fixed::madt(&params.vcpus),
        fixed::mcfg(segment_count(params)),
    ];
    if !params.numa.is_empty() {
        tables.extend([numa::srat(&params.numa), numa::slit(&params.numa)]);
    }
    tables.extend(params.iommu.as_ref().map(viot::viot));
    for table in tables {
        xsdt.add_entry(placer.place(table));
    }
    let xsdt = placer.place(bytes_of(&xsdt));

    let bytes = placer.next - layout::RSDP_START;
    let max_bytes = layout::ACPI_END - layout::RSDP_START;
    if bytes > max_bytes {
        return Err(AcpiError::TooLarge { bytes, max_bytes });
    }
    placer
        .tables
        .push((layout::RSDP_START, bytes_of(&Rsdp::new(OEM_ID, xsdt))));
    for (address, table) in placer.tables {
        memory
            .write_slice(&table, GuestAddress(address))
            .map_err(|source| AcpiError::Write { address, source })?;
    }
    renew_generation_id(memory)?;
    Ok(GuestAddress(layout::RSDP_START))
}

fn segment_count(params: &AcpiParams) -> u16 {
    u16::try_from(params.pci_segments.len()).expect("segments have 16-bit numbers")
}

/// Places each table directly after the previous one.
struct Placer {
    next: u64,
    tables: Vec<(u64, Vec<u8>)>,
}

impl Placer {
    fn new(start: u64) -> Self {
        Self {
            next: start,
            tables: Vec::new(),
        }
    }

    fn place(&mut self, table: Vec<u8>) -> u64 {
        let address = self.next.next_multiple_of(TABLE_ALIGNMENT);
        self.next = address + table.len() as u64;
        self.tables.push((address, table));
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests;
