//! Guest RAM on real mappings, each region with guard pages before and after it.
//!
//! For tests and fuzzing. Regardless of what a guest makes the device do, guard pages must not change, and every page
//! must be either unchanged or discarded. [`discard_and_check`] compares an engine with the rule on such memory.
#![allow(unsafe_code)]
// UNSAFETY: regions are placed in the middle of larger mappings, and `mlock`, `madvise` and `memfd_create` have no safe
// wrapper among our dependencies.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::device::GuestRam;
use crate::reclaim::{DiscardEngine, Expected, GuestRange, Outcome};

/// Page size of guest and host.
pub const PAGE: usize = 4096;
/// Pages in a huge page of [`Kind::Huge`].
pub const HUGE_PAGE_PAGES: usize = (2 << 20) / PAGE;
/// The content of the privately mapped file; it differs from all patterns.
const FILE_BYTE: u8 = 0xa6;

/// The backing of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory.
    Anonymous,
    /// The same, with transparent huge pages wherever a whole one fits.
    Transparent,
    /// A memory file, mapped shared.
    Memfd,
    /// A file, mapped private. Its content is not zeros.
    PrivateFile,
    /// A memory file of huge pages of 2 MiB, mapped shared. Its areas are whole huge pages.
    Huge,
    /// A memfd whose descriptor may not punch holes.
    ReadOnlyMemfd,
}

impl Kind {
    /// Number of guard pages on either side of a region.
    fn guard_pages(self) -> usize {
        match self {
            Self::Huge => HUGE_PAGE_PAGES,
            _ => 4,
        }
    }

    /// Number of pages that can only be discarded together.
    #[must_use]
    pub fn unit_pages(self) -> usize {
        match self {
            Self::Huge => HUGE_PAGE_PAGES,
            _ => 1,
        }
    }
}

/// One region: its guest address, length and backing.
#[derive(Clone, Copy, Debug)]
pub struct RamArea {
    /// First guest page.
    pub guest_page: u64,
    /// Length in pages.
    pub pages: usize,
    /// Backing.
    pub kind: Kind,
}

/// Guest RAM and, through larger mappings, its surroundings.
#[derive(Debug)]
pub struct GuardedRam {
    /// The regions as guest RAM.
    pub ram: GuestRam,
    areas: Vec<RamArea>,
    /// The mappings: larger than the regions by the guard pages; they outlive the regions.
    outer: Vec<MmapRegion>,
}

impl GuardedRam {
    /// Maps the areas, which must be in ascending order, and fills every page with its pattern.
    ///
    /// # Panics
    /// The areas cannot be mapped.
    #[must_use]
    pub fn new(areas: &[RamArea]) -> Self {
        Self::try_new(areas).expect("memory can be mapped")
    }

    /// As [`GuardedRam::new`], but returns an error if the host has no or too few huge pages.
    ///
    /// # Errors
    /// The areas cannot be mapped.
    ///
    /// # Panics
    /// The areas are not in ascending order.
    pub fn try_new(areas: &[RamArea]) -> io::Result<Self> {
        let mut outer = Vec::new();
        let mut regions = Vec::new();
        for area in areas {
            let (mapping, region) = map(*area)?;
            outer.push(mapping);
            regions.push(region);
        }
        let mem = GuestMemoryMmap::from_regions(regions).expect("areas are in ascending order");
        let guarded = Self {
            ram: GuestRam::new(mem),
            areas: areas.to_vec(),
            outer,
        };
        guarded.fill();
        Ok(guarded)
    }

    /// The pages of an area in its mapping, between the guards.
    fn inside(&self, at: usize) -> std::ops::Range<usize> {
        let guard = self.areas[at].kind.guard_pages();
        guard..guard + self.areas[at].pages
    }

    fn page_address(&self, area: usize, page: usize) -> *mut u8 {
        assert!(page < self.areas[area].pages);
        let page = self.areas[area].kind.guard_pages() + page;
        self.outer[area].as_ptr().wrapping_add(page * PAGE)
    }

    fn fill(&self) {
        for (area, outer) in self.outer.iter().enumerate() {
            fill_pages(area, outer, 0..outer.size() / PAGE);
        }
    }

    /// Writes the patterns to all pages of the regions again.
    pub fn refill(&self) {
        for (at, outer) in self.outer.iter().enumerate() {
            fill_pages(at, outer, self.inside(at));
        }
    }

    /// The discarded pages, by area and position in it: they are all zeros, or show the privately mapped file.
    ///
    /// # Panics
    /// A page is neither discarded nor has its pattern, a guard page has changed, or a privately mapped file has
    /// changed.
    #[must_use]
    pub fn discarded(&self) -> Vec<(usize, usize)> {
        let mut discarded = Vec::new();
        for (at, outer) in self.outer.iter().enumerate() {
            let inside = self.inside(at);
            let gone = match self.areas[at].kind {
                Kind::PrivateFile => {
                    check_file(outer);
                    FILE_BYTE
                }
                _ => 0,
            };
            for page in 0..outer.size() / PAGE {
                let bytes = page_of(outer, page);
                if bytes == [gone; PAGE] {
                    assert!(
                        inside.contains(&page),
                        "guard page {page} of area {at} is gone"
                    );
                    discarded.push((at, page - inside.start));
                } else {
                    let whole = bytes == [pattern(at, page); PAGE];
                    assert!(whole, "page {page} of area {at} is damaged");
                }
            }
        }
        discarded
    }

