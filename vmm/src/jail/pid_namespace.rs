//! A pid namespace in which the VMM is the first process.
//!
//! The kernel moves only children into a new pid namespace. Therefore the process that was started stays outside as the
//! waiter, and its child is the VMM:
//!
//! ```text
//! started process ─ fork ─► VMM: process 1 of the namespace, ends with the waiter
//!        │
//!        └► waiter.rs: forwards signals, waits, ends as the VMM did
//! ```
//!
//! The kernel ignores signals to process 1 that have no handler, except SIGKILL and SIGSTOP from outside and faults of the
//! process itself (`sig_task_ignored` in kernel/signal.c). SIGTERM and SIGINT are blocked here and get a handler later.
//! `abort` would end with a fault instead of SIGABRT, so SIGABRT gets a handler. SIGTTOU and SIGTTIN are ignored: a call
//! that the kernel interrupts with a signal that is not delivered would be repeated forever.

// UNSAFETY: forking is unsafe where there are other threads; signal handlers have no safe interface.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, IsTerminal, PipeReader, PipeWriter, Read};
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, set_parent_process_death_signal};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::JailError;
use super::waiter::{ABORTED, Waiter};

/// The VMM's id in the namespace of the waiter.
static OUTSIDE: OnceLock<u32> = OnceLock::new();

/// The VMM's end of its connection to the waiter, whose other end closes when the waiter ends.
#[derive(Debug)]
pub(super) struct Link(PipeReader);

/// Creates the namespace. Returns in the VMM, which is a new process. In the calling process, which becomes the waiter,
/// it returns only errors. `confine` takes the waiter's rights away. Must be called while there is a single thread.
pub(super) fn enter(confine: impl FnOnce() -> Result<(), JailError>) -> Result<Link, JailError> {
    let (reader, writer) = io::pipe().map_err(failed("create a pipe to the waiter"))?;
    // SAFETY: this process has a single thread. Only its children are affected.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }
        .map_err(|source| JailError::PidNamespace(source.into()))?;
    let waiter = Waiter::prepare().map_err(failed("block signals"))?;
    // SAFETY: this process has a single thread, so the child has no lock of another one.
    match unsafe { libc::fork() } {
        0 => {
            drop(writer);
            waiter
                .discard()
                .map_err(failed("restore the signal mask"))?;
            handle_signals().map_err(failed("set signal handlers"))?;
            Ok(Link(reader))
        }
        pid => match Pid::from_raw(pid).filter(|_| pid > 0) {
            Some(vmm) => {
                drop(reader);
                wait(waiter, vmm, &writer, confine)
            }
            None => Err(JailError::PidNamespace(io::Error::last_os_error())),
        },
    }
}

/// Becomes the waiter. If that fails, the VMM ends as well, because the caller closes `writer`.
fn wait(
    waiter: Waiter,
    vmm: Pid,
    writer: &PipeWriter,
    confine: impl FnOnce() -> Result<(), JailError>,
) -> Result<Link, JailError> {
    confine()?;
    waiter.confine(vmm, writer)?;
    waiter.run(vmm, writer)
}

impl Link {
    /// From now on, the VMM ends with the waiter. Must be called after the last change of the user, which would undo it.
    pub(super) fn bind(mut self) -> Result<(), JailError> {
        set_parent_process_death_signal(Some(Signal::KILL))
            .map_err(|source| JailError::failed("bind the VMM to its waiter", source))?;
        let mut pid = [0; size_of::<u32>()];
        if self.0.read_exact(&mut pid).is_err() || self.is_closed() {
            // The waiter has reported its error, or it was killed before the line above.
            std::process::exit(1);
        }
        // The process has one waiter.
        let _ = OUTSIDE.set(u32::from_ne_bytes(pid));
        Ok(())
    }

    /// The waiter never writes again.
    fn is_closed(&self) -> bool {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&now)) != Ok(0)
    }
}

/// The VMM's process id where it was started.
pub(super) fn outside_id() -> u32 {
    OUTSIDE.get().copied().unwrap_or_else(std::process::id)
}

/// Sets the handlers that process 1 needs.
fn handle_signals() -> io::Result<()> {
    let on_abort: extern "C" fn(libc::c_int) = on_abort;
    for (signal, handler) in [
        (libc::SIGTTOU, libc::SIG_IGN),
        (libc::SIGTTIN, libc::SIG_IGN),
        (libc::SIGABRT, on_abort as libc::sighandler_t),
    ] {
        // SAFETY: the handler only ends the process.
        if unsafe { libc::signal(signal, handler) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn on_abort(_signal: libc::c_int) {
    // SAFETY: ends the process without running any code of the interrupted program.
    unsafe { libc::_exit(ABORTED) }
}

/// Detaches a VMM in the background from its terminal, which it does not read there. In the namespace it cannot find out,
/// because the process groups of the terminal have no id there.
pub(super) fn detach_in_background() -> Result<(), JailError> {
    let stdin = io::stdin();
    // SAFETY: both calls take and return plain numbers.
    let (foreground, ours) = unsafe { (libc::tcgetpgrp(stdin.as_raw_fd()), libc::getpgrp()) };
    if !stdin.is_terminal() || foreground == -1 || foreground == ours {
        return Ok(());
    }
    let null = File::open("/dev/null").map_err(failed("open /dev/null"))?;
    // SAFETY: replaces standard input, which has no owner in Rust.
    if unsafe { libc::dup2(null.as_raw_fd(), stdin.as_raw_fd()) } < 0 {
        return Err(failed("replace standard input")(io::Error::last_os_error()));
    }
    Ok(())
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> JailError {
    move |source| JailError::Failed {
        what: what.to_owned(),
        source,
    }
}
