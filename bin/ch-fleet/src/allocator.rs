//! Limits the memory that glibc's allocator uses for many threads.
//!
//! By default it gives up to eight arenas a processor to threads, each of which keeps what it once had. The threads of the
//! agent mostly sleep: one arena serves them all without anybody waiting, and a megabyte for each other one is saved. Answers
//! of the agent, of some hundred KiB, come from the kernel and go back to it at once.

/// To be called before there are other threads.
pub(crate) fn keep_small() {
    #[cfg(target_env = "gnu")]
    glibc::keep_small();
}

#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
// UNSAFETY: no safe wrapper of mallopt is at hand.
mod glibc {
    /// Arenas of all threads together.
    const ARENAS: libc::c_int = 1;
    /// Larger pieces are mapped, and given back when they are freed. It is glibc's own value, which it raises by itself unless
    /// it is set.
    const MAPPED_BYTES_MIN: libc::c_int = 128 << 10;

    pub(super) fn keep_small() {
        for (parameter, value) in [
            (libc::M_ARENA_MAX, ARENAS),
            (libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN),
        ] {
            // SAFETY: `mallopt` takes two integers and no pointer, and locks the allocator itself.
            let taken = unsafe { libc::mallopt(parameter, value) };
            if taken == 0 {
                // It costs memory and nothing else.
                log::debug!("the allocator does not take parameter {parameter}");
            }
        }
    }
}
