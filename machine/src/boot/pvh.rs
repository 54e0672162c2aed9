//! PVH start info. The entry point receives its address in RBX (Xen's `public/arch-x86/hvm/start_info.h`).

use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::BootError;
use super::loaded::BootData;
use crate::memory::layout::{PAGE_BYTES, PVH_INFO_START, PVH_MEMMAP_START, PVH_MODLIST_START};

/// `XEN_HVM_START_MAGIC_VALUE`
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// Version 1 includes the memory map.
const START_INFO_VERSION: u32 = 1;
/// Maximum number of entries in the map's page; at most four are used.
const MEMMAP_ENTRIES_MAX: usize = PAGE_BYTES as usize / size_of::<hvm_memmap_table_entry>();

/// Writes start info, module list and memory map.
pub(super) fn write(ram: &GuestMemoryMmap<()>, data: &BootData) -> Result<(), BootError> {
    assert!(
        data.e820.len() <= MEMMAP_ENTRIES_MAX,
        "the memory map outgrew its page"
    );
    let mut info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: START_INFO_VERSION,
        cmdline_paddr: data.cmdline_address,
        rsdp_paddr: data.rsdp_address,
        memmap_paddr: PVH_MEMMAP_START,
        memmap_entries: data.e820.len() as u32,
        ..Default::default()
    };
    if let Some(initramfs) = &data.initramfs {
        info.nr_modules = 1;
        info.modlist_paddr = PVH_MODLIST_START;
        let module = hvm_modlist_entry {
            paddr: initramfs.start,
            size: initramfs.end - initramfs.start,
            ..Default::default()
        };
        ram.write_obj(module, GuestAddress(PVH_MODLIST_START))
            .map_err(write_error("the PVH module list"))?;
    }
    let mut address = PVH_MEMMAP_START;
    for entry in &data.e820 {
        let line = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.bytes,
            type_: entry.kind as u32,
            reserved: 0,
        };
        ram.write_obj(line, GuestAddress(address))
            .map_err(write_error("the PVH memory map"))?;
        address += size_of::<hvm_memmap_table_entry>() as u64;
    }
    ram.write_obj(info, GuestAddress(PVH_INFO_START))
        .map_err(write_error("the PVH start info"))
}

fn write_error(what: &'static str) -> impl Fn(vm_memory::GuestMemoryError) -> BootError {
    move |source| BootError::Write { what, source }
}
