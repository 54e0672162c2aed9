//! Descriptors inherited from the parent process (`fd=N` on the command line).

// UNSAFETY: the standard library does not know the owner of a descriptor that is passed as a number.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

/// Takes over an open file and makes it non-blocking.
///
/// # Errors
/// The descriptor is not open.
pub(crate) fn non_blocking_file(fd: i32) -> io::Result<File> {
    // SAFETY: these commands only read and set flags of a descriptor; one that is not open causes an error.
    let set = unsafe {
        match libc::fcntl(fd, libc::F_GETFL) {
            -1 => -1,
            flags => libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK),
        }
    };
    if set == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and the parent handed it to this process for this use alone.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Takes over a listening socket.
///
/// # Errors
/// It is not open or does not listen.
pub(crate) fn listener(fd: i32) -> io::Result<UnixListener> {
    let mut listening: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `listening` and `length` are live and of the sizes this option is documented to write.
    let asked = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut listening).cast(),
            &mut length,
        )
    };
    if asked != 0 {
        return Err(io::Error::last_os_error());
    }
    if listening == 0 {
        return Err(ErrorKind::InvalidInput.into());
    }
    // SAFETY: the descriptor is open, and the parent handed it to this process for this use alone.
    Ok(unsafe { UnixListener::from_raw_fd(fd) })
}

/// Duplicates the descriptor of an open file. The original stays open for the next reboot.
///
/// # Errors
/// It is not open, or there are no descriptors left.
pub(crate) fn duplicate(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: this command creates a new descriptor; one that is not open causes an error.
    let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if own == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just created and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(own) })
}
