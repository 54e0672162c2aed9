//! The zero page of the Linux boot protocol: the setup header, completed, and the memory map.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::BootError;
use super::loaded::BootData;
use crate::memory::layout::ZERO_PAGE_START;

/// `type_of_loader` of loaders without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the zero page.
pub(super) fn write(
    ram: &GuestMemoryMmap<()>,
    header: &setup_header,
    data: &BootData,
) -> Result<(), BootError> {
    ram.write_obj(zero_page(header, data), GuestAddress(ZERO_PAGE_START))
        .map_err(|source| BootError::Write {
            what: "the zero page",
            source,
        })
}

fn zero_page(header: &setup_header, data: &BootData) -> boot_params {
    let mut params = boot_params {
        hdr: *header,
        acpi_rsdp_addr: data.rsdp_address,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    // The address fits, because it is below 1 MiB. The initramfs fits likewise: it is below 3 GiB.
    params.hdr.cmd_line_ptr = data.cmdline_address as u32;
    if let Some(initramfs) = &data.initramfs {
        params.hdr.ramdisk_image = initramfs.start as u32;
        params.hdr.ramdisk_size = (initramfs.end - initramfs.start) as u32;
    }
    let mut table = [boot_e820_entry::default(); 128];
    for (line, entry) in table.iter_mut().zip(&data.e820) {
        *line = boot_e820_entry {
            addr: entry.start,
            size: entry.bytes,
            r#type: entry.kind as u32,
        };
    }
    params.e820_table = table;
    params.e820_entries = data.e820.len().min(table.len()) as u8;
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::{AddressMap, CMDLINE_START, GIB, MIB};
    use crate::memory::{E820Kind, e820_map};

    #[test]
    fn zero_page_carries_what_the_kernel_asks_for() {
        let header = setup_header {
            header: 0x5372_6448,
            init_size: 0x1234,
            ..Default::default()
        };
        let data = BootData {
            e820: e820_map(&AddressMap::new(4 * GIB, 46).unwrap()),
            cmdline_address: CMDLINE_START,
            rsdp_address: 0xa_0000,
            initramfs: Some(64 * MIB..64 * MIB + 100),
        };
        let page = zero_page(&header, &data);
        let (hdr, entries, table) = (page.hdr, page.e820_entries, page.e820_table);
        assert_eq!({ hdr.init_size }, 0x1234, "the header is the kernel's own");
        assert_eq!({ hdr.type_of_loader }, 0xff);
        assert_eq!({ hdr.cmd_line_ptr }, 0x2_0000);
        assert_eq!({ hdr.ramdisk_image }, 64 << 20);
        assert_eq!({ hdr.ramdisk_size }, 100);
        assert_eq!({ page.acpi_rsdp_addr }, 0xa_0000);
        assert_eq!(entries, 4);
        assert_eq!({ table[3].addr }, 4 * GIB);
        assert_eq!({ table[2].r#type }, E820Kind::Reserved as u32);
        assert_eq!({ table[4].size }, 0);
    }
}
