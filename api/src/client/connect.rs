//! Connects to a UNIX socket within the deadline.
//!
//! The standard library's `connect` blocks indefinitely if the listener's backlog is full, which happens when a VMM
//! hangs while clients keep connecting. Linux applies the socket's send timeout to `connect` as well
//! (`net/unix/af_unix.c`, `unix_stream_connect`). The timeout must be set before connecting, however, and the standard
//! library has no call for that.

#![allow(unsafe_code)]
// UNSAFETY: system calls on our own descriptors and structures, for which no safe wrapper is available.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::deadline::Deadline;
use super::error::ClientError;

/// The process that listens at the other end of a connection, as the kernel recorded it when the socket began to
/// listen. For an inherited listener, this is the process that created it.
#[derive(Debug)]
pub struct Peer {
    /// Process id, in the pid namespace of this process. In contrast, `vmm.ping` returns the id in the namespace where
    /// the VMM was started.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// A descriptor of the process, which never refers to a later process with the same id; absent before Linux 6.5.
    /// The process may have ended, because a listener can be inherited.
    pub process: Option<OwnedFd>,
    /// True if the kernel reported that the process has ended and returned no descriptor. Another process may have its
    /// id by now.
    pub has_ended: bool,
}

/// The identity of a socket file. Its path may refer to another file at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketInode {
    /// The file system.
    pub device: u64,
    /// The file in it.
    pub inode: u64,
}

pub(super) fn connect(
    socket: &Path,
    file: Option<SocketInode>,
    deadline: Option<Deadline>,
) -> Result<UnixStream, ClientError> {
    let failed = |source: io::Error| {
        let socket = socket.to_owned();
        match (source.kind(), deadline) {
            (io::ErrorKind::NotFound, _) => ClientError::NoSocket { socket, source },
            (io::ErrorKind::ConnectionRefused, _) => ClientError::Refused { socket, source },
            (io::ErrorKind::WouldBlock, Some(deadline)) => deadline.missed(),
            _ => ClientError::Connect { socket, source },
        }
    };
    // Kept open until the connection is established, because the path below refers to it.
    let held = file.map(|file| hold(socket, file)).transpose();
    let held = held.map_err(failed)?;
    let address = match &held {
        Some(held) => address_of(format!("/proc/self/fd/{}", held.as_raw_fd()).as_ref()),
        None => address_of(socket),
    };
    let address = address.map_err(failed)?;
    let stream = new_socket().map_err(failed)?;
    loop {
        let limit = deadline.map(Deadline::remaining).transpose()?;
        stream.set_write_timeout(limit).map_err(failed)?;
        match connect_to(&stream, &address) {
            Ok(()) => return Ok(stream),
            // A signal interrupted the attempt, which left nothing behind.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Opens this file. Unlike its path, the descriptor cannot refer to another file later.
fn hold(socket: &Path, expected: SocketInode) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(socket)?;
    let metadata = file.metadata()?;
    let found = SocketInode {
        device: metadata.dev(),
        inode: metadata.ino(),
    };
    if found == expected {
        Ok(file)
    } else {
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            "another file is there by now",
        ))
    }
}

/// The address of a path. A path that is too long or contains a zero byte is an error.
fn address_of(socket: &Path) -> io::Result<libc::sockaddr_un> {
    let path = socket.as_os_str().as_bytes();
    // SAFETY: `sockaddr_un` is plain data for which all zeroes is a valid value.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    // The terminating zero is part of the address, so one byte is reserved for it.
    if path.is_empty() || path.len() >= address.sun_path.len() || path.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the path is not valid for a UNIX socket",
        ));
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, &from) in address.sun_path.iter_mut().zip(path) {
        *to = from.cast_signed();
    }
    Ok(address)
}

/// `SO_PEERPIDFD` of `include/uapi/asm-generic/socket.h`, which the `libc` crate lacks; Linux 6.5 and later have it.
const SO_PEERPIDFD: libc::c_int = 77;

/// The process at the other end, as the kernel recorded it when `listen` was called.
pub(super) fn peer(stream: &UnixStream) -> io::Result<Peer> {
    // SAFETY: `ucred` is plain data for which all zeroes is a valid value.
    let mut credentials: libc::ucred = unsafe { mem::zeroed() };
    read_option(stream, libc::SO_PEERCRED, &mut credentials)?;
    let mut fd: libc::c_int = -1;
    let found = read_option(stream, SO_PEERPIDFD, &mut fd);
    Ok(Peer {
        pid: credentials.pid,
        uid: credentials.uid,
        // SAFETY: the kernel created the descriptor for this call, and it has no other owner.
        process: (found.is_ok() && fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) }),
        has_ended: found.is_err_and(|error| names_nobody(&error)),
    })
}

/// Whether `SO_PEERPIDFD` failed because the process has ended. Linux 6.5 to 6.15 report this error; later versions
/// return a descriptor of the ended process. Other errors, such as an unknown option or a lack of descriptors, reveal
/// nothing about the process.
fn names_nobody(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::ESRCH | libc::ENODATA)
    )
}

/// Reads an option of the socket into plain data, for which every value is valid.
fn read_option<T: Copy>(stream: &UnixStream, option: libc::c_int, value: &mut T) -> io::Result<()> {
    let mut length = mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: both pointers are to memory that lives through the call, and `length` is the size of the first.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            std::ptr::from_mut(value).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn new_socket() -> io::Result<UnixStream> {
    // SAFETY: `socket` takes no pointer.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just created, is valid and has no other owner.
    Ok(UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn connect_to(stream: &UnixStream, address: &libc::sockaddr_un) -> io::Result<()> {
    let length = mem::size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the pointer is to a `sockaddr_un` that lives through the call, and `length` is its size.
    let result = unsafe {
        libc::connect(
            stream.as_raw_fd(),
            std::ptr::from_ref(address).cast(),
            length,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
