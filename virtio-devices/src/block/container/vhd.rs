//! The footer of a fixed VHD: the file is the disk, followed by one sector that describes it.

use super::big_endian::{be_u32, be_u64};
use super::error::VhdError;
use crate::block::SECTOR_BYTES;

const CHECKSUM: std::ops::Range<usize> = 64..68;
const FIXED: u32 = 2;

/// Size of the disk in a file of `file_bytes` that ends with `footer`.
pub(in crate::block) fn fixed_disk_bytes(footer: &[u8], file_bytes: u64) -> Result<u64, VhdError> {
    let Ok(footer) = <&[u8; SECTOR_BYTES as usize]>::try_from(footer) else {
        return Err(VhdError::NotFixed);
    };
    if !footer.starts_with(b"conectix") {
        // A dynamic VHD may lack its footer; a copy of it is at the front.
        return Err(VhdError::NotFixed);
    }
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    if be_u32(footer, CHECKSUM.start) != !(sum(footer) - sum(&footer[CHECKSUM])) {
        return Err(VhdError::Damaged);
    }
    if be_u32(footer, 60) != FIXED {
        return Err(VhdError::NotFixed);
    }
    let stated = be_u64(footer, 48);
    let actual = file_bytes.saturating_sub(SECTOR_BYTES);
    match stated == actual {
        true => Ok(actual),
        false => Err(VhdError::Size { stated, actual }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::disk_images::vhd_footer as footer;

    #[test]
    fn fixed_disk_is_the_file_without_its_footer() {
        let bytes = 1 << 33;
        assert_eq!(
            fixed_disk_bytes(&footer(FIXED, bytes), bytes + 512),
            Ok(bytes)
        );
    }

    #[test]
    fn other_footers_are_rejected() {
        let bytes = 1 << 20;
        let parse = |footer: &[u8]| fixed_disk_bytes(footer, bytes + 512);
        assert_eq!(parse(&footer(3, bytes)), Err(VhdError::NotFixed));
        assert_eq!(parse(&footer(FIXED, bytes)[1..]), Err(VhdError::NotFixed));
        assert_eq!(parse(&[0; 512]), Err(VhdError::NotFixed));
        let mut damaged = footer(FIXED, bytes);
        damaged[200] ^= 1;
        assert_eq!(parse(&damaged), Err(VhdError::Damaged));
        assert_eq!(
            parse(&footer(FIXED, u64::MAX)),
            Err(VhdError::Size {
                stated: u64::MAX,
                actual: bytes
            })
        );
    }
}
