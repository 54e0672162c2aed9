//! The region of guest RAM that virtio-mem plugs and unplugs.

use std::ops::Range;

use crate::reclaim::GuestRange;

/// Whole blocks of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemRegion {
    start: u64,
    bytes: u64,
    block_bytes: u64,
}

/// A region that no guest could use.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{bytes} bytes of memory at {start:#x} are not whole blocks of {block_bytes} bytes, or {block_bytes} is not a power of two"
)]
pub struct RegionError {
    start: u64,
    bytes: u64,
    block_bytes: u64,
}

impl MemRegion {
    /// `bytes` from the guest address `start` on, in blocks of `block_bytes`.
    ///
    /// # Errors
    /// The block size is not a power of two, start or size are not multiples of it, or the region is empty or wraps
    /// around.
    pub fn new(start: u64, bytes: u64, block_bytes: u64) -> Result<Self, RegionError> {
        let whole = |bytes: u64| bytes.is_multiple_of(block_bytes);
        if block_bytes.is_power_of_two()
            && bytes > 0
            && whole(start)
            && whole(bytes)
            && start.checked_add(bytes).is_some()
        {
            return Ok(Self {
                start,
                bytes,
                block_bytes,
            });
        }
        Err(RegionError {
            start,
            bytes,
            block_bytes,
        })
    }

    /// Guest physical address of the first block.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Size of all blocks.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Size of a block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    pub(super) fn block_count(&self) -> u64 {
        self.bytes / self.block_bytes
    }

    /// The blocks that a driver names; `None` if they are not blocks of the region.
    pub(super) fn blocks(&self, address: u64, count: u16) -> Option<Range<u64>> {
        let offset = address.checked_sub(self.start)?;
        let first = offset / self.block_bytes;
        let exact = offset.is_multiple_of(self.block_bytes);
        let end = first.checked_add(u64::from(count))?;
        (count > 0 && exact && end <= self.block_count()).then_some(first..end)
    }

    /// Size of this many blocks of the region.
    pub(super) fn bytes_of(&self, blocks: u64) -> u64 {
        blocks * self.block_bytes
    }

    /// Guest addresses of blocks of the region.
    pub(super) fn range(&self, blocks: &Range<u64>) -> GuestRange {
        GuestRange {
            start: self.start + self.bytes_of(blocks.start),
            bytes: self.bytes_of(blocks.end - blocks.start),
        }
    }
}
