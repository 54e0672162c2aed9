//! The system calls that discard memory, without any decisions.
#![allow(unsafe_code)]
// UNSAFETY: discarding memory is inherently unsafe, as are system calls without a libc wrapper.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

/// A span of this process's memory. It has the layout of `struct iovec` but contains no raw pointer, so that types with
/// a list of spans stay `Send`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HostSpan {
    pub(super) start: usize,
    pub(super) bytes: usize,
}

const _: () = assert!(size_of::<HostSpan>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<HostSpan>() == align_of::<libc::iovec>());
const _: () =
    assert!(std::mem::offset_of!(HostSpan, bytes) == std::mem::offset_of!(libc::iovec, iov_len));

/// Maximum length of a vector that the kernel accepts (`UIO_MAXIOV` in include/uapi/linux/uio.h).
pub(super) const VECTOR_SPANS_MAX: usize = 1024;

/// A descriptor of this process, if its kernel supports vectored discards.
///
/// Linux supports them since 6.13 (`process_madvise(2)`). Whether this kernel does, and permits them, is tried once per
/// process on one page.
pub(super) fn vector_advice() -> Option<BorrowedFd<'static>> {
    static SELF: OnceLock<Option<OwnedFd>> = OnceLock::new();
    SELF.get_or_init(|| {
        let pidfd = open_self().ok()?;
        scratch_page_is_discarded(&pidfd).then_some(pidfd)
    })
    .as_ref()
    .map(std::os::fd::AsFd::as_fd)
}

fn open_self() -> io::Result<OwnedFd> {
    // SAFETY: both calls take and return plain integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(fd).expect("descriptors are small integers");
    // SAFETY: the kernel has just returned this descriptor, and it has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Writes to a fresh page, discards it by vector and checks whether it is zero.
fn scratch_page_is_discarded(pidfd: &OwnedFd) -> bool {
    const SCRATCH_BYTES: usize = 4096;
    // SAFETY: a new private mapping, placed by the kernel, aliases no other memory.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            SCRATCH_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return false;
    }
    let byte = page.cast::<u8>();
    // SAFETY: the mapping is writable and ours alone.
    unsafe { byte.write_volatile(1) };
    let span = HostSpan {
        start: page as usize,
        bytes: SCRATCH_BYTES,
    };
    // SAFETY: no other code knows the page.
    let advised = unsafe { discard_vector(std::os::fd::AsFd::as_fd(pidfd), &[span]) };
    // SAFETY: the mapping is still there and readable.
    let gone = unsafe { byte.read_volatile() } == 0;
    // SAFETY: unmaps exactly what was mapped above; `byte` is not used again.
    unsafe { libc::munmap(page, SCRATCH_BYTES) };
    advised.is_ok_and(|bytes| bytes == SCRATCH_BYTES) && gone
}

/// `process_madvise(MADV_DONTNEED)` on this process. Returns the number of bytes advised, which is smaller than
/// requested if one of the spans failed.
///
/// # Safety
/// Every span must be page-aligned memory whose content its owner has released.
pub(super) unsafe fn discard_vector(
    pidfd: BorrowedFd<'_>,
    spans: &[HostSpan],
) -> io::Result<usize> {
    // SAFETY: the caller answers for the content.
    unsafe { advise_vector(pidfd, spans, libc::MADV_DONTNEED) }
}

/// `process_madvise(MADV_COLD)` on this process: the pages become the first candidates for reclaim. To age only a part
/// of a huge page, the kernel splits it. The content stays.
pub(super) fn cool_vector(pidfd: BorrowedFd<'_>, spans: &[HostSpan]) -> io::Result<usize> {
    // SAFETY: this advice changes no content, and fails where nothing is mapped.
    unsafe { advise_vector(pidfd, spans, libc::MADV_COLD) }
}

/// As [`cool_vector`], by `madvise` on one span.
pub(super) fn cool_span(span: HostSpan) -> io::Result<()> {
    retry_interrupted(|| {
        // SAFETY: this advice changes no content, and fails where nothing is mapped.
        let ret =
            unsafe { libc::madvise(span.start as *mut libc::c_void, span.bytes, libc::MADV_COLD) };
        check(ret)
    })
}

/// # Safety
/// `advice` may discard: as for [`discard_vector`].
unsafe fn advise_vector(
    pidfd: BorrowedFd<'_>,
    spans: &[HostSpan],
    advice: libc::c_int,
) -> io::Result<usize> {
    debug_assert!(spans.len() <= VECTOR_SPANS_MAX);
    retry_interrupted(|| {
        // SAFETY: `spans` has the layout of `iovec` and outlives the call; the caller guarantees that the content is
        // released.
        let advised = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                pidfd.as_raw_fd(),
                spans.as_ptr().cast::<libc::iovec>(),
                spans.len(),
                advice,
                0,
            )
        };
        usize::try_from(advised).map_err(|_| io::Error::last_os_error())
    })
}

/// `madvise(MADV_DONTNEED)` on one span.
///
/// # Safety
/// As for [`discard_vector`].
pub(super) unsafe fn discard_span(span: HostSpan) -> io::Result<()> {
    retry_interrupted(|| {
        // SAFETY: the caller guarantees that the content is released; the address stays mapped.
        let ret = unsafe {
            libc::madvise(
                span.start as *mut libc::c_void,
                span.bytes,
                libc::MADV_DONTNEED,
            )
        };
        check(ret)
    })
}

/// `fallocate(PUNCH_HOLE | KEEP_SIZE)`: frees the pages of a file and unmaps
/// them wherever they are mapped.
///
/// # Safety
/// `fd` must be open, and the owner must have released the content of the range.
pub(super) unsafe fn punch_hole(fd: RawFd, offset: u64, bytes: u64) -> io::Result<()> {
    let too_far = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let offset = libc::off_t::try_from(offset).map_err(too_far)?;
    let bytes = libc::off_t::try_from(bytes).map_err(too_far)?;
    retry_interrupted(|| {
        // SAFETY: `fallocate` affects no memory of this process except mapped file pages, whose content the caller
        // guarantees to be released.
        let ret = unsafe {
            libc::fallocate(
                fd,
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset,
                bytes,
            )
        };
        check(ret)
    })
}

/// Whether the file system of `fd` can free a part of a file. Tried far beyond the end of the file, where there is no
/// content.
pub(super) fn can_punch(fd: RawFd) -> bool {
    /// Distance from the end of the file, which does not grow by 1 TiB during the call.
    const FAR_BYTES: u64 = 1 << 40;
    const TRIED_BYTES: u64 = 4096;
    // SAFETY: the call takes and returns integers. No code depends on the file position of guest RAM.
    let end = unsafe { libc::lseek(fd, 0, libc::SEEK_END) };
    let Ok(end) = u64::try_from(end) else {
        return false;
    };
    let offset = end.next_multiple_of(TRIED_BYTES).saturating_add(FAR_BYTES);
    // SAFETY: there is no content at that distance beyond the end.
    let punched = unsafe { punch_hole(fd, offset, TRIED_BYTES) };
    // Other errors are reported when they occur in use.
    !punched.is_err_and(|e| e.raw_os_error() == Some(libc::EOPNOTSUPP))
}

fn check(ret: libc::c_int) -> io::Result<()> {
    if ret == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Repeats `call` when a signal interrupts it. A signal (a vCPU kick, a profiler) must not abort it; each attempt is
/// bounded, so this ends when the signals do.
fn retry_interrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
