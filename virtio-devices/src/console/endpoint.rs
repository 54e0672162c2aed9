//! The host side of a console: non-blocking descriptors.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

/// The source and destination of a console's bytes; either may be missing.
#[derive(Debug, Default)]
pub struct ConsoleEndpoint {
    pub(super) input: Option<File>,
    pub(super) output: Option<File>,
}

impl ConsoleEndpoint {
    /// Accepts descriptors that are non-blocking, or regular files. An input that ends or fails is not read again. Keep
    /// the other end of a pseudo-terminal open; otherwise reads fail whenever no other process has it open.
    pub fn new(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        Self {
            input: input.map(File::from),
            output: output.map(File::from),
        }
    }

    /// No input; all output is dropped.
    pub fn null() -> Self {
        Self::default()
    }

    /// A non-blocking descriptor that reads from the same source as `fd`.
    ///
    /// # Errors
    /// See [`ConsoleEndpoint::nonblocking_output`].
    pub fn nonblocking_input(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        nonblocking(fd, OpenOptions::new().read(true))
    }

    /// A non-blocking descriptor that writes to the same destination as `fd`. Terminals and pipes are reopened, because
    /// O_NONBLOCK belongs to the open file, and our standard output is often shared with the shell. Regular files never
    /// block and keep their position.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated or opened again.
    pub fn nonblocking_output(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        nonblocking(fd, OpenOptions::new().write(true))
    }
}

fn nonblocking(fd: BorrowedFd<'_>, options: &mut OpenOptions) -> io::Result<OwnedFd> {
    let own = fd.try_clone_to_owned()?;
    let file = File::from(own);
    if file.metadata()?.is_file() {
        return Ok(file.into());
    }
    let anew = options
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
        .open(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()));
    match anew {
        Ok(anew) => Ok(anew.into()),
        // A socket has no path to reopen (ENXIO). No other process reads or writes our sockets.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            let stream = UnixStream::from(OwnedFd::from(file));
            stream.set_nonblocking(true)?;
            Ok(stream.into())
        }
        Err(error) => Err(error),
    }
}
