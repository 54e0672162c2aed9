//! Disk images in other formats than raw, made without QEMU.

use super::qcow2::Qcow2;

/// The usual image, without data.
fn usual(bytes: u64) -> Qcow2<'static> {
    Qcow2 {
        version: 3,
        cluster_bits: 16,
        refcount_order: 4,
        disk_bytes: bytes,
        backing: None,
        clusters: &[],
    }
}

/// A qcow2 image without data.
pub(super) fn empty_qcow2(bytes: u64) -> Vec<u8> {
    usual(bytes).file()
}

/// A qcow2 image without data over a raw file at an absolute path.
#[cfg(test)]
pub(super) fn qcow2_over(backing: &std::path::Path, bytes: u64) -> Vec<u8> {
    let path = backing.to_str().expect("temporary paths are UTF-8");
    let image = Qcow2 {
        backing: Some((path, "raw")),
        ..usual(bytes)
    };
    image.file()
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