    /// Checks only the guard pages.
    ///
    /// # Panics
    /// A guard page has changed.
    pub fn check_guards(&self) {
        for (at, outer) in self.outer.iter().enumerate() {
            let inside = self.inside(at);
            for page in (0..outer.size() / PAGE).filter(|page| !inside.contains(page)) {
                let bytes = page_of(outer, page);
                let whole = bytes == [pattern(at, page); PAGE];
                assert!(whole, "guard page {page} of area {at} has changed");
            }
        }
    }

    /// Pins a page, so that the kernel refuses to discard it.
    ///
    /// # Panics
    /// The kernel refuses to pin the page.
    pub fn lock_page(&self, area: usize, page: usize) {
        let start = self.page_address(area, page);
        // SAFETY: the page lies inside the mapping; nothing changes in it.
        let ret = unsafe { libc::mlock(start.cast::<c_void>(), PAGE) };
        assert_eq!(ret, 0, "a page can be locked");
    }

    /// Reads one byte of a page, which maps it.
    #[must_use]
    pub fn touch_for_reading(&self, area: usize, page: usize) -> u8 {
        let start = self.page_address(area, page);
        // SAFETY: the page lies inside the mapping, which is readable.
        unsafe { start.read_volatile() }
    }
}

/// Makes `engine` discard `claims` on new memory of `areas` and compares the discarded pages with the rule: backing
/// pages completely inside the union of the claims, if their kind can be discarded.
///
/// # Errors
/// The memory cannot be mapped.
///
/// # Panics
/// A wrong page is discarded, a page is not discarded, or the engine's report is wrong.
pub fn discard_and_check(
    engine: &mut DiscardEngine,
    areas: &[RamArea],
    claims: &[GuestRange],
    expected: Expected,
) -> io::Result<Outcome> {
    let guarded = GuardedRam::try_new(areas)?;
    Ok(discard_and_check_on(
        &guarded,
        engine,
        claims,
        expected,
        &[],
        |_| (),
    ))
}

/// As [`discard_and_check`], on memory that is there, of which devices can access `mapped`. `before_check` gets the
/// outcome before the memory is read, which maps pages.
///
/// # Panics
/// As [`discard_and_check`].
pub fn discard_and_check_on(
    guarded: &GuardedRam,
    engine: &mut DiscardEngine,
    claims: &[GuestRange],
    expected: Expected,
    mapped: &[Range<u64>],
    before_check: impl FnOnce(&DiscardEngine),
) -> Outcome {
    let mut sorted = claims.to_vec();
    sorted.sort_by_key(|claim| claim.start);
    let outcome = engine.discard(&guarded.ram, &mut claims.to_vec(), expected);
    before_check(engine);
    let (mut gone, mut refused) = (Vec::new(), 0);
    for (at, area) in guarded.areas.iter().enumerate() {
        let given_up: Vec<_> = (0..area.pages as u64)
            .map(|page| given_up(&sorted, area.guest_page + page))
            .collect();
        for page in 0..area.pages {
            let unit = area.kind.unit_pages();
            let first = page - page % unit;
            let start = (area.guest_page + first as u64) * PAGE as u64;
            let end = start + (unit * PAGE) as u64;
            let is_mapped = mapped.iter().any(|it| it.start < end && start < it.end);
            if is_mapped || !given_up[first..first + unit].iter().all(|page| *page) {
                continue;
            }
            match area.kind {
                Kind::Anonymous | Kind::Transparent | Kind::Memfd | Kind::Huge => {
                    gone.push((at, page));
                }
                Kind::PrivateFile if expected == Expected::Anything => gone.push((at, page)),
                Kind::PrivateFile => {}
                Kind::ReadOnlyMemfd => refused += PAGE as u64,
            }
        }
    }
    assert_eq!(guarded.discarded(), gone);
    assert_eq!(outcome.discarded.bytes, (gone.len() * PAGE) as u64);
    assert_eq!(outcome.failed.bytes, refused);
    assert_eq!(
        outcome.requested.bytes,
        outcome.discarded.bytes + outcome.failed.bytes + outcome.skipped.total()
    );
    for claim in claims {
        assert_zeroed_prefix(guarded, &gone, *claim, engine.zeroed_prefix(*claim));
    }
    let told: u64 = engine.discarded_ranges().map(|range| range.bytes).sum();
    assert_eq!(told, outcome.discarded.bytes);
    outcome
}

