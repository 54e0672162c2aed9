//! Settings of the whole process, applied before any thread starts.

// UNSAFETY: neither the file mode mask, nor the limits of the process, nor the allocator's settings have a safe interface.
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
    open_as_many_files_as_allowed();
}

/// A guest with a vsock device has one file of the VMM open for each of its connections. The usual limit of 1024 would
/// let it take the files that the API's clients and the operator's requests need.
fn open_as_many_files_as_allowed() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the first call writes one `rlimit`, the second reads one. The limit stays as it is if either fails.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_may_open_as_many_files_as_the_hard_limit_allows() {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: each call reads or writes one `rlimit`. No test of this program opens more files than are left.
        unsafe {
            assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
            limit.rlim_cur = limit.rlim_max.min(256);
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
            open_as_many_files_as_allowed();
            assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        }
        assert_eq!(limit.rlim_cur, limit.rlim_max);
    }
}
