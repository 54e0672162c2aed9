//! Interrupts a vCPU while it runs the guest.
//!
//! To interrupt a vCPU, a thread sets its own flags and then sends [`signal`] to the vCPU's thread. If the vCPU is in
//! the guest, the signal ends `KVM_RUN`. If the vCPU thread is about to enter the guest, the signal handler has set
//! `immediate_exit` in the run page, and `KVM_RUN` returns immediately. The vCPU thread clears `immediate_exit`
//! *before* it checks the flags, so no kick is lost:
//!
//! ```text
//!   loop { immediate_exit = 0; check flags; KVM_RUN; }
//! ```
#![allow(unsafe_code)]
// UNSAFETY: a signal handler writes to the run page through a thread-local pointer.

use std::cell::Cell;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering, compiler_fence};
use std::thread::JoinHandle;

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::error::{Result, ioctl};
use crate::vcpu::Vcpu;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs; null if there is none. The initializer is constant and there
    /// is no destructor, so reading it in a signal handler allocates nothing.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that kicks a vCPU thread.
#[must_use]
pub fn signal() -> c_int {
    SIGRTMIN()
}

extern "C" fn on_kick(_signal: c_int, _info: *mut siginfo_t, _context: *mut c_void) {
    let address = IMMEDIATE_EXIT.get();
    if !address.is_null() {
        // SAFETY: the pointer is set only inside `with_kicks` on this thread, while the vCPU is borrowed there, so the
        // run page is mapped. A one-byte atomic store has no alignment requirement. All other accesses are non-atomic
        // ones by the same thread, so a handler on that thread cannot race with them.
        unsafe { AtomicU8::from_ptr(address) }.store(1, Ordering::Relaxed);
    }
}

/// Installs the handler of [`signal`] for the process. Idempotent.
///
/// # Errors
/// `sigaction` failed.
pub fn install_handler() -> Result<()> {
    register_signal_handler(signal(), on_kick).map_err(ioctl("sigaction"))
}

/// Runs `body`. Until it returns, kicks of this thread interrupt `vcpu`.
pub fn with_kicks<R>(vcpu: &mut Vcpu, body: impl FnOnce(&mut Vcpu) -> R) -> R {
    /// Clears the pointer to the run page, even if `body` unwinds.
    struct Disarm;
    impl Drop for Disarm {
        fn drop(&mut self) {
            IMMEDIATE_EXIT.set(ptr::null_mut());
            compiler_fence(Ordering::SeqCst);
        }
    }

    IMMEDIATE_EXIT.set(vcpu.immediate_exit_address());
    compiler_fence(Ordering::SeqCst);
    let _disarm = Disarm;
    body(vcpu)
}

/// The number of the calling thread, for [`kick_number`].
#[must_use]
pub fn thread_number() -> i32 {
    // SAFETY: the call takes no argument and always succeeds.
    unsafe { libc::gettid() }
}

/// Kicks the vCPU that the thread with this number runs. Has no effect if it runs none, or has ended.
pub fn kick_number(thread: i32) {
    // SAFETY: no memory is passed. The kernel finds only threads of this process, all of which have the handler.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
}

/// Kicks the vCPU that `thread` runs. Has no effect if the thread runs no vCPU or has ended.
pub fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: a thread that is not yet joined keeps its pthread id, and the handle cannot be joined while it is
    // borrowed. For a thread that has ended the call returns success or ESRCH; both mean that there is nothing to kick.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
}
