//! Reads from `/proc/self/pagemap` which pages of our mappings are present or swapped.
//!
//! Both methods walk the page tables under the read side of the memory map lock, so page faults of vCPU threads
//! continue in parallel. However, a thread that changes the map must wait for the walk, and page faults then queue
//! behind that thread. Therefore no single call walks more than a window of memory.
//!
//! * `PAGEMAP_SCAN` (Linux ≥ 6.7, Documentation/admin-guide/mm/pagemap.rst) returns ranges, and skips absent page
//!   tables and huge pages in one step: its cost is proportional to the existing page tables.
//! * Reading the file returns eight bytes per page of the range, present or not.
#![allow(unsafe_code)]
// UNSAFETY: the scan is an ioctl that takes addresses.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use super::backing::base_page_bytes;

const PATH: &str = "/proc/self/pagemap";

/// The bytes of a range by location; bytes not counted are absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MappedBytes {
    /// Mapped to a page of RAM (for the scan: other than the shared zero page).
    pub(super) present: u64,
    /// Swapped out.
    pub(super) swapped: u64,
    /// The number of system calls.
    pub(super) calls: u64,
}

/// The file of a process that will not be able to open it.
static KEPT: OnceLock<File> = OnceLock::new();

/// `/proc/self/pagemap`, opened once: it stays bound to this process's memory map.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    scans: bool,
}

impl Pagemap {
    /// # Errors
    /// The page map of this process cannot be opened.
    pub fn open() -> io::Result<Self> {
        let file = match KEPT.get() {
            Some(file) => file.try_clone()?,
            None => File::open(PATH)?,
        };
        let mut pagemap = Self { file, scans: true };
        pagemap.scans = pagemap.scan(0, 0).is_ok();
        Ok(pagemap)
    }

    /// Keeps the file open for every later [`Pagemap::open`]. A process that is not dumpable cannot open it, because
    /// it then belongs to root.
    ///
    /// # Errors
    /// The page map of this process cannot be opened.
    pub fn keep_open() -> io::Result<()> {
        let file = File::open(PATH)?;
        KEPT.get_or_init(|| file);
        Ok(())
    }

    /// Opens it as on a kernel without the scan, for tests.
    #[cfg(any(test, feature = "test-utils"))]
    pub(super) fn open_without_scan() -> io::Result<Self> {
        let file = File::open(PATH)?;
        Ok(Self { file, scans: false })
    }

    pub(super) fn scans(&self) -> bool {
        self.scans
    }

    /// The host memory of `[start, end)`; both page aligned.
    pub(super) fn mapped(&self, start: u64, end: u64) -> io::Result<MappedBytes> {
        if self.scans {
            self.scan(start, end)
        } else {
            self.read(start, end)
        }
    }

    fn scan(&self, start: u64, end: u64) -> io::Result<MappedBytes> {
        let mut held = MappedBytes::default();
        let mut regions = [PageRegion::default(); SCAN_REGIONS];
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: SCAN_REGIONS as u64,
            category_inverted: PAGE_IS_PFNZERO,
            category_mask: PAGE_IS_PFNZERO,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            ..PmScanArg::default()
        };
        loop {
            arg.end = end.min(arg.start + SCAN_WINDOW_BYTES);
            held.calls += 1;
            // SAFETY: `arg` is the structure of this request and contains its `size`; the kernel writes at most
            // `vec_len` entries to `vec`, an array of that length. Other memory is only inspected.
            let found = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            let Ok(found) = usize::try_from(found) else {
                let e = io::Error::last_os_error();
                if e.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(e);
            };
            for region in regions.iter().take(found) {
                let bytes = region.end.saturating_sub(region.start);
                if region.categories & PAGE_IS_PRESENT != 0 {
                    held.present += bytes;
                } else {
                    held.swapped += bytes;
                }
            }
            // The kernel stops before the end of the window only if the array is full. Every iteration therefore starts
            // at a higher address, and the loop ends.
            if arg.walk_end >= end || arg.walk_end <= arg.start {
                return Ok(held);
            }
            arg.start = arg.walk_end;
        }
    }

    /// Marks in `held` which pages of a private anonymous mapping, from host address `start` on, are in RAM or in swap.
    /// All other pages were never touched or were discarded, so they read as zeros. Makes no page resident.
    ///
    /// # Errors
    /// The page tables cannot be read.
    pub fn mark_held(&self, start: u64, held: &mut [bool]) -> io::Result<()> {
        let end = start + held.len() as u64 * base_page_bytes();
        let mut held = held.iter_mut();
        self.each_entry(start, end, |entry| {
            if let Some(held) = held.next() {
                *held = entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0;
            }
        })
        .map(drop)
    }

    fn read(&self, start: u64, end: u64) -> io::Result<MappedBytes> {
        let page = base_page_bytes();
        let mut held = MappedBytes::default();
        held.calls = self.each_entry(start, end, |entry| {
            if entry & ENTRY_PRESENT != 0 {
                held.present += page;
            } else if entry & ENTRY_SWAPPED != 0 {
                held.swapped += page;
            }
        })?;
        Ok(held)
    }

    /// Calls `visit` with the entry of each page of `[start, end)`. Returns the number of system calls.
    fn each_entry(&self, start: u64, end: u64, mut visit: impl FnMut(u64)) -> io::Result<u64> {
        let page = base_page_bytes();
        let mut buffer = [0_u8; READ_ENTRIES * ENTRY_BYTES];
        let (mut at, last) = (start / page, end / page);
        let mut calls = 0;
        while at < last {
            let entries = READ_ENTRIES.min(usize::try_from(last - at).unwrap_or(READ_ENTRIES));
            let window = &mut buffer[..entries * ENTRY_BYTES];
            calls += 1;
            self.file.read_exact_at(window, at * ENTRY_BYTES as u64)?;
            for entry in window.chunks_exact(ENTRY_BYTES) {
                visit(u64::from_ne_bytes(
                    entry.try_into().expect("chunks of eight"),
                ));
            }
            at += entries as u64;
        }
        Ok(calls)
    }
}

/// Memory walked by one scan call: 65 536 pages of 4 KiB, well under a millisecond.
const SCAN_WINDOW_BYTES: u64 = 256 << 20;
/// Number of ranges that one scan call returns: 12 KiB of stack, and few calls even for scattered memory.
const SCAN_REGIONS: usize = 512;
/// Number of pages that one read covers: 16 KiB of stack.
const READ_ENTRIES: usize = 2048;
const ENTRY_BYTES: usize = 8;
/// Bits of an entry of the file.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;

// Constants of the scan, from include/uapi/linux/fs.h of Linux 6.7.
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
pub(super) const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

// The request number contains the size of the structure in bits 16 to 29.
const _: () = assert!((PAGEMAP_SCAN as usize >> 16) & 0x3fff == size_of::<PmScanArg>());
