//! The process that waits for the VMM outside of the VMM's pid namespace.
//!
//! | Event | Action |
//! | --- | --- |
//! | the VMM ends | ends with the same status or by the same signal |
//! | SIGTERM, SIGINT | sends it to the VMM, which shuts down |
//! | SIGTSTP | stops the VMM and itself until SIGCONT |
//! | another signal that ends a process | kills the VMM, and ends by that signal |
//! | SIGKILL | the kernel kills the VMM ([`super::pid_namespace`]) |
//!
//! It has no descriptors except its end of the link, no rights that the VMM lacks, and a system call filter. Until it
//! reaps the VMM, the VMM's id refers to no other process.

// UNSAFETY: signal masks, waiting for signals and for a child have no safe interface.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io::{self, PipeWriter};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr;

use api::WAITER_NAME;
use libc::c_int;
use rustix::process::{DumpableBehavior, Pid, set_dumpable_behavior};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::JailError;

/// Exit status of a VMM that aborted, which as process 1 cannot end by SIGABRT: a shell's status for that.
pub(super) const ABORTED: c_int = 128 + libc::SIGABRT;
/// Signals that the VMM handles.
const FORWARDED: [c_int; 2] = [libc::SIGTERM, libc::SIGINT];
/// Signals of a terminal or an operator that end the VMM without a pid namespace, because it does not handle them. The
/// rest of such signals end only the waiter; the kernel then kills the VMM.
const FATAL: [c_int; 6] = [
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGABRT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
];

/// Signals of the process that becomes the waiter. They stay pending until it waits for them.
#[derive(Debug)]
pub(super) struct Waiter {
    awaited: libc::sigset_t,
    /// The mask before.
    before: libc::sigset_t,
}

impl Waiter {
    /// Blocks the signals that the waiter handles. A signal that was ignored or blocked stays so, for example with
    /// `nohup`.
    pub(super) fn prepare() -> io::Result<Self> {
        // The caller may have ignored it, and then no child could be waited for.
        // SAFETY: SIG_DFL is not a function.
        if unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        let before = mask(libc::SIG_BLOCK, None)?;
        let mut awaited = empty();
        for signal in FORWARDED.into_iter().chain([libc::SIGCHLD]) {
            add(&mut awaited, signal);
        }
        for signal in FATAL.into_iter().chain([libc::SIGTSTP]) {
            // SAFETY: reads an initialised set.
            let is_blocked = unsafe { libc::sigismember(&raw const before, signal) } == 1;
            if !is_blocked && !is_ignored(signal)? {
                add(&mut awaited, signal);
            }
        }
        mask(libc::SIG_BLOCK, Some(&awaited))?;
        Ok(Self { awaited, before })
    }

    /// Restores the mask, in the process that does not wait.
    pub(super) fn discard(self) -> io::Result<()> {
        mask(libc::SIG_SETMASK, Some(&self.before)).map(drop)
    }

    /// Removes all that waiting does not need.
    pub(super) fn confine(&self, vmm: Pid, link: &PipeWriter) -> Result<(), JailError> {
        let failed = |what: &'static str| move |source| JailError::failed(what, source);
        let name = CString::new(WAITER_NAME).unwrap_or_default();
        rustix::thread::set_name(&name).map_err(failed("name the waiter"))?;
        // If the VMM dumped core, the waiter, which ends by the same signal, must not.
        set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(failed("make the waiter not dumpable"))?;
        let filter = filter(vmm, link).map_err(JailError::WaiterFilter)?;
        seccompiler::apply_filter(&filter).map_err(JailError::WaiterConfined)
    }

