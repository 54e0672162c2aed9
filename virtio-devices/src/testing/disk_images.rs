//! Disk images in other formats than raw, made without QEMU.

use std::path::Path;

use super::any_device::empty_qcow2;

/// A qcow2 image without data over a raw file at an absolute path.
pub(crate) fn qcow2_over(backing: &Path, bytes: u64) -> Vec<u8> {
    const FORMAT: u32 = 0xe279_2aca;
    const NAME_AT: usize = 4096;
    let mut image = empty_qcow2(bytes);
    let name = backing.as_os_str().as_encoded_bytes();
    let mut write = |at: usize, value: &[u8]| image[at..][..value.len()].copy_from_slice(value);
    write(8, &(NAME_AT as u64).to_be_bytes());
    write(16, &(name.len() as u32).to_be_bytes());
    // The header's only extension.
    write(104, &FORMAT.to_be_bytes());
    write(108, &3_u32.to_be_bytes());
    write(112, b"raw");
    write(NAME_AT, name);
    image
}

/// The footer of a VHD for a disk of this size.
pub(crate) fn vhd_footer(disk_type: u32, bytes: u64) -> [u8; 512] {
    let mut footer = [0; 512];
    footer[..8].copy_from_slice(b"conectix");
    footer[48..56].copy_from_slice(&bytes.to_be_bytes());
    footer[60..64].copy_from_slice(&disk_type.to_be_bytes());
    let sum: u32 = footer.iter().map(|byte| u32::from(*byte)).sum();
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    footer
}
