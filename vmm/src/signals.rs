//! SIGTERM and SIGINT shut the VMM down cleanly.
//!
//! Both are blocked before any thread starts, and all threads inherit the mask. Only the main thread unblocks them,
//! once the control thread can receive the request. Therefore they never interrupt a vCPU or worker, and no thread has
//! to wait for them.

// UNSAFETY: a signal handler may only call what is async-signal-safe, which `write` is and the standard library is not.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{block_signal, register_signal_handler, unblock_signal};

/// Keeps the process alive when a file would exceed the process's limit (`RLIMIT_FSIZE`): the write or truncation fails
/// with EFBIG instead, which every writer handles. Must be called before any thread starts.
///
/// # Errors
/// The signal cannot be ignored.
pub fn survive_file_size_limit() -> std::io::Result<()> {
    // SAFETY: SIG_IGN is not a function, and nothing else in this process uses the signal.
    match unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Signals that request an exit.
const EXIT_SIGNALS: [libc::c_int; 2] = [libc::SIGTERM, libc::SIGINT];

/// The descriptor the handler writes to; -1 before there is one.
static EXIT_FD: AtomicI32 = AtomicI32::new(-1);
/// Whether an exit signal has been delivered.
static EXIT_ASKED: AtomicBool = AtomicBool::new(false);

/// Errors of setting up signal handling.
#[derive(Debug, thiserror::Error)]
pub enum SignalsError {
    /// The mask cannot be changed. The cause does not implement `std::error::Error`, so its text is stored here.
    #[error("Cannot change the signal mask: {0}")]
    Mask(vmm_sys_util::signal::Error),
    /// The handler cannot be installed.
    #[error("Cannot install the handler of signal {signal}")]
    Handler {
        /// The signal's number.
        signal: libc::c_int,
        /// The error from the system.
        #[source]
        source: vmm_sys_util::errno::Error,
    },
}

/// Exit signals that stay pending until [`ExitSignals::deliver_to`].
#[derive(Debug)]
pub struct ExitSignals {
    event: Option<Arc<EventFd>>,
}

impl ExitSignals {
    /// Blocks the signals on this thread and on all threads that it starts. Must be called on the main thread before it
    /// starts any other.
    ///
    /// # Errors
    /// The mask cannot be changed.
    pub fn hold() -> Result<Self, SignalsError> {
        for signal in EXIT_SIGNALS {
            match block_signal(signal) {
                Ok(()) | Err(vmm_sys_util::signal::Error::SignalAlreadyBlocked(_)) => {}
                Err(error) => return Err(SignalsError::Mask(error)),
            }
        }
        Ok(Self { event: None })
    }

    /// From now on, signals, including pending ones, write to `event`. Must be called on the main thread.
    ///
    /// # Errors
    /// A handler or the mask cannot be set.
    pub fn deliver_to(&mut self, event: Arc<EventFd>) -> Result<(), SignalsError> {
        EXIT_FD.store(event.as_raw_fd(), Ordering::Release);
        // Kept open, because the handler uses its number.
        self.event = Some(event);
        for signal in EXIT_SIGNALS {
            register_signal_handler(signal, on_exit_signal)
                .map_err(|source| SignalsError::Handler { signal, source })?;
            unblock_signal(signal).map_err(SignalsError::Mask)?;
        }
        Ok(())
    }
}

/// Whether a signal requested an exit. Later failures are consequences of that.
pub fn exit_was_asked_for() -> bool {
    EXIT_ASKED.load(Ordering::Acquire)
}

impl Drop for ExitSignals {
    fn drop(&mut self) {
        EXIT_FD.store(-1, Ordering::Release);
    }
}

extern "C" fn on_exit_signal(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    EXIT_ASKED.store(true, Ordering::Release);
    let fd = EXIT_FD.load(Ordering::Acquire);
    if fd < 0 {
        return;
    }
    let one = 1u64.to_ne_bytes();
    // SAFETY: `write` is async-signal-safe and reads the eight live bytes; `errno` is restored, because the interrupted
    // code may be about to read it. A failure means that the event is already pending.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(fd, one.as_ptr().cast(), one.len());
        *libc::__errno_location() = errno;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn file_size_signal_ends_nothing() {
        survive_file_size_limit().unwrap();
        // SAFETY: sends a signal to this thread, which ignores it.
        assert_eq!(unsafe { libc::raise(libc::SIGXFSZ) }, 0);
    }

    #[test]
    fn exit_signals_wait_until_there_is_somebody_to_tell() {
        // A separate thread, because the mask belongs to the thread and other threads run other tests.
        std::thread::spawn(|| {
            let mut signals = ExitSignals::hold().unwrap();
            // SAFETY: sends a signal to this thread, which blocks it.
            assert_eq!(unsafe { libc::raise(libc::SIGTERM) }, 0);
            let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
            assert!(event.read().is_err());
            signals.deliver_to(Arc::clone(&event)).unwrap();
            assert_eq!(event.read().unwrap(), 1);
            assert!(exit_was_asked_for());
        })
        .join()
        .unwrap();
    }
}