/// Checks that exactly the first `zeroed` bytes of a claim are in pages that are gone and show no file.
fn assert_zeroed_prefix(
    guarded: &GuardedRam,
    gone: &[(usize, usize)],
    claim: GuestRange,
    zeroed: u64,
) {
    let bytes = PAGE as u64;
    let is_zeroed = |page: u64| {
        let mut areas = guarded.areas.iter().enumerate();
        let area = areas.find(|(_, area)| {
            (area.guest_page..area.guest_page + area.pages as u64).contains(&page)
        });
        area.is_some_and(|(at, area)| {
            area.kind != Kind::PrivateFile
                && gone
                    .binary_search(&(at, (page - area.guest_page) as usize))
                    .is_ok()
        })
    };
    assert!(zeroed <= claim.bytes, "{claim:?}: {zeroed}");
    let end = claim.start + zeroed;
    for page in claim.start / bytes..end.div_ceil(bytes) {
        assert!(
            zeroed == 0 || is_zeroed(page),
            "{claim:?}: {zeroed}, {page}"
        );
    }
    assert!(
        zeroed == claim.bytes || !is_zeroed(end / bytes),
        "{claim:?}: {zeroed} is too short"
    );
}

/// Whether a guest page is completely in the union of the claims, which are in ascending order.
fn given_up(sorted: &[GuestRange], page: u64) -> bool {
    let bytes = PAGE as u64;
    let (start, end) = (u128::from(page * bytes), u128::from((page + 1) * bytes));
    let mut reached = start;
    for claim in sorted {
        let claim_end = u128::from(claim.start) + u128::from(claim.bytes);
        if u128::from(claim.start) <= reached {
            reached = reached.max(claim_end);
        }
    }
    reached >= end
}

fn fill_pages(area: usize, outer: &MmapRegion, pages: std::ops::Range<usize>) {
    assert!(pages.end * PAGE <= outer.size());
    for page in pages {
        // SAFETY: the page lies inside the mapping, as just checked, and is writable.
        unsafe {
            let start = outer.as_ptr().add(page * PAGE);
            start.write_bytes(pattern(area, page), PAGE);
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

fn pattern(area: usize, page: usize) -> u8 {
    // The pattern is never zero.
    (page * 7 + area * 31) as u8 | 1
}

/// Checks that a privately mapped file still has its content.
fn check_file(outer: &MmapRegion) {
    let file = outer.file_offset().expect("a file is mapped").file();
    let mut bytes = vec![0; outer.size()];
    file.read_exact_at(&mut bytes, 0)
        .expect("memory files can be read");
    assert!(
        bytes == vec![FILE_BYTE; outer.size()],
        "the file has changed"
    );
}

fn map(area: RamArea) -> io::Result<(MmapRegion, GuestRegionMmap)> {
    let guard_bytes = area.kind.guard_pages() * PAGE;
    let bytes = area.pages * PAGE + 2 * guard_bytes;
    let flags = match area.kind {
        Kind::Anonymous | Kind::Transparent => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        Kind::Memfd | Kind::ReadOnlyMemfd | Kind::Huge => libc::MAP_SHARED,
        Kind::PrivateFile => libc::MAP_PRIVATE,
    };
    let file = match area.kind {
        Kind::Anonymous | Kind::Transparent => None,
        kind => Some(memfd(kind, bytes)?),
    };
    let mut outer = MmapRegionBuilder::new(bytes)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags);
    if let Some(file) = &file {
        outer = outer.with_file_offset(FileOffset::new(file.try_clone()?, 0));
    }
    let outer = outer.build().map_err(io::Error::other)?;
    if area.kind == Kind::Transparent {
        // SAFETY: the range is the whole mapping, and the advice changes no content. A kernel without huge pages
        // refuses it, which makes the memory that of `Anonymous`.
        unsafe { libc::madvise(outer.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
    }
    let inner_start = outer.as_ptr().wrapping_add(guard_bytes);
    // SAFETY: the range is inside `outer`, which exists as long as the guarded region.
    let inner =
        unsafe { MmapRegionBuilder::new(area.pages * PAGE).with_raw_mmap_pointer(inner_start) };
    let mut inner = inner
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags);
    if let Some(file) = file {
        let file = if area.kind == Kind::ReadOnlyMemfd {
            reopen_for_reading(&file)
        } else {
            file
        };
        inner = inner.with_file_offset(FileOffset::new(file, guard_bytes as u64));
    }
    let inner = inner.build().map_err(io::Error::other)?;
    let start = GuestAddress(area.guest_page * PAGE as u64);
    let region = GuestRegionMmap::new(inner, start).expect("areas end below the last address");
    Ok((outer, region))
}

fn memfd(kind: Kind, bytes: usize) -> io::Result<File> {
    let huge = match kind {
        Kind::Huge => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        _ => 0,
    };
    // SAFETY: the name is a C string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"guarded-ram".as_ptr(), libc::MFD_CLOEXEC | huge) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor, and it has no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes as u64)?;
    if kind == Kind::PrivateFile {
        file.write_all_at(&vec![FILE_BYTE; bytes], 0)?;
    }
    Ok(file)
}

fn reopen_for_reading(file: &File) -> File {
    use std::os::fd::AsRawFd;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("a file of our own opens")
}
