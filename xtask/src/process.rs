//! Child processes that cannot outlive this one, and waiting for them with a limit.
#![allow(unsafe_code)]
// UNSAFETY: prctl, kill and pre_exec have no safe form in std.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// What a child gets from the kernel when this process ends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tie {
    /// The end.
    Kill,
    /// The request to end, for a child that has children of its own to stop.
    Terminate,
}

/// Starts `command`, which ends when this process does, however it does. It inherits the
/// descriptors `inherited`, which the caller keeps open during the call.
///
/// Must be called on the main thread: the signal comes when the thread that forked ends.
pub(crate) fn spawn_tied(command: &mut Command, tie: Tie, inherited: Vec<RawFd>) -> Result<Child> {
    let signal = match tie {
        Tie::Kill => libc::SIGKILL,
        Tie::Terminate => libc::SIGTERM,
    };
    let parent = std::process::id();
    command.stdin(std::process::Stdio::null());
    // SAFETY: the closure makes system calls on numbers and allocates nothing; the descriptors
    // stay open until after the fork because the caller owns them.
    unsafe {
        command.pre_exec(move || {
            for fd in &inherited {
                libc::fcntl(*fd, libc::F_SETFD, 0);
            }
            libc::prctl(libc::PR_SET_PDEATHSIG, signal);
            // The parent may have died before the line above.
            if libc::getppid().cast_unsigned() != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
    command
        .spawn()
        .with_context(|| format!("starting {:?}", command.get_program()))
}

/// Waits for the child's end; `None` if time ran out and it was killed.
pub(crate) fn wait(mut child: Child, timeout: Option<Duration>) -> Result<Option<ExitStatus>> {
    let Some(timeout) = timeout else {
        return Ok(Some(child.wait().context("waiting for a child")?));
    };
    let pid = child.id();
    let (sender, receiver) = mpsc::channel();
    let waiter = thread::spawn(move || {
        let ended = child.wait();
        // The receiver is gone only after a timeout, when nobody asks any more.
        sender.send(()).ok();
        ended
    });
    let in_time = receiver.recv_timeout(timeout).is_ok();
    if !in_time {
        // SAFETY: no pointers. The process is our child and at worst a zombie that the waiting
        // thread is about to reap.
        unsafe {
            libc::kill(pid.cast_signed(), libc::SIGKILL);
        }
    }
    let ended = waiter.join().expect("the waiting thread does not panic");
    let ended = ended.context("waiting for a child")?;
    Ok(in_time.then_some(ended))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn child_that_ends_in_time_gives_its_status() {
        let child = spawn_tied(
            Command::new("sh").args(["-c", "exit 3"]),
            Tie::Kill,
            Vec::new(),
        )
        .unwrap();
        let ended = wait(child, Some(Duration::from_secs(60))).unwrap().unwrap();
        assert_eq!(ended.code(), Some(3));
    }

    #[test]
    fn child_that_runs_out_of_time_is_killed() {
        let child = spawn_tied(Command::new("sleep").arg("600"), Tie::Kill, Vec::new()).unwrap();
        let pid = child.id();
        assert!(
            wait(child, Some(Duration::from_millis(20)))
                .unwrap()
                .is_none()
        );
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}
