//! The thread id of a vCPU, for code that kicks the vCPU without a handle.

use std::sync::atomic::{AtomicI32, Ordering};

use hypervisor::kick;

/// The thread of a vCPU, which may have ended.
#[derive(Debug, Default)]
pub(super) struct ThreadNumber(AtomicI32);

impl ThreadNumber {
    /// vCPU thread: it is the calling one until the result is dropped.
    pub(super) fn set(&self) -> OwnThread<'_> {
        self.0.store(kick::thread_number(), Ordering::SeqCst);
        OwnThread(self)
    }

    /// Kicks the vCPU, if its thread runs.
    pub(super) fn kick(&self) {
        match self.0.load(Ordering::SeqCst) {
            0 => {}
            thread => kick::kick_number(thread),
        }
    }
}

/// Forgets the thread when it ends.
#[derive(Debug)]
pub(super) struct OwnThread<'a>(&'a ThreadNumber);

impl Drop for OwnThread<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::SeqCst);
    }
}
