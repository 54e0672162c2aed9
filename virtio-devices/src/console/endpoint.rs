//! The host's end of a console: descriptors that never make a thread wait.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

/// Where a console's bytes come from and go to; either may be missing.
#[derive(Debug, Default)]
pub struct ConsoleEndpoint {
    pub(super) input: Option<File>,
    pub(super) output: Option<File>,
}

impl ConsoleEndpoint {
    /// Takes descriptors that are non-blocking, or regular files. An input that
    /// ends or fails is not read again: keep the other end of a pseudo-terminal
    /// open, or it fails whenever nobody has it open.
    pub fn new(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        Self {
            input: input.map(File::from),
            output: output.map(File::from),
        }
    }

    /// Nothing comes in and what goes out is lost.
    pub fn null() -> Self {
        Self::default()
    }

    /// A non-blocking descriptor to read what `fd` reads.
    ///
    /// # Errors
    /// See [`ConsoleEndpoint::nonblocking_output`].
    pub fn nonblocking_input(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        nonblocking(fd, OpenOptions::new().read(true))
    }

    /// A non-blocking descriptor to write where `fd` writes. Terminals and pipes
    /// are opened anew, because O_NONBLOCK belongs to the open file and our
    /// standard output is often the shell's as well. Regular files never make
    /// anybody wait and keep their position.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated or opened anew.
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
        // A socket has no path to open; ENXIO. Nobody else reads or writes ours.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            let stream = UnixStream::from(OwnedFd::from(file));
            stream.set_nonblocking(true)?;
            Ok(stream.into())
        }
        Err(error) => Err(error),
    }
}
