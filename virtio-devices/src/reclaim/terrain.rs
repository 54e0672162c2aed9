//! Guest RAM on real mappings, each region with pages of a stranger before and after it.
//!
//! For tests and fuzzing: whatever a guest makes the device do, the strangers'
//! pages must not change, and no page may end up as anything but itself or zeros.
#![allow(unsafe_code)]
// UNSAFETY: regions are put into the middle of larger mappings, and `mlock` and
// `memfd_create` have no safe wrapper among our dependencies.

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::FromRawFd;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::device::GuestRam;

/// Page size of guest and host.
pub const PAGE: usize = 4096;
/// Pages of a stranger on either side of a region.
const GUARD_PAGES: usize = 4;

/// What a region is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory.
    Anonymous,
    /// A memory file, mapped shared.
    Memfd,
    /// A file, mapped private.
    PrivateFile,
    /// A memfd whose descriptor may not punch holes.
    ReadOnlyMemfd,
}

/// One region: where the guest sees it, how long it is, what it is made of.
#[derive(Clone, Copy, Debug)]
pub struct Plot {
    /// First guest page.
    pub guest_page: u64,
    /// Length in pages.
    pub pages: usize,
    /// Backing.
    pub kind: Kind,
}

/// The RAM and, through the larger mappings, everything around it.
#[derive(Debug)]
pub struct Terrain {
    /// The regions as guest RAM.
    pub ram: GuestRam,
    plots: Vec<Plot>,
    /// Longer than the regions by the guards, and outlives them.
    outer: Vec<MmapRegion>,
}

impl Terrain {
    /// Maps the plots, which are in ascending order, and fills every page with its pattern.
    ///
    /// # Panics
    /// They cannot be mapped.
    #[must_use]
    pub fn new(plots: &[Plot]) -> Self {
        let mut outer = Vec::new();
        let mut regions = Vec::new();
        for plot in plots {
            let (mapping, region) = map(*plot);
            outer.push(mapping);
            regions.push(region);
        }
        let mem = GuestMemoryMmap::from_regions(regions).expect("plots are in ascending order");
        let terrain = Self {
            ram: GuestRam::new(mem),
            plots: plots.to_vec(),
            outer,
        };
        terrain.fill();
        terrain
    }

    fn fill(&self) {
        for (plot, outer) in self.outer.iter().enumerate() {
            fill_pages(plot, outer, 0..outer.size() / PAGE);
        }
    }

    /// Gives every page of the regions its pattern again.
    pub fn refill(&self) {
        for (at, outer) in self.outer.iter().enumerate() {
            let inside = GUARD_PAGES..GUARD_PAGES + self.plots[at].pages;
            fill_pages(at, outer, inside);
        }
    }

    /// Pages, by plot and position in it, that are all zeros.
    ///
    /// # Panics
    /// At a page that is neither zeros nor its pattern, and at a stranger's page
    /// that changed.
    #[must_use]
    pub fn zeroed(&self) -> Vec<(usize, usize)> {
        let mut zeroed = Vec::new();
        for (at, outer) in self.outer.iter().enumerate() {
            let inside = GUARD_PAGES..GUARD_PAGES + self.plots[at].pages;
            for page in 0..outer.size() / PAGE {
                let bytes = page_of(outer, page);
                if bytes.iter().all(|byte| *byte == 0) {
                    assert!(
                        inside.contains(&page),
                        "guard page {page} of plot {at} is gone"
                    );
                    zeroed.push((at, page - GUARD_PAGES));
                } else {
                    let whole = bytes.iter().all(|byte| *byte == pattern(at, page));
                    assert!(whole, "page {page} of plot {at} is damaged");
                }
            }
        }
        zeroed
    }

    /// Looks at the strangers' pages alone.
    ///
    /// # Panics
    /// One of them has changed.
    pub fn check_guards(&self) {
        for (at, outer) in self.outer.iter().enumerate() {
            let inside = GUARD_PAGES..GUARD_PAGES + self.plots[at].pages;
            for page in (0..outer.size() / PAGE).filter(|page| !inside.contains(page)) {
                let bytes = page_of(outer, page);
                let whole = bytes.iter().all(|byte| *byte == pattern(at, page));
                assert!(whole, "guard page {page} of plot {at} has changed");
            }
        }
    }

