//! A new pseudo-terminal. The VMM holds its master side; an operator opens the other side by its path.
#![allow(unsafe_code)]
// UNSAFETY: three ioctls of the pty driver (ioctl_tty(2)) have no safe interface.

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::terminal::make_transparent;

/// `/dev/pts/N` and a final zero, with room for the largest number.
const NAME_BYTES: usize = 32;

/// Both sides of a pseudo-terminal.
#[derive(Debug)]
pub(super) struct Pty {
    /// Non-blocking.
    pub(super) master: File,
    /// Held open so that the master does not hang up when an operator leaves.
    pub(super) slave: OwnedFd,
    /// The path that the operator opens.
    pub(super) path: PathBuf,
}

impl Pty {
    /// Opens a pseudo-terminal that passes bytes through unchanged.
    pub(super) fn open() -> io::Result<Self> {
        let master = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
            .open("/dev/ptmx")?;
        let unlocked: libc::c_int = 0;
        // SAFETY: TIOCSPTLCK reads one int.
        if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor.
        let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
        if slave < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and has no other owner.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        make_transparent(&slave)?;
        let path = path_of(&master)?;
        Ok(Self {
            master,
            slave,
            path,
        })
    }
}

fn path_of(master: &File) -> io::Result<PathBuf> {
    let mut name = [0; NAME_BYTES];
    // SAFETY: the call writes at most that many bytes, with a final zero.
    let error =
        unsafe { libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr().cast(), name.len()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let name = CStr::from_bytes_until_nul(&name).map_err(io::Error::other)?;
    Ok(PathBuf::from(OsStr::from_bytes(name.to_bytes())))
}
