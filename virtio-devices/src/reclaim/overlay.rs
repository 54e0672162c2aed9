//! Private memory whose parts map a file until the guest releases them.
//!
//! ```text
//!  show:  anonymous ████ file ████ anonymous          a write makes a page a private copy
//!  hide:  anonymous ██ anonymous ██ file ██ anonymous new anonymous memory instead of the file: zeros
//! ```
//! After `MADV_DONTNEED` alone, the file would be visible again. The kernel limits the number of mappings of a process,
//! so this module limits the number of pieces. Memory beyond that limit is not replaced.
#![allow(unsafe_code)]
// UNSAFETY: mappings are replaced in the middle of guest RAM.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

use super::backing::base_page_bytes;
use crate::Unpoisoned;

/// Maximum number of pieces of guest RAM; a process can have 65530 mappings (`vm.max_map_count`).
const PIECES_MAX: usize = 16 * 1024;

/// The pages of guest RAM that map a file.
#[derive(Debug, Default)]
pub struct Overlay {
    shown: Mutex<Shown>,
    /// New memory may have transparent huge pages.
    huge_pages: bool,
}

#[derive(Debug, Default)]
struct Shown {
    /// Addresses of this process, in ascending order; none touches the next.
    ranges: Vec<Range<usize>>,
}

/// The outcome of [`Overlay::hide`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hidden {
    /// The range no longer maps a file. The value is the number of system calls.
    All(u64),
    /// There would be too many pieces, so nothing has changed.
    TooManyPieces,
}

impl Overlay {
    /// An overlay without files. `huge_pages`: memory that replaces a file may have transparent huge pages.
    #[must_use]
    pub fn new(huge_pages: bool) -> Self {
        Self {
            shown: Mutex::default(),
            huge_pages,
        }
    }

    /// Maps `bytes` of `file` from `offset` on at the address `start`. Writes never reach the file. The file must never
    /// become shorter.
    ///
    /// # Errors
    /// The file cannot be mapped.
    ///
    /// # Safety
    /// The range is whole pages of a private anonymous mapping that is kept, and whose content is unused.
    pub unsafe fn show(
        &self,
        start: usize,
        bytes: usize,
        file: &File,
        offset: u64,
    ) -> io::Result<()> {
        let mut shown = self.shown.lock().unpoisoned();
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: guaranteed by the caller.
        unsafe { map(start, bytes, file.as_raw_fd(), offset)? };
        shown.add(start..start + bytes);
        Ok(())
    }

    /// Replaces the parts of a range that map a file by new anonymous memory.
    ///
    /// # Errors
    /// The kernel rejects a mapping; a part of the range may have changed.
    ///
    /// # Safety
    /// The range is whole pages of guest RAM that the guest has released.
    pub unsafe fn hide(&self, start: usize, bytes: usize) -> io::Result<Hidden> {
        let mut shown = self.shown.lock().unpoisoned();
        let range = start..start + bytes;
        let inside: Vec<Range<usize>> = shown.inside(&range).collect();
        // Each new end adds one piece.
        let cuts = inside.iter().map(|it| shown.new_ends(it)).sum::<usize>();
        if shown.ranges.len() * 2 + cuts > PIECES_MAX {
            return Ok(Hidden::TooManyPieces);
        }
        let mut calls = 0;
        for part in inside {
            let part_bytes = part.end - part.start;
            // SAFETY: guaranteed by the caller.
            unsafe { map(part.start, part_bytes, -1, 0)? };
            shown.remove(&part);
            calls += 2;
            // SAFETY: as above; this advice changes no content.
            unsafe { advise(part.start, part_bytes, libc::MADV_DONTDUMP) };
            if self.huge_pages {
                // SAFETY: as above.
                unsafe { advise(part.start, part_bytes, libc::MADV_HUGEPAGE) };
                calls += 1;
            }
        }
        Ok(Hidden::All(calls))
    }

    /// Marks in `held` the pages from `start` on that map a file.
    pub fn mark_shown(&self, start: usize, held: &mut [bool]) {
        let page = usize::try_from(base_page_bytes()).expect("pages are small");
        let shown = self.shown.lock().unpoisoned();
        for range in shown.inside(&(start..start + held.len() * page)) {
            held[(range.start - start) / page..(range.end - start) / page].fill(true);
        }
    }
}