    /// Pins a page, so that the kernel refuses to discard it.
    ///
    /// # Panics
    /// The kernel refuses to pin it.
    pub fn lock_page(&self, plot: usize, page: usize) {
        let start = self.outer[plot]
            .as_ptr()
            .wrapping_add((GUARD_PAGES + page) * PAGE);
        // SAFETY: the page lies inside the mapping; nothing changes in it.
        let ret = unsafe { libc::mlock(start.cast::<c_void>(), PAGE) };
        assert_eq!(ret, 0, "a page can be locked");
    }

    /// Reads one byte of a page, which maps it.
    #[must_use]
    pub fn touch_for_reading(&self, plot: usize, page: usize) -> u8 {
        let start = self.outer[plot]
            .as_ptr()
            .wrapping_add((GUARD_PAGES + page) * PAGE);
        // SAFETY: the page lies inside the mapping, which is readable.
        unsafe { start.read_volatile() }
    }
}

fn fill_pages(plot: usize, outer: &MmapRegion, pages: std::ops::Range<usize>) {
    assert!(pages.end * PAGE <= outer.size());
    for page in pages {
        // SAFETY: the page lies inside the mapping, as just checked, and is writable.
        unsafe {
            let start = outer.as_ptr().add(page * PAGE);
            start.write_bytes(pattern(plot, page), PAGE);
        }
    }
}

fn page_of(outer: &MmapRegion, page: usize) -> [u8; PAGE] {
    assert!((page + 1) * PAGE <= outer.size());
    let mut bytes = [0_u8; PAGE];
    // SAFETY: the page lies inside the mapping, as just checked, and is readable.
    unsafe {
        let start = outer.as_ptr().add(page * PAGE);
        start.copy_to_nonoverlapping(bytes.as_mut_ptr(), PAGE);
    }
    bytes
}

fn pattern(plot: usize, page: usize) -> u8 {
    // Never zero.
    (page * 7 + plot * 31) as u8 | 1
}

fn map(plot: Plot) -> (MmapRegion, GuestRegionMmap) {
    let bytes = (plot.pages + 2 * GUARD_PAGES) * PAGE;
    let flags = match plot.kind {
        Kind::Anonymous => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        Kind::Memfd | Kind::ReadOnlyMemfd => libc::MAP_SHARED,
        Kind::PrivateFile => libc::MAP_PRIVATE,
    };
    let file = (plot.kind != Kind::Anonymous).then(|| memfd(bytes));
    let mut outer = MmapRegionBuilder::new(bytes)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags);
    if let Some(file) = &file {
        outer = outer.with_file_offset(FileOffset::new(
            file.try_clone().expect("descriptors are to be had"),
            0,
        ));
    }
    let outer = outer.build().expect("memory can be mapped");
    let inner_start = outer.as_ptr().wrapping_add(GUARD_PAGES * PAGE);
    // SAFETY: the range lies inside `outer`, which the terrain keeps.
    let inner =
        unsafe { MmapRegionBuilder::new(plot.pages * PAGE).with_raw_mmap_pointer(inner_start) };
    let mut inner = inner
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags);
    if let Some(file) = file {
        let file = if plot.kind == Kind::ReadOnlyMemfd {
            reopen_for_reading(&file)
        } else {
            file
        };
        inner = inner.with_file_offset(FileOffset::new(file, (GUARD_PAGES * PAGE) as u64));
    }
    let start = GuestAddress(plot.guest_page * PAGE as u64);
    (
        outer,
        GuestRegionMmap::new(inner.build().expect("memory can be mapped"), start)
            .expect("plots end below the last address"),
    )
}

fn memfd(bytes: usize) -> File {
    // SAFETY: the name is a C string and the kernel gives us a fresh descriptor.
    let file =
        unsafe { File::from_raw_fd(libc::memfd_create(c"terrain".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(bytes as u64).expect("memory files grow");
    file
}

fn reopen_for_reading(file: &File) -> File {
    use std::os::fd::AsRawFd;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("a file of our own opens")
}
