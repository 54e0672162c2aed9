//! Open file description locks. The locks of std cannot be limited to a part of the file, and other programs do not see
//! them.
#![allow(unsafe_code)]
// UNSAFETY: no safe interface; the system call reads a local of the size that the kernel expects.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Takes an open-file-description lock on `[0, bytes)`, or on the whole file for 0, without waiting.
///
/// # Errors
/// `WouldBlock`: another process has a conflicting lock.
pub fn lock(file: &File, exclusive: bool, bytes: u64) -> io::Result<()> {
    let kind = if exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    };
    set_lock(file, kind, bytes)
}

/// Releases all locks of the open file description.
///
/// # Errors
/// The error of fcntl.
pub fn unlock(file: &File) -> io::Result<()> {
    set_lock(file, libc::F_UNLCK, 0)
}

fn set_lock(file: &File, kind: libc::c_int, bytes: u64) -> io::Result<()> {
    // SAFETY: `flock` is plain data, for which all zeroes are a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_len = i64::try_from(bytes).unwrap_or(0);
    // SAFETY: F_OFD_SETLK reads one `struct flock` with `l_pid` 0.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
    if result < 0 {
        return Err(of_fcntl(io::Error::last_os_error()));
    }
    Ok(())
}

/// fcntl has two numbers for the lock of another process.
fn of_fcntl(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EACCES) => io::Error::from_raw_os_error(libc::EAGAIN),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_of_another_process_is_one_kind_of_error() {
        for (errno, is_lock) in [
            (libc::EAGAIN, true),
            (libc::EACCES, true),
            (libc::EIO, false),
        ] {
            let error = of_fcntl(io::Error::from_raw_os_error(errno));
            assert_eq!(
                error.kind() == io::ErrorKind::WouldBlock,
                is_lock,
                "{error}"
            );
        }
    }
}
