//! Reads big-endian fields of the headers of qcow2 and VHD.

/// Four bytes at an offset that the caller has checked.
pub(super) fn be_u32(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(value)
}

/// Eight bytes.
pub(super) fn be_u64(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(value)
}
