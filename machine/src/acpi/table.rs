//! Builds a table: the common header, then the entries.

use acpi_tables::Aml;
use acpi_tables::sdt::Sdt;

/// The platform's name in the tables.
pub(super) const OEM_ID: [u8; 6] = *b"CLOUDH";
pub(super) const OEM_REVISION: u32 = 1;
const HEADER_BYTES: u32 = 36;

/// A table with these entries; `id` is its name within the platform.
pub(super) fn table(signature: [u8; 4], revision: u8, id: [u8; 8], entries: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(signature, HEADER_BYTES, revision, OEM_ID, id, OEM_REVISION);
    table.append_slice(entries);
    table.as_slice().to_vec()
}

pub(super) fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}
