//! Tests partial discards of this host's transparent huge pages.
#![allow(unsafe_code)]
// UNSAFETY: `madvise` has no safe wrapper.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use test_skip::skip;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap};

use crate::device::GuestRam;
use crate::reclaim::sys::{self, HostSpan};
use crate::reclaim::{DiscardEngine, Expected, GuestRange};

const PAGE: usize = 4096;
const BLOCK: usize = 2 << 20;
/// `KPF_THP` and the two parts of a compound page, of include/uapi/linux/kernel-page-flags.h.
const HUGE: u64 = 1 << 22 | 1 << 15 | 1 << 16;

/// RAM with one huge page in it.
struct HugeRam {
    ram: GuestRam,
    /// Host address of the huge page.
    start: usize,
    /// Its guest address.
    guest_start: u64,
    flags: File,
}

impl HugeRam {
    fn new() -> io::Result<Self> {
        let region = MmapRegionBuilder::new(2 * BLOCK)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(io::Error::other)?;
        let host = region.as_ptr() as usize;
        // SAFETY: the range is the whole mapping, and the advice changes no content.
        unsafe { libc::madvise(region.as_ptr().cast(), 2 * BLOCK, libc::MADV_HUGEPAGE) };
        let region = GuestRegionMmap::new(region, GuestAddress(0)).expect("4 MiB are addresses");
        let ram = GuestRam::new(GuestMemoryMmap::from_regions(vec![region]).expect("one region"));
        let start = host.next_multiple_of(BLOCK);
        let guest_start = (start - host) as u64;
        let data = vec![7; BLOCK];
        let written = ram.memory().write_slice(&data, GuestAddress(guest_start));
        written.map_err(io::Error::other)?;
        let found = Self {
            ram,
            start,
            guest_start,
            flags: File::open("/proc/kpageflags")?,
        };
        match found.is_huge(1)? {
            true => Ok(found),
            false => Err(io::Error::other("the kernel made no huge page")),
        }
    }

    /// Whether this page of the block belongs to a huge page.
    fn is_huge(&self, page: usize) -> io::Result<bool> {
        let entry = |file: &File, number: usize| {
            let mut entry = [0; 8];
            file.read_exact_at(&mut entry, 8 * number as u64)?;
            io::Result::Ok(u64::from_le_bytes(entry))
        };
        let map = File::open("/proc/self/pagemap")?;
        let frame = entry(&map, self.start / PAGE + page)? & ((1 << 55) - 1);
        if frame == 0 {
            return Err(io::Error::other("this user may not see frame numbers"));
        }
        Ok(entry(&self.flags, frame as usize)? & HUGE != 0)
    }
}

#[test]
fn huge_page_that_is_discarded_in_part_is_split_and_the_rest_stays() {
    let make = HugeRam::new;
    let (plain, first, second) = match (make(), make(), make()) {
        (Ok(plain), Ok(first), Ok(second)) => (plain, first, second),
        (Err(error), _, _) | (_, Err(error), _) | (_, _, Err(error)) => {
            skip(format!("no huge page can be observed here: {error}"));
            return;
        }
    };
    // This is what the kernel does on its own.
    let span = HostSpan {
        start: plain.start + 3 * PAGE,
        bytes: PAGE,
    };
    // SAFETY: a page of this test's own RAM.
    unsafe { sys::discard_span(span) }.unwrap();
    assert!(plain.is_huge(2).unwrap(), "the kernel has split it at once");
    let engines = [
        (first, DiscardEngine::new(Arc::default())),
        (second, DiscardEngine::without_vectors(Arc::default())),
    ];
    for (huge, mut engine) in engines {
        let claim = GuestRange {
            start: huge.guest_start + 3 * PAGE as u64,
            bytes: PAGE as u64,
        };
        let outcome = engine.discard(&huge.ram, &mut [claim], Expected::Zeros);
        assert_eq!(outcome.partial_bytes, PAGE as u64);
        assert_eq!(
            (outcome.discarded.bytes, outcome.syscalls),
            (PAGE as u64, 1)
        );
        for page in [0, 2, 4, 511] {
            assert!(!huge.is_huge(page).unwrap(), "page {page}");
            let at = GuestAddress(huge.guest_start + (page * PAGE) as u64);
            assert_eq!(huge.ram.memory().read_obj::<u8>(at).unwrap(), 7);
        }
    }
}