impl Shown {
    /// The parts of `range` that map a file.
    fn inside<'a>(&'a self, range: &'a Range<usize>) -> impl Iterator<Item = Range<usize>> + 'a {
        let first = self.ranges.partition_point(|it| it.end <= range.start);
        let overlapping = self.ranges[first..].iter();
        overlapping
            .take_while(|it| it.start < range.end)
            .map(|it| it.start.max(range.start)..it.end.min(range.end))
    }

    /// The number of additional ends without `part`, which lies in one range.
    fn new_ends(&self, part: &Range<usize>) -> usize {
        let at = self.ranges.partition_point(|it| it.end <= part.start);
        let whole = &self.ranges[at];
        match (whole.start < part.start, part.end < whole.end) {
            (true, true) => 2,
            _ => 0,
        }
    }

    fn add(&mut self, range: Range<usize>) {
        let first = self.ranges.partition_point(|it| it.end < range.start);
        let last = self.ranges.partition_point(|it| it.start <= range.end);
        let touched = &self.ranges[first..last];
        let start = touched
            .first()
            .map_or(range.start, |it| it.start.min(range.start));
        let end = touched.last().map_or(range.end, |it| it.end.max(range.end));
        self.ranges.splice(first..last, std::iter::once(start..end));
    }

    /// Removes `part`, which lies in one range.
    fn remove(&mut self, part: &Range<usize>) {
        let at = self.ranges.partition_point(|it| it.end <= part.start);
        let whole = self.ranges[at].clone();
        let rest = [whole.start..part.start, part.end..whole.end];
        let rest = rest.into_iter().filter(|it| !it.is_empty());
        self.ranges.splice(at..=at, rest);
    }
}

/// Maps a file, or with -1 new memory, as guest RAM is mapped.
///
/// # Safety
/// As for [`Overlay::show`].
unsafe fn map(start: usize, bytes: usize, fd: i32, offset: libc::off_t) -> io::Result<()> {
    let anonymous = if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
    // SAFETY: guaranteed by the caller.
    let mapped = unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE | anonymous,
            fd,
            offset,
        )
    };
    match mapped == libc::MAP_FAILED {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}

/// Advice that older kernels lack.
///
/// # Safety
/// The range is mapped.
unsafe fn advise(start: usize, bytes: usize, advice: libc::c_int) {
    // SAFETY: guaranteed by the caller.
    if unsafe { libc::madvise(start as *mut libc::c_void, bytes, advice) } != 0 {
        log::debug!(
            "madvise({advice}) of guest RAM: {}",
            io::Error::last_os_error()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn piece_that_would_make_too_many_is_left_alone() {
        let overlay = Overlay::new(false);
        let ranges = (0..PIECES_MAX / 2).map(|at| at * 0x10000..at * 0x10000 + 0x8000);
        overlay.shown.lock().unpoisoned().ranges = ranges.collect();
        // SAFETY: such memory does not exist; the call is rejected before anything is mapped.
        let refused = unsafe { overlay.hide(0x1000, 0x1000) }.expect("no call is made");
        assert_eq!(refused, Hidden::TooManyPieces);
        let mut shown = [false; 9];
        overlay.mark_shown(0, &mut shown);
        assert_eq!(shown.iter().filter(|page| **page).count(), 8);
    }

    #[test]
    fn ranges_are_joined_and_cut() {
        let mut shown = Shown::default();
        for range in [10..20, 30..40, 20..30, 60..70, 5..6] {
            shown.add(range);
        }
        assert_eq!(shown.ranges, [5..6, 10..40, 60..70]);
        assert_eq!(shown.inside(&(0..15)).collect::<Vec<_>>(), [5..6, 10..15]);
        assert_eq!(shown.inside(&(40..60)).count(), 0);
        assert_eq!(shown.new_ends(&(12..14)), 2);
        assert_eq!(shown.new_ends(&(10..14)), 0);
        shown.remove(&(12..14));
        shown.remove(&(60..70));
        shown.remove(&(30..40));
        assert_eq!(shown.ranges, [5..6, 10..12, 14..30]);
    }
}
