//! The `memory` section.

use api::config::MemoryConfig;

use super::error::MemoryFault;
use crate::memory::layout::MIN_RAM_BYTES;

const PAGE_BYTES: u64 = 4 << 10;
/// The two sizes of huge pages of x86-64.
const HUGE_PAGE_BYTES: [u64; 2] = [2 << 20, 1 << 30];
/// RAM above 3 GiB goes above 4 GiB, and devices need addresses behind it: room that RAM cannot have.
const RESERVED_BYTES: u64 = 2 << 30;

pub(super) fn check(memory: &MemoryConfig, address_bits: u8) -> Result<(), MemoryFault> {
    let beyond = |bytes| MemoryFault::BeyondAddressSpace {
        bytes,
        address_bits,
    };
    let bytes = memory.total_bytes().ok_or_else(|| beyond(u64::MAX))?;
    if bytes == 0 {
        return Err(MemoryFault::Zero);
    }
    if bytes < MIN_RAM_BYTES {
        return Err(MemoryFault::TooSmall {
            bytes,
            min_bytes: MIN_RAM_BYTES,
        });
    }
    let page_bytes = page_bytes(memory)?;
    if !bytes.is_multiple_of(page_bytes) {
        return Err(MemoryFault::NotWholePages { bytes, page_bytes });
    }
    let room = 1u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX);
    if bytes > room.saturating_sub(RESERVED_BYTES) {
        return Err(beyond(bytes));
    }
    Ok(())
}

fn page_bytes(memory: &MemoryConfig) -> Result<u64, MemoryFault> {
    match (memory.hugepages, memory.hugepage_size) {
        (false, None) => Ok(PAGE_BYTES),
        (false, Some(_)) => Err(MemoryFault::HugePageSizeWithoutHugePages),
        // The host's default is at least 2 MiB.
        (true, None) => Ok(HUGE_PAGE_BYTES[0]),
        (true, Some(bytes)) if HUGE_PAGE_BYTES.contains(&bytes) => Ok(bytes),
        (true, Some(bytes)) => Err(MemoryFault::HugePageSize { bytes }),
    }
}
