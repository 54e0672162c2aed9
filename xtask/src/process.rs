//! Starts child processes that cannot outlive this one, and waits for them with a deadline.
#![allow(unsafe_code)]
// UNSAFETY: prctl, kill and pre_exec have no safe form in std.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// The signal that a child gets from the kernel when this process ends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tie {
    /// SIGKILL.
    Kill,
    /// SIGTERM, for a child that must stop its own children.
    Terminate,
}

/// Starts `command`, which ends when this process does, for any reason. It inherits the descriptors `inherited`, which
/// the caller keeps open during the call.
///
/// Must be called on the main thread: the kernel sends the signal when the forking thread ends.
pub(crate) fn spawn_tied(command: &mut Command, tie: Tie, inherited: Vec<RawFd>) -> Result<Child> {
    let signal = match tie {
        Tie::Kill => libc::SIGKILL,
        Tie::Terminate => libc::SIGTERM,
    };
    let parent = std::process::id();
    command.stdin(Stdio::null());
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

/// Script of the shell that leads a group: runs its arguments, and on SIGTERM ends all processes started by them. A
/// signal interrupts `wait` immediately, but not a program in the foreground.
const LEAD_GROUP: &str = r#"trap 'trap - TERM; kill -TERM 0' TERM; "$@" & wait $!"#;

/// As [`spawn_tied`], for a program such as make that starts others through shells, which do not forward SIGTERM: all
/// of them end with this process. `stdout` and `stderr` are the group's.
pub(crate) fn spawn_tied_group(
    command: &Command,
    stdout: impl Into<Stdio>,
    stderr: impl Into<Stdio>,
) -> Result<Child> {
    let mut shell = Command::new("sh");
    shell.args(["-c", LEAD_GROUP, "sh"]);
    shell.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        shell.current_dir(dir);
    }
    shell.stdout(stdout).stderr(stderr).process_group(0);
    spawn_tied(&mut shell, Tie::Terminate, Vec::new())
}

/// Waits for the child's end; `None` if it was killed because of a timeout.
pub(crate) fn wait(child: Child, timeout: Option<Duration>) -> Result<Option<ExitStatus>> {
    let begin = Instant::now();
    wait_while(child, || time_left(timeout, begin))
}

/// The rest of a time limit that began at `since`; without one, for ever.
pub(crate) fn time_left(limit: Option<Duration>, since: Instant) -> Duration {
    limit.map_or(Duration::MAX, |limit| limit.saturating_sub(since.elapsed()))
}

/// Waits for the child's end; `None` if it was killed because `time_left` returned zero. `time_left` is called again
/// whenever the time that it returned has passed.
pub(crate) fn wait_while(
    mut child: Child,
    time_left: impl Fn() -> Duration,
) -> Result<Option<ExitStatus>> {
    let pid = child.id();
    let (sender, receiver) = mpsc::channel();
    let waiter = thread::spawn(move || {
        let ended = child.wait();
        // The receiver is dropped only after a timeout, when the result is no longer needed.
        sender.send(()).ok();
        ended
    });
    let in_time = loop {
        let left = time_left();
        if left.is_zero() {
            break receiver.try_recv().is_ok();
        }
        if receiver.recv_timeout(left).is_ok() {
            break true;
        }
    };
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
    use std::io::{BufRead as _, BufReader};

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

    #[test]
    fn group_that_shall_end_leaves_no_grandchild() {
        let mut command = Command::new("sh");
        // The inner shell waits, so it must be signalled as well.
        command.args(["-c", r#"sh -c 'sleep 600 & echo $!; wait; :'; :"#]);
        let mut leader = spawn_tied_group(&command, Stdio::piped(), Stdio::inherit()).unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(leader.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        // SAFETY: no pointers. The process is our child and not reaped yet.
        unsafe {
            libc::kill(leader.id().cast_signed(), libc::SIGTERM);
        }
        assert!(!leader.wait().unwrap().success());
        // The pipe closes when the last of them ends, regardless of who reaps it.
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || sender.send(output.read_line(&mut String::new()).unwrap()));
        let rest = receiver.recv_timeout(Duration::from_secs(60));
        assert_eq!(rest, Ok(0), "{} still sleeps", line.trim());
    }

    #[test]
    fn group_gives_the_status_of_its_program() {
        let mut command = Command::new("sh");
        command.args(["-c", "exit $CODE"]).env("CODE", "7");
        let mut leader = spawn_tied_group(&command, Stdio::inherit(), Stdio::inherit()).unwrap();
        assert_eq!(leader.wait().unwrap().code(), Some(7));
    }
}
