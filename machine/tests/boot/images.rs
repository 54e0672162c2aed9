//! Kernels of a few bytes, written by hand.

/// Where the images are loaded and entered.
pub(crate) const LOAD_ADDRESS: u64 = 0x10_0000;

const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;
const NOTE_BYTES: usize = 20;
/// Offset of the code in the ELF images.
pub(crate) const ELF_CODE_OFFSET: usize = EHDR_BYTES + 2 * PHDR_BYTES + NOTE_BYTES;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`
pub(crate) const PVH_NOTE: u32 = 18;

/// A 64-bit ELF image with one loaded segment of `code` at `address` and one note of type
/// `note`, which holds `address`.
pub(crate) fn elf(code: &[u8], address: u64, note: u32) -> Vec<u8> {
    let mut image = Vec::new();
    image.extend(b"\x7fELF\x02\x01\x01");
    image.resize(16, 0);
    image.extend(2u16.to_le_bytes()); // executable
    image.extend(62u16.to_le_bytes()); // x86-64
    image.extend(1u32.to_le_bytes());
    image.extend(address.to_le_bytes()); // entry
    image.extend((EHDR_BYTES as u64).to_le_bytes()); // program headers
    image.extend(0u64.to_le_bytes());
    image.extend(0u32.to_le_bytes());
    image.extend((EHDR_BYTES as u16).to_le_bytes());
    image.extend((PHDR_BYTES as u16).to_le_bytes());
    image.extend(2u16.to_le_bytes());
    image.resize(EHDR_BYTES, 0);
    let note_offset = EHDR_BYTES + 2 * PHDR_BYTES;
    program_header(&mut image, PT_NOTE, note_offset, 0, NOTE_BYTES);
    program_header(&mut image, PT_LOAD, ELF_CODE_OFFSET, address, code.len());
    for word in [4, 4, note] {
        image.extend(word.to_le_bytes());
    }
    image.extend(b"Xen\0");
    image.extend((address as u32).to_le_bytes());
    assert_eq!(image.len(), ELF_CODE_OFFSET);
    image.extend(code);
    image
}

fn program_header(image: &mut Vec<u8>, kind: u32, offset: usize, address: u64, bytes: usize) {
    image.extend(kind.to_le_bytes());
    image.extend(7u32.to_le_bytes());
    for value in [
        offset as u64,
        address,
        address,
        bytes as u64,
        bytes as u64,
        1,
    ] {
        image.extend(value.to_le_bytes());
    }
}

/// Offset of the code in the bzImages: boot sector and one setup sector.
pub(crate) const BZIMAGE_CODE_OFFSET: usize = 2 * 512;

/// A bzImage of protocol `version` with `code` for its 32-bit entry point.
pub(crate) fn bzimage(code: &[u8], version: u16) -> Vec<u8> {
    let mut image = vec![0; BZIMAGE_CODE_OFFSET];
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    let paragraphs = code.len().div_ceil(16) as u32;
    put(0x1f1, &[1]);
    put(0x1f4, &paragraphs.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &version.to_le_bytes());
    put(0x211, &[1]); // loaded high
    put(0x214, &(LOAD_ADDRESS as u32).to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]); // relocatable
    put(0x258, &LOAD_ADDRESS.to_le_bytes()); // preferred address
    put(0x260, &0x1000u32.to_le_bytes()); // init_size
    image.extend(code);
    image.resize(BZIMAGE_CODE_OFFSET + paragraphs as usize * 16, 0);
    image
}
