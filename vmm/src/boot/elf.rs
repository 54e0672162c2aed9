//! ELF images with a PVH entry point: Linux `vmlinux` and firmware.
//!
//! The loader crate copies the segments and finds the note, but tells neither a
//! truncated file from too little RAM nor a segment that would overwrite the
//! boot structures. The program headers are checked here first.

use std::mem::size_of;
use std::ops::Range;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use linux_loader::loader::{Elf, KernelLoader, PvhBootCapability};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::image::Image;
use super::payload::LoadedImage;
use super::{BootError, BootProtocol, EntryPoint};

/// Loads the image into `usable` RAM.
pub(super) fn load(
    image: &mut Image,
    ram: &GuestMemoryMmap<()>,
    usable: &Range<u64>,
) -> Result<LoadedImage, BootError> {
    let end = check_segments(image, usable)?;
    let loaded =
        Elf::load(ram, None, &mut image.file, None).map_err(|source| image.load_error(source))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::KernelMissingPvhHeader {
            path: image.path.clone(),
        });
    };
    Ok(LoadedImage {
        entry: EntryPoint {
            protocol: BootProtocol::Pvh,
            address: entry.0,
        },
        end,
        initramfs_end_max: u64::MAX,
        setup_header: None,
    })
}

/// Checks every segment against file and RAM; returns where the last one ends.
fn check_segments(image: &mut Image, usable: &Range<u64>) -> Result<u64, BootError> {
    let mut header = Elf64_Ehdr::default();
    image.read_at(0, header.as_mut_slice())?;
    let segment_bytes = size_of::<Elf64_Phdr>() as u64;
    let mut end = usable.start;
    for index in 0..u64::from(header.e_phnum) {
        let mut segment = Elf64_Phdr::default();
        let offset = header.e_phoff.saturating_add(index * segment_bytes);
        image.read_at(offset, segment.as_mut_slice())?;
        image.require(segment.p_offset, segment.p_filesz)?;
        let memory_bytes = segment.p_memsz.max(segment.p_filesz);
        if segment.p_type != PT_LOAD || memory_bytes == 0 {
            continue;
        }
        let segment_end = segment.p_paddr.saturating_add(memory_bytes);
        image.require_ram(segment.p_paddr, segment_end, usable)?;
        end = end.max(segment_end);
    }
    Ok(end)
}
