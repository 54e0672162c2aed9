//! ELF images with a PVH entry point: Linux `vmlinux` and firmware.
//!
//! The loader crate copies the segments and finds the note. It does not distinguish a truncated file from too little
//! RAM, and it does not detect a segment that would overwrite the boot structures. So the program headers are checked
//! here first.

use std::mem::size_of;
use std::ops::Range;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use linux_loader::loader::{Elf, KernelLoader, PvhBootCapability};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::image::Image;
use super::loaded::LoadedImage;
use super::{BootError, BootProtocol, EntryPoint};

/// Number of the note that holds the entry point (Xen's `XEN_ELFNOTE_PHYS32_ENTRY`), and its owner.
const PVH_NOTE_TYPE: u32 = 18;
const PVH_NOTE_OWNER: &[u8] = b"Xen\0";
/// Maximum number of bytes of notes to search; Linux has less than a KiB of them.
const NOTES_MAX_BYTES: u64 = 64 << 10;
/// Name size, description size and type, each 4 bytes.
const NOTE_HEADER_BYTES: usize = 12;

/// Loads the image into `usable` RAM.
pub(super) fn load(
    image: &mut Image,
    ram: &GuestMemoryMmap<()>,
    usable: &Range<u64>,
) -> Result<LoadedImage, BootError> {
    let missing_note = |image: &Image| BootError::KernelMissingPvhHeader {
        path: image.path.clone(),
    };
    let segments = segments(image)?;
    // Checked first: the addresses of a program without the note are irrelevant.
    if !has_pvh_note(image, &segments)? {
        return Err(missing_note(image));
    }
    let end = check_segments(image, &segments, usable)?;
    let loaded =
        Elf::load(ram, None, &mut image.file, None).map_err(|source| image.load_error(source))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(missing_note(image));
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

/// Reads the program headers: 65 535 at most.
fn segments(image: &mut Image) -> Result<Vec<Elf64_Phdr>, BootError> {
    let mut header = Elf64_Ehdr::default();
    image.read_at(0, header.as_mut_slice())?;
    let segment_bytes = size_of::<Elf64_Phdr>() as u64;
    (0..u64::from(header.e_phnum))
        .map(|index| {
            let mut segment = Elf64_Phdr::default();
            let offset = header.e_phoff.saturating_add(index * segment_bytes);
            image.read_at(offset, segment.as_mut_slice())?;
            image.require(segment.p_offset, segment.p_filesz)?;
            Ok(segment)
        })
        .collect()
}

fn has_pvh_note(image: &mut Image, segments: &[Elf64_Phdr]) -> Result<bool, BootError> {
    for segment in segments.iter().filter(|segment| segment.p_type == PT_NOTE) {
        let mut notes = vec![0; segment.p_filesz.min(NOTES_MAX_BYTES) as usize];
        image.read_at(segment.p_offset, &mut notes)?;
        if lists_pvh_note(&notes) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Iterates over notes, each a header, the owner and a description, padded to 4 bytes.
fn lists_pvh_note(mut notes: &[u8]) -> bool {
    while let Some((header, rest)) = notes.split_first_chunk::<NOTE_HEADER_BYTES>() {
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let owner_bytes = word(0) as usize;
        if word(8) == PVH_NOTE_TYPE && rest.get(..owner_bytes) == Some(PVH_NOTE_OWNER) {
            return true;
        }
        let bytes = owner_bytes.next_multiple_of(4) + (word(4) as usize).next_multiple_of(4);
        notes = rest.get(bytes..).unwrap_or_default();
    }
    false
}

/// Checks every segment against RAM; returns the end of the last one.
fn check_segments(
    image: &Image,
    segments: &[Elf64_Phdr],
    usable: &Range<u64>,
) -> Result<u64, BootError> {
    let mut end = usable.start;
    for segment in segments {
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
