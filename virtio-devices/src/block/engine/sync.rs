//! The synchronous engine, on the worker thread.

#![allow(unsafe_code)]
// UNSAFETY: passes the caller's guarantee about vectors on.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::calls::Calls;
use super::operation::{Completion, IoEngine, IoOperation};
use crate::block::image::Image;

pub(super) struct SyncEngine {
    calls: Calls,
    done: Vec<Completion>,
}

impl SyncEngine {
    pub(super) fn new(image: Arc<Image>) -> Self {
        Self {
            calls: Calls::new(image),
            done: Vec::new(),
        }
    }
}

impl IoEngine for SyncEngine {
    fn completion_fd(&self) -> Option<RawFd> {
        None
    }

    unsafe fn submit(&mut self, id: u16, operation: &IoOperation<'_>) -> io::Result<()> {
        // SAFETY: the memory is valid until the completion is reaped, which includes this call.
        let result = unsafe { self.calls.perform(operation) };
        self.done.push(Completion { id, result });
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.done);
    }
}
