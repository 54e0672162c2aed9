//! A buffer of zeroes, for ranges that must be written.

/// Zeroes written per call where the file system cannot zero a range itself.
pub(in crate::block) const ZERO_BUFFER_BYTES: u64 = 64 << 10;

/// Aligned for direct I/O on any device.
#[repr(C, align(4096))]
struct ZeroBuffer([u8; ZERO_BUFFER_BYTES as usize]);

static ZEROES: ZeroBuffer = ZeroBuffer([0; ZERO_BUFFER_BYTES as usize]);

/// The zeroes for a [`IoOperation::WriteZeroBuffer`] of `bytes`.
pub(in crate::block) fn zeroes(bytes: u64) -> &'static [u8] {
    &ZEROES.0[..bytes.min(ZERO_BUFFER_BYTES) as usize]
}
