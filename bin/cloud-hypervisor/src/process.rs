//! Process-wide settings, applied before any thread starts.

// UNSAFETY: neither the file mode mask, nor the limits of the process, nor the allocator's settings have a safe interface.
#![allow(unsafe_code)]

/// Only the VMM's user can access its files and sockets.
const FILE_MODE_MASK: libc::mode_t = 0o077;
/// Blocks of at least this size are mapped separately and unmapped when freed, so the body of a large request does not
/// increase memory use permanently.
const MMAP_THRESHOLD_BYTES: libc::c_int = 64 << 10;

/// A VM with a few devices has fewer descriptors. The table takes 8 bytes for each.
const DESCRIPTORS: libc::c_int = 512;

/// Sets the file mode mask and configures the allocator for low memory use instead of speed: one heap for all threads,
/// and no retained free memory. The VMM allocates little while a guest runs.
pub(crate) fn configure() {
    // SAFETY: both calls only change settings of this process, which still has a single thread.
    unsafe {
        libc::umask(FILE_MODE_MASK);
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, MMAP_THRESHOLD_BYTES);
    }
    open_as_many_files_as_allowed();
    reserve_descriptors();
}

/// Gives the table of file descriptors its final size. If it grows while other threads use it, the kernel waits until no
/// processor reads the old one, which takes several milliseconds (`expand_fdtable` in `fs/file.c`).
fn reserve_descriptors() {
    // SAFETY: the first call creates a descriptor, or fails; the second closes it.
    unsafe {
        let last = libc::fcntl(libc::STDERR_FILENO, libc::F_DUPFD_CLOEXEC, DESCRIPTORS - 1);
        if last >= 0 {
            libc::close(last);
        }
    }
}

/// Raises the limit of open files. Each vsock connection of a guest uses one file descriptor of the VMM, so with the
/// usual limit of 1024 a guest could exhaust those that the API needs.
fn open_as_many_files_as_allowed() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the first call writes one `rlimit`, the second reads one. If either fails, the limit stays unchanged.
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
    fn table_of_descriptors_has_its_size_from_the_start() {
        reserve_descriptors();
        let status = std::fs::read_to_string("/proc/self/status").expect("proc is mounted");
        let size = status.lines().find_map(|line| line.strip_prefix("FDSize:"));
        let size: i32 = size.expect("a line FDSize").trim().parse().expect("digits");
        assert!(size >= DESCRIPTORS, "{size}");
    }

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
