//! The backing of each region of guest RAM, which determines how its pages are discarded.
#![allow(unsafe_code)]
// UNSAFETY: `sysconf` has no safe wrapper among our dependencies.

use std::os::fd::{AsRawFd, RawFd};

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::sys;
use crate::file_system;

/// The content that the guest relies on in discarded memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Zeros.
    Zeros,
    /// No particular content: the guest writes before it reads, as with any memory that it allocates.
    Anything,
}

/// The kinds of mapping for guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    /// Private anonymous memory: `MADV_DONTNEED` frees it.
    AnonymousPrivate,
    /// A shared file mapping (memfd, hugetlbfs, tmpfs): the file owns the pages, so only punching a hole frees them.
    SharedFile {
        /// The descriptor of the file, valid as long as the memory map it was taken from.
        fd: RawFd,
        /// The offset of the region in the file.
        file_start: u64,
    },
    /// A private file mapping: never punched, because the VMM does not own the file. `MADV_DONTNEED` frees the pages
    /// that the guest has written, and the mapping shows the file again.
    PrivateFile,
    /// Neither clearly private nor backed by a file that can be punched.
    Unsupported,
}

/// One region as the planner sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct RegionLayout {
    pub(super) guest_start: u64,
    pub(super) bytes: u64,
    /// Address of the mapping in this process.
    pub(super) host_start: usize,
    /// Size of its backing pages; a power of two.
    pub(super) page_bytes: u64,
    pub(super) backing: Backing,
}

impl RegionLayout {
    fn of(region: &GuestRegionMmap<()>) -> Self {
        let flags = region.flags();
        let file = region.file_offset();
        let shared = flags & libc::MAP_SHARED != 0;
        let private = flags & libc::MAP_PRIVATE != 0;
        let backing = match file {
            None if private && !shared => Backing::AnonymousPrivate,
            // None of its pages can be freed except by removing the file.
            Some(file) if shared && !sys::can_punch(file.file().as_raw_fd()) => {
                Backing::Unsupported
            }
            Some(file) if shared => Backing::SharedFile {
                fd: file.file().as_raw_fd(),
                file_start: file.start(),
            },
            Some(_) if private => Backing::PrivateFile,
            _ => Backing::Unsupported,
        };
        let huge_bytes = match file {
            Some(file) => file_system::huge_page_bytes(file.file()),
            None => anonymous_huge_page_bytes(flags),
        };
        Self {
            guest_start: region.start_addr().raw_value(),
            bytes: region.len(),
            host_start: region.as_ptr() as usize,
            page_bytes: huge_bytes.unwrap_or_else(base_page_bytes),
            backing,
        }
    }

    /// Whether `MADV_DONTNEED` on the mapping frees it.
    pub(super) fn is_private(&self) -> bool {
        matches!(
            self.backing,
            Backing::AnonymousPrivate | Backing::PrivateFile
        )
    }

    /// First guest physical address after the region.
    pub(super) fn guest_end(&self) -> u64 {
        // The memory map has checked that it exists.
        self.guest_start.saturating_add(self.bytes)
    }
}

/// The regions of a memory map in ascending order.
pub(super) fn layout_of(mem: &GuestMemoryMmap<()>) -> Vec<RegionLayout> {
    mem.iter().map(RegionLayout::of).collect()
}

/// Page size of an anonymous `MAP_HUGETLB` mapping, from its flags.
fn anonymous_huge_page_bytes(flags: i32) -> Option<u64> {
    /// The largest huge page of x86-64, assumed if the flags leave the size to the system: too large a page size only
    /// causes more to be skipped.
    const LARGEST_HUGE_PAGE_BYTES: u64 = 1 << 30;
    if flags & libc::MAP_HUGETLB == 0 {
        return None;
    }
    let shift = (flags >> libc::MAP_HUGE_SHIFT) & libc::MAP_HUGE_MASK;
    Some(if shift == 0 {
        LARGEST_HUGE_PAGE_BYTES
    } else {
        1 << shift
    })
}

/// The page size of the host.
pub(super) fn base_page_bytes() -> u64 {
    // SAFETY: `sysconf` reads a constant of the system.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).expect("every Linux has a page size")
}

/// The smallest backing page among the regions that can be discarded under the guest's expectation; `None` if there is
/// no such region.
#[must_use]
pub fn smallest_reclaimable_page_bytes(
    mem: &GuestMemoryMmap<()>,
    expected: Expected,
) -> Option<u64> {
    mem.iter()
        .map(RegionLayout::of)
        .filter(|region| match region.backing {
            Backing::AnonymousPrivate | Backing::SharedFile { .. } => true,
            Backing::PrivateFile => expected == Expected::Anything,
            Backing::Unsupported => false,
        })
        .map(|region| region.page_bytes)
        .min()
}
