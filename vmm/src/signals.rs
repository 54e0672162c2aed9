//! SIGTERM and SIGINT end the VMM in good order.
//!
//! They are blocked before any thread is started, which all threads inherit, and unblocked on the main thread alone
//! once there is somebody to tell. So no vCPU or worker is ever interrupted by them, and no thread has to wait for them.

// UNSAFETY: a signal handler may only call what is async-signal-safe, which `write` is and the standard library is not.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{block_signal, register_signal_handler, unblock_signal};

/// Signals that mean "please end".
const EXIT_SIGNALS: [libc::c_int; 2] = [libc::SIGTERM, libc::SIGINT];

/// The descriptor the handler writes to; -1 before there is one.
static EXIT_FD: AtomicI32 = AtomicI32::new(-1);

/// Why signals cannot be handled.
#[derive(Debug, thiserror::Error)]
pub enum SignalsError {
    /// The mask cannot be changed. The cause is no `std::error::Error`, so its text stands here.
    #[error("Cannot change the signal mask: {0}")]
    Mask(vmm_sys_util::signal::Error),
    /// No handler.
    #[error("Cannot install the handler of signal {signal}")]
    Handler {
        /// The signal's number.
        signal: libc::c_int,
        /// The system's answer.
        #[source]
        source: vmm_sys_util::errno::Error,
    },
}

/// Exit signals that wait until [`ExitSignals::deliver_to`].
#[derive(Debug)]
pub struct ExitSignals {
    event: Option<Arc<EventFd>>,
}

impl ExitSignals {
    /// Holds the signals back on this thread and on all that it starts. Call it on the main thread before any other.
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

    /// From now on, also for signals held back so far, writes to `event`. Call it on the main thread.
    ///
    /// # Errors
    /// A handler or the mask cannot be set.
    pub fn deliver_to(&mut self, event: Arc<EventFd>) -> Result<(), SignalsError> {
        EXIT_FD.store(event.as_raw_fd(), Ordering::Release);
        // Kept, because the handler knows its number.
        self.event = Some(event);
        for signal in EXIT_SIGNALS {
            register_signal_handler(signal, on_exit_signal)
                .map_err(|source| SignalsError::Handler { signal, source })?;
            unblock_signal(signal).map_err(SignalsError::Mask)?;
        }
        Ok(())
    }
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
    let fd = EXIT_FD.load(Ordering::Acquire);
    if fd < 0 {
        return;
    }
    let one = 1u64.to_ne_bytes();
    // SAFETY: `write` is async-signal-safe and reads the eight live bytes; `errno` is put back, because the interrupted
    // code may be about to look at it. A failure means that the event is pending already.
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
    fn exit_signals_wait_until_there_is_somebody_to_tell() {
        // A thread of its own, because the mask belongs to the thread and the others run other tests.
        std::thread::spawn(|| {
            let mut signals = ExitSignals::hold().unwrap();
            // SAFETY: sends a signal to this very thread, which holds it back.
            assert_eq!(unsafe { libc::raise(libc::SIGTERM) }, 0);
            let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
            assert!(event.read().is_err());
            signals.deliver_to(Arc::clone(&event)).unwrap();
            assert_eq!(event.read().unwrap(), 1);
        })
        .join()
        .unwrap();
    }
}
