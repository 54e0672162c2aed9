//! Pins threads to host CPUs.
#![allow(unsafe_code)]
// UNSAFETY: pthread_setaffinity_np has no safe wrapper.

use std::io;
use std::mem;
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

/// Number of host CPUs that an affinity can name.
pub const HOST_CPUS_MAX: usize = libc::CPU_SETSIZE as usize;

/// Pins a thread to host CPUs, all of which must be below [`HOST_CPUS_MAX`].
///
/// # Errors
/// The kernel refused: this process may not use any of them.
pub fn pin<T>(thread: &JoinHandle<T>, host_cpus: &[usize]) -> io::Result<()> {
    // SAFETY: an all-zero `cpu_set_t` is the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    for &cpu in host_cpus {
        // SAFETY: `cpu` is below the set's size.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the thread is not joined while its handle is borrowed; the set is valid and has the given size.
    let result = unsafe {
        libc::pthread_setaffinity_np(thread.as_pthread_t(), size_of_val(&set), &raw const set)
    };
    match result {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
