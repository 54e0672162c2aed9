//! The operator's terminal: raw while a guest uses it, always restored afterwards.
//!
//! Its attributes outlive the process, so they are restored when the guard is dropped, on `exit`, and before a panic's
//! message. Signal handlers call [`restore_terminal`].
#![allow(unsafe_code)]
// UNSAFETY: terminal attributes and `poll` have no safe interface in std.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::output::Sink;

/// The terminal's original attributes.
struct Saved {
    fd: RawFd,
    attributes: libc::termios,
}

static SAVED: OnceLock<Saved> = OnceLock::new();
static IS_RAW: AtomicBool = AtomicBool::new(false);

/// Restores the terminal's attributes if they were changed. Safe in a signal handler: one system call, no lock, no
/// allocation.
pub fn restore_terminal() {
    let Some(saved) = SAVED.get() else {
        return;
    };
    if IS_RAW.swap(false, Ordering::AcqRel) {
        // SAFETY: `attributes` is a valid termios of static lifetime that the call only reads. For a closed descriptor
        // the call returns an error.
        unsafe { libc::tcsetattr(saved.fd, libc::TCSANOW, &raw const saved.attributes) };
    }
}

extern "C" fn restore_at_exit() {
    restore_terminal();
}

/// While it exists, key presses go to the guest one by one and unprocessed.
#[derive(Debug)]
pub(super) struct RawMode;

impl RawMode {
    /// Makes standard input raw. `None` if it is not a terminal, if this process is in the background (changing the
    /// attributes would stop it), or if another guard exists.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() || !is_foreground(stdin.as_raw_fd()) {
            return Ok(None);
        }
        Self::enter_on(stdin.as_raw_fd())
    }

    fn enter_on(fd: RawFd) -> io::Result<Option<Self>> {
        let found = attributes(fd)?;
        let saved = SAVED.get_or_init(|| {
            restore_on_exit_and_panic();
            Saved {
                fd,
                attributes: found,
            }
        });
        if saved.fd != fd || IS_RAW.swap(true, Ordering::AcqRel) {
            return Ok(None);
        }
        let mut raw = found;
        make_raw(&mut raw);
        // SAFETY: `raw` is a valid termios that the call reads.
        if unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const raw) } != 0 {
            IS_RAW.store(false, Ordering::Release);
            return Err(io::Error::last_os_error());
        }
        Ok(Some(Self))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
    }
}

fn restore_on_exit_and_panic() {
    // SAFETY: the function has static lifetime and may run on any thread.
    if unsafe { libc::atexit(restore_at_exit) } != 0 {
        log::warn!("The terminal will not be restored if the program exits early");
    }
    let next = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore_terminal();
        next(panic);
    }));
}

fn attributes(fd: RawFd) -> io::Result<libc::termios> {
    let mut attributes = std::mem::MaybeUninit::uninit();
    // SAFETY: the call writes a whole termios or fails.
    if unsafe { libc::tcgetattr(fd, attributes.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: written by the call above, which succeeded.
    Ok(unsafe { attributes.assume_init() })
}

/// Raw input as with `cfmakeraw`; output processing is unchanged, so that the VMM's own messages still start at the
/// left margin.
fn make_raw(attributes: &mut libc::termios) {
    let output = attributes.c_oflag;
    // SAFETY: changes the fields of a valid termios.
    unsafe { libc::cfmakeraw(attributes) };
    attributes.c_oflag = output;
}

/// Makes a terminal pass bytes through unchanged in both directions.
pub(super) fn make_transparent(terminal: &OwnedFd) -> io::Result<()> {
    let mut raw = attributes(terminal.as_raw_fd())?;
    // SAFETY: changes the fields of a valid termios.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    // SAFETY: `raw` is a valid termios that the call reads.
    if unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &raw const raw) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether this process may use the terminal without being stopped. A terminal that is not the controlling terminal
/// reports no foreground group and stops no process.
fn is_foreground(terminal: RawFd) -> bool {
    // SAFETY: both calls take and return plain numbers.
    let (foreground, ours) = unsafe { (libc::tcgetpgrp(terminal), libc::getpgrp()) };
    foreground == -1 || foreground == ours
}

/// Standard output for a guest's text.
///
/// Its open file description is shared with the shell and must stay blocking. A terminal or pipe is therefore opened
/// once more. A file that cannot be reopened (a socket) is polled before each write.
pub(super) fn standard_output() -> io::Result<Sink> {
    let shared = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let kind = shared.metadata()?.file_type();
    if kind.is_file() {
        return Ok(Sink::new(shared));
    }
    if kind.is_char_device() || kind.is_fifo() {
        let own = File::options()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", shared.as_raw_fd()));
        if let Ok(own) = own {
            return Ok(Sink::new(own));
        }
    }
    Ok(Sink::blocking(shared))
}

/// Standard input, if it is interactive.
pub(super) fn standard_input() -> io::Result<Option<OwnedFd>> {
    let stdin = io::stdin();
    if stdin.is_terminal() && !is_foreground(stdin.as_raw_fd()) {
        return Ok(None);
    }
    stdin.as_fd().try_clone_to_owned().map(Some)
}

#[cfg(test)]
mod tests {
    use super::super::pty::Pty;
    use super::*;

    #[test]
    fn raw_mode_is_entered_once_and_left_on_drop() {
        let pty = Pty::open().unwrap();
        let fd = pty.slave.as_raw_fd();
        // Our ptys are transparent; make this one a cooked terminal again.
        let mut cooked = attributes(fd).unwrap();
        cooked.c_lflag |= libc::ICANON | libc::ECHO | libc::ISIG;
        cooked.c_oflag |= libc::OPOST;
        // SAFETY: a valid termios that the call reads.
        unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const cooked) };

        let guard = RawMode::enter_on(fd).unwrap().unwrap();
        let raw = attributes(fd).unwrap();
        assert_eq!(raw.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG), 0);
        assert_ne!(raw.c_oflag & libc::OPOST, 0);
        assert!(RawMode::enter_on(fd).unwrap().is_none());
        drop(guard);
        assert_eq!(attributes(fd).unwrap().c_lflag, cooked.c_lflag);
    }

    #[test]
    fn terminal_that_controls_nobody_is_free_to_use() {
        let pty = Pty::open().unwrap();
        assert!(is_foreground(pty.slave.as_raw_fd()));
    }

    #[test]
    fn raw_mode_of_a_file_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        assert!(RawMode::enter_on(file.as_raw_fd()).is_err());
    }
}
