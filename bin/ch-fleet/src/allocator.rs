//! Limits the memory that glibc's allocator uses for many threads.
//!
//! By default, glibc creates up to eight arenas per processor, each of which retains freed memory. The agent's threads
//! mostly sleep, so they can share one arena without contention, which saves about 1 MiB per further arena. The agent's
//! responses of some hundred KiB are mapped separately and returned to the kernel when freed.

/// Must be called before other threads start.
pub(crate) fn keep_small() {
    #[cfg(target_env = "gnu")]
    glibc::keep_small();
}

#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
// UNSAFETY: no safe wrapper of mallopt is available.
mod glibc {
    /// Number of arenas for all threads together.
    const ARENAS: libc::c_int = 1;
    /// Larger blocks are mapped separately and returned to the kernel when freed. The value is glibc's default, which
    /// glibc raises automatically unless it is set.
    const MAPPED_BYTES_MIN: libc::c_int = 128 << 10;

    pub(super) fn keep_small() {
        for (parameter, value) in [
            (libc::M_ARENA_MAX, ARENAS),
            (libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN),
        ] {
            // SAFETY: `mallopt` takes two integers and no pointer, and locks the allocator itself.
            let taken = unsafe { libc::mallopt(parameter, value) };
            if taken == 0 {
                // A failure costs only memory.
                log::debug!("the allocator does not take parameter {parameter}");
            }
        }
    }
}
