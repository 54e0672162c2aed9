//! Checks whether a descriptor is writable.
#![allow(unsafe_code)]
// UNSAFETY: poll has no safe wrapper.

use std::os::fd::RawFd;
use std::time::Duration;

/// Whether `fd` accepts bytes within `timeout`, or would report an error on a write.
pub(super) fn is_writable(fd: RawFd, timeout: Duration) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one valid pollfd, which the call reads and writes.
    unsafe { libc::poll(&raw mut poll, 1, timeout_ms) > 0 }
}
