//! An allocator that records how much is allocated, for tests of bounds.
//!
//! A test program installs it:
//!
//! ```
//! #[global_allocator]
//! static ALLOCATOR: test_alloc::Recording = test_alloc::Recording;
//!
//! let (text, allocated) = test_alloc::record(|| "x".repeat(1000));
//! assert_eq!((text.len(), allocated.peak_bytes, allocated.largest_bytes), (1000, 1000, 1000));
//! ```

// UNSAFETY: an allocator has no safe interface.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, with records.
#[derive(Debug)]
pub struct Recording;

/// The allocations of one thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocated {
    /// Maximum number of bytes at one time.
    pub peak_bytes: usize,
    /// The largest single allocation.
    pub largest_bytes: usize,
}

thread_local! {
    // None has a destructor, so that all of them can be used while a thread ends.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// The largest allocation of all threads.
static LARGEST_OF_ALL: AtomicUsize = AtomicUsize::new(0);

/// Records what `action` allocates on this thread.
pub fn record<T>(action: impl FnOnce() -> T) -> (T, Allocated) {
    LIVE.set(0);
    PEAK.set(0);
    LARGEST.set(0);
    let value = action();
    let allocated = Allocated {
        peak_bytes: usize::try_from(PEAK.get()).unwrap_or(0),
        largest_bytes: LARGEST.get(),
    };
    (value, allocated)
}

/// The largest allocation of all threads since the last call.
pub fn take_largest_of_all_threads() -> usize {
    LARGEST_OF_ALL.swap(0, Ordering::Relaxed)
}

fn record_change(bytes: isize) {
    LIVE.set(LIVE.get() + bytes);
    PEAK.set(PEAK.get().max(LIVE.get()));
}

fn record_size(bytes: usize) {
    LARGEST.set(LARGEST.get().max(bytes));
    LARGEST_OF_ALL.fetch_max(bytes, Ordering::Relaxed);
}

// SAFETY: every call is forwarded unchanged to the system's allocator.
unsafe impl GlobalAlloc for Recording {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        record_change(layout.size().cast_signed());
        record_size(layout.size());
        // SAFETY: forwarded.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        record_change(layout.size().cast_signed());
        record_size(layout.size());
        // SAFETY: forwarded.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        record_change(-layout.size().cast_signed());
        // SAFETY: forwarded.
        unsafe { System.dealloc(memory, layout) }
    }

    // The system's allocator moves large blocks by changing the page tables, so the old and the new block never coexist.
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        record_change(size.cast_signed() - layout.size().cast_signed());
        record_size(size);
        // SAFETY: forwarded.
        unsafe { System.realloc(memory, layout, size) }
    }
}
