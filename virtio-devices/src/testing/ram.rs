//! Guest RAM for tests, with an allocator in place of the guest's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use crate::device::GuestRam;

/// Bytes of the first region that [`TestRam::alloc`] never hands out, so that
/// address zero stays invalid.
const RESERVED_BYTES: u64 = 0x1000;

/// Guest RAM and a bump allocator over its first region. Clones share both.
#[derive(Debug, Clone)]
pub struct TestRam {
    mem: GuestRam,
    next: Arc<AtomicU64>,
    end: u64,
}

impl TestRam {
    /// One region at 0. It is anonymous memory, so only touched pages use memory.
    pub fn new(bytes: usize) -> Self {
        Self::from_regions(&[(0, bytes)])
    }

    /// Regions as (guest address, bytes).
    pub fn from_regions(regions: &[(u64, usize)]) -> Self {
        let ranges: Vec<_> = regions
            .iter()
            .map(|(start, bytes)| (GuestAddress(*start), *bytes))
            .collect();
        let map = GuestMemoryMmap::from_ranges(&ranges).expect("test RAM can be mapped");
        let (start, bytes) = regions[0];
        Self::around(GuestRam::new(map), start, start + bytes as u64)
    }

    /// RAM that the test has mapped itself (shared, hugetlb, …). Allocations come from `start..end`, which must be
    /// inside one region.
    pub fn around(mem: GuestRam, start: u64, end: u64) -> Self {
        Self {
            mem,
            next: Arc::new(AtomicU64::new(start + RESERVED_BYTES)),
            end,
        }
    }

    /// The RAM in the form that a device receives.
    pub fn mem(&self) -> GuestRam {
        self.mem.clone()
    }

    /// Allocates `bytes` of fresh RAM, aligned to `align` (a power of two).
    pub fn alloc(&self, bytes: u64, align: u64) -> GuestAddress {
        let mut taken = 0;
        self.next
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |next| {
                taken = next.next_multiple_of(align);
                Some(taken + bytes)
            })
            .expect("the closure never declines");
        assert!(taken + bytes <= self.end, "test RAM is used up");
        GuestAddress(taken)
    }

    /// Writes bytes where the guest would.
    pub fn write(&self, address: GuestAddress, data: &[u8]) {
        self.mem
            .memory()
            .write_slice(data, address)
            .expect("address is in test RAM");
    }

    /// Reads bytes where the guest would.
    pub fn read(&self, address: GuestAddress, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.mem
            .memory()
            .read_slice(&mut data, address)
            .expect("address is in test RAM");
        data
    }
}
