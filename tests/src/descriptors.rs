//! Open descriptors that a test passes to a VMM: a pseudo-terminal, a tap.

// UNSAFETY: they are created by requests and flags that the standard library does not support.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

/// A new pseudo-terminal: the master, which does not block, and the path of the other side.
///
/// # Errors
/// No pseudo-terminal is available.
pub fn open_terminal() -> Result<(File, PathBuf)> {
    let master = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open("/dev/ptmx")
        .context("/dev/ptmx")?;
    let mut number: libc::c_uint = 0;
    let unlocked: libc::c_int = 0;
    // SAFETY: the master is open; each request reads or writes the live integer it is given.
    let made = unsafe {
        libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) == 0
            && libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) == 0
    };
    if !made {
        return Err(io::Error::last_os_error()).context("pseudo-terminal");
    }
    Ok((master, format!("/dev/pts/{number}").into()))
}

/// A new tap of this name, with headers of virtio-net before each frame.
///
/// # Errors
/// The tap cannot be created, which requires root.
pub fn open_tap(name: &str) -> Result<File> {
    ensure!(name.len() < libc::IFNAMSIZ, "{name} is too long a name");
    let tap = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("/dev/net/tun")?;
    // SAFETY: all fields of `ifreq` are integers or arrays and unions of them, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open and the request reads and writes a live `ifreq`.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("tap {name}"));
    }
    Ok(tap)
}

/// Makes programs started from now on inherit this descriptor under the same number.
///
/// # Errors
/// Never with an open file.
pub fn inherit(file: &File) -> Result<RawFd> {
    let fd = file.as_raw_fd();
    // SAFETY: this command only sets the flags of an open descriptor.
    let set = unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    ensure!(set == 0, "descriptor {fd}: {}", io::Error::last_os_error());
    Ok(fd)
}
