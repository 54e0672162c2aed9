//! Keeps other programs off the hardware threads that share a core with a vCPU. Only threads with the same cookie run
//! on one core at the same time (`PR_SCHED_CORE`, Linux's Documentation/admin-guide/hw-vuln/core-scheduling.rst).
//!
//! | `core_scheduling` | Cookies |
//! | --- | --- |
//! | `Vm` | one for all vCPUs of the machine |
//! | `Vcpu` | one for each vCPU |
//! | `Off` | none |
#![allow(unsafe_code)]
// UNSAFETY: this use of prctl has no safe wrapper.

use std::io;
use std::sync::Mutex;

use api::config::CoreScheduling;
use virtio_devices::Unpoisoned;

use super::CpuError;

// linux/prctl.h.
const PR_SCHED_CORE: libc::c_int = 62;
const PR_SCHED_CORE_GET: libc::c_ulong = 0;
const PR_SCHED_CORE_CREATE: libc::c_ulong = 1;
const PR_SCHED_CORE_SHARE_FROM: libc::c_ulong = 3;
const PR_SCHED_CORE_SCOPE_THREAD: libc::c_ulong = 0;
/// Refers to the calling thread.
const SELF: libc::pid_t = 0;

/// Assigns cookies to the vCPU threads of one machine.
#[derive(Debug)]
pub(super) struct CoreCookies {
    mode: CoreScheduling,
    /// The threads that have the common cookie. A new thread copies it from any of them, because a vCPU may be removed.
    sharing: Mutex<Vec<libc::pid_t>>,
}

impl CoreCookies {
    /// Checks whether the host supports core scheduling. A host without threads that share a core has nothing to
    /// separate.
    ///
    /// # Errors
    /// One cookie per vCPU is configured, and the kernel does not support cookies. One cookie for all vCPUs is the
    /// default and is skipped without support.
    pub(super) fn new(mode: CoreScheduling) -> Result<Self, CpuError> {
        let mode = match (mode, probe().err()) {
            (mode, None) => mode,
            (CoreScheduling::Vcpu, Some(source)) if source.raw_os_error() != Some(libc::ENODEV) => {
                return Err(CpuError::CoreScheduling(source));
            }
            (CoreScheduling::Off, Some(_)) => CoreScheduling::Off,
            (_, Some(reason)) => {
                log::info!("vCPUs are scheduled without regard to cores: {reason}");
                CoreScheduling::Off
            }
        };
        Ok(Self {
            mode,
            sharing: Mutex::default(),
        })
    }

    /// Called by each vCPU thread for itself, before it runs the guest.
    pub(super) fn take(&self) {
        let taken = match self.mode {
            CoreScheduling::Off => Ok(()),
            CoreScheduling::Vcpu => core(PR_SCHED_CORE_CREATE, SELF),
            CoreScheduling::Vm => self.share(),
        };
        if let Err(error) = taken {
            log::warn!("A vCPU runs without a core scheduling cookie: {error}");
        }
    }

    fn share(&self) -> io::Result<()> {
        // Locked until this thread has its cookie.
        let mut sharing = self.sharing.lock().unpoisoned();
        match sharing.first() {
            Some(thread) => core(PR_SCHED_CORE_SHARE_FROM, *thread)?,
            None => core(PR_SCHED_CORE_CREATE, SELF)?,
        }
        sharing.push(own_id());
        Ok(())
    }

    /// Called by each vCPU thread before it ends.
    pub(super) fn leave(&self) {
        let own = own_id();
        let mut sharing = self.sharing.lock().unpoisoned();
        sharing.retain(|thread| *thread != own);
    }
}

fn own_id() -> libc::pid_t {
    // SAFETY: has no arguments and cannot fail.
    unsafe { libc::gettid() }
}

fn core(operation: libc::c_ulong, thread: libc::pid_t) -> io::Result<()> {
    // SAFETY: these operations take no pointer.
    let result = unsafe {
        libc::prctl(
            PR_SCHED_CORE,
            operation,
            thread,
            PR_SCHED_CORE_SCOPE_THREAD,
            0_usize,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The calling thread's cookie; 0 if it has none.
fn probe() -> io::Result<u64> {
    let mut cookie = 0_u64;
    // SAFETY: the pointer is to a live integer of the size that this operation writes.
    let result = unsafe {
        libc::prctl(
            PR_SCHED_CORE,
            PR_SCHED_CORE_GET,
            SELF,
            PR_SCHED_CORE_SCOPE_THREAD,
            &raw mut cookie,
        )
    };
    match result {
        0 => Ok(cookie),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cookies(mode: CoreScheduling) -> Option<Vec<u64>> {
        if let Err(error) = probe() {
            test_skip::skip(format!("no core scheduling here: {error}"));
            return None;
        }
        let cores = CoreCookies::new(mode).unwrap();
        let take = || {
            cores.take();
            probe().unwrap()
        };
        // All threads live until the last one has its cookie.
        let barrier = &std::sync::Barrier::new(3);
        Some(std::thread::scope(|scope| {
            let threads = [(); 3].map(|()| {
                scope.spawn(move || {
                    let cookie = take();
                    barrier.wait();
                    cookie
                })
            });
            threads.map(|thread| thread.join().unwrap()).to_vec()
        }))
    }

    #[test]
    fn vcpu_added_after_the_first_has_left_has_the_cookie_of_the_others() {
        if let Err(error) = probe() {
            test_skip::skip(format!("no core scheduling here: {error}"));
            return;
        }
        let cores = &CoreCookies::new(CoreScheduling::Vm).unwrap();
        let take = || {
            cores.take();
            probe().unwrap()
        };
        let (second_has, first_may_go) = std::sync::mpsc::channel();
        let (third_has, second_may_go) = std::sync::mpsc::channel();
        let cookies = std::thread::scope(|scope| {
            let first = scope.spawn(move || {
                let cookie = take();
                first_may_go.recv().unwrap();
                cores.leave();
                cookie
            });
            while cores.sharing.lock().unwrap().is_empty() {
                std::thread::yield_now();
            }
            let second = scope.spawn(move || {
                let cookie = take();
                second_has.send(()).unwrap();
                second_may_go.recv().unwrap();
                cookie
            });
            let first = first.join().unwrap();
            let third = scope.spawn(take).join().unwrap();
            third_has.send(()).unwrap();
            [first, second.join().unwrap(), third]
        });
        assert!(cookies[0] != 0 && cookies.iter().all(|cookie| *cookie == cookies[0]));
    }

    #[test]
    fn vcpus_share_a_cookie_or_have_their_own() {
        if let Some(cookies) = cookies(CoreScheduling::Vm) {
            assert!(cookies[0] != 0 && cookies.iter().all(|cookie| *cookie == cookies[0]));
        }
        if let Some(mut cookies) = cookies(CoreScheduling::Vcpu) {
            cookies.sort_unstable();
            cookies.dedup();
            assert!(cookies.len() == 3 && cookies[0] != 0);
        }
        if let Some(cookies) = cookies(CoreScheduling::Off) {
            assert_eq!(cookies, [0; 3]);
        }
    }
}
