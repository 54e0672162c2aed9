//! Settings of the whole process, made before it starts a thread.

// UNSAFETY: neither the file mode mask nor the allocator's settings have a safe interface.
#![allow(unsafe_code)]

/// Files and sockets of the VMM are its user's alone.
const FILE_MODE_MASK: libc::mode_t = 0o077;
/// Blocks from here on are mapped on their own and given back when freed: the body of a large request leaves no trace.
const MMAP_THRESHOLD_BYTES: libc::c_int = 64 << 10;

/// Sets the file mode mask and tells the allocator to be small rather than fast: one heap for all threads, no memory kept
/// back. The VMM allocates little once a guest runs.
pub(crate) fn configure() {
    // SAFETY: both only change settings of this process, which has one thread yet.
    unsafe {
        libc::umask(FILE_MODE_MASK);
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, MMAP_THRESHOLD_BYTES);
    }
}
