//! Receives bytes and the descriptors attached to them (`SCM_RIGHTS`).

// UNSAFETY: `recvmsg` takes raw I/O vectors, and a received descriptor is a bare number until it is wrapped.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Maximum number of descriptors in one message. A network device needs one per queue pair.
pub(super) const FDS_MAX: usize = 64;

/// Receives once. More than [`FDS_MAX`] descriptors in one message are an error; in this case all of them are closed.
///
/// # Errors
/// `recvmsg` failed, for example with `WouldBlock`.
pub(super) fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<File>)> {
    let mut fds = [-1; FDS_MAX];
    let mut iovecs = [libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    }];
    // SAFETY: the one vector describes `buffer`, which is exclusively borrowed for the whole call and may hold any
    // bytes.
    let (received, fd_count) = unsafe { stream.recv_with_fds(&mut iovecs, &mut fds) }
        .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))?;
    let files = fds
        .iter()
        .take(fd_count)
        // SAFETY: the kernel has just put these descriptors into our table, so they have no other owner.
        .map(|fd| unsafe { File::from_raw_fd(*fd) })
        .collect();
    Ok((received, files))
}
