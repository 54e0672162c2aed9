//! Builds all tables and places them in guest memory.

use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::generation_id::renew_generation_id;
use super::params::AcpiParams;
use super::table::{OEM_ID, OEM_REVISION, bytes_of};
use super::{AcpiError, dsdt, fixed, numa, viot};
use crate::memory::layout;

/// Tables start at a cache line.
const TABLE_ALIGNMENT: u64 = 64;

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
        fixed::mcfg(params.segment_count()),
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