    /// Reports the VMM's id to it, and waits until it ends.
    pub(super) fn run(self, vmm: Pid, link: &PipeWriter) -> ! {
        let vmm = vmm.as_raw_nonzero().get();
        let pid = vmm.to_ne_bytes();
        let link = link.as_raw_fd();
        // SAFETY: writes live bytes. If it fails, the VMM has ended.
        unsafe { libc::write(link, pid.as_ptr().cast(), pid.len()) };
        close_all_except(link);
        loop {
            // SAFETY: reads an initialised set and returns nothing else.
            let signal = unsafe { libc::sigwaitinfo(&raw const self.awaited, ptr::null_mut()) };
            match signal {
                libc::SIGCHLD => {
                    if let Some(status) = reap(vmm, libc::WNOHANG) {
                        end_as(status);
                    }
                }
                libc::SIGTSTP => {
                    send(vmm, libc::SIGSTOP);
                    send(own_pid(), libc::SIGSTOP);
                    send(vmm, libc::SIGCONT);
                }
                signal if FORWARDED.contains(&signal) => send(vmm, signal),
                signal if FATAL.contains(&signal) => {
                    send(vmm, libc::SIGKILL);
                    reap(vmm, 0);
                    end_by(signal);
                }
                // Interrupted.
                _ => {}
            }
        }
    }
}

/// The filter of the waiter, which may signal only the VMM and itself.
fn filter(vmm: Pid, link: &PipeWriter) -> Result<BpfProgram, seccompiler::BackendError> {
    let first_is = |value: i32| {
        let value = u64::from(value.unsigned_abs());
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
        SeccompRule::new(vec![condition])
    };
    let vmm = vmm.as_raw_nonzero().get();
    let rules = BTreeMap::from([
        (libc::SYS_close_range, vec![]),
        (libc::SYS_exit_group, vec![]),
        (libc::SYS_getpid, vec![]),
        (libc::SYS_kill, vec![first_is(vmm)?, first_is(own_pid())?]),
        (libc::SYS_rt_sigprocmask, vec![]),
        (libc::SYS_rt_sigtimedwait, vec![]),
        (libc::SYS_wait4, vec![first_is(vmm)?]),
        (libc::SYS_write, vec![first_is(link.as_raw_fd())?]),
    ]);
    let (other, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
    SeccompFilter::new(rules, other, listed, TargetArch::x86_64)?.try_into()
}

/// The VMM's status once it has ended.
fn reap(vmm: libc::pid_t, flags: c_int) -> Option<c_int> {
    let mut status = 0;
    // SAFETY: writes one integer.
    let found = unsafe { libc::waitpid(vmm, &raw mut status, flags) };
    (found == vmm).then_some(status)
}

/// Ends as the VMM did.
fn end_as(status: c_int) -> ! {
    if libc::WIFSIGNALED(status) {
        end_by(libc::WTERMSIG(status));
    }
    match libc::WEXITSTATUS(status) {
        ABORTED => end_by(libc::SIGABRT),
        // SAFETY: ends this process, which has nothing to clean up.
        status => unsafe { libc::_exit(status) },
    }
}

fn end_by(signal: c_int) -> ! {
    let mut set = empty();
    add(&mut set, signal);
    // The exit below replaces a signal that does not end this process, because it is ignored.
    drop(mask(libc::SIG_UNBLOCK, Some(&set)));
    send(own_pid(), signal);
    // SAFETY: ends this process, which has nothing to clean up.
    unsafe { libc::_exit(128 + signal) }
}

fn send(pid: libc::pid_t, signal: c_int) {
    // SAFETY: takes plain numbers. It fails only if the VMM has ended, and then SIGCHLD is pending.
    unsafe { libc::kill(pid, signal) };
}

fn own_pid() -> libc::pid_t {
    // SAFETY: returns a number.
    unsafe { libc::getpid() }
}

fn close_all_except(fd: c_int) {
    let fd = fd.unsigned_abs();
    for (first, last) in [(0, fd.wrapping_sub(1)), (fd + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: nothing in this process uses a descriptor any more, except `fd`.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

fn empty() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the call initialises the set and cannot fail.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    }
}

fn add(set: &mut libc::sigset_t, signal: c_int) {
    // SAFETY: changes an initialised set. It fails only for a number that is not a signal.
    unsafe { libc::sigaddset(set, signal) };
}

/// Changes the mask of this thread, and returns the mask before.
fn mask(how: c_int, set: Option<&libc::sigset_t>) -> io::Result<libc::sigset_t> {
    let mut before = empty();
    let set = set.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: the set is null or initialised, and the call writes the old one.
    match unsafe { libc::sigprocmask(how, set, &raw mut before) } {
        0 => Ok(before),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_ignored(signal: c_int) -> io::Result<bool> {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: only reads the action into the buffer.
    if unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: written by the call above, which succeeded.
    Ok(unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN)
}
