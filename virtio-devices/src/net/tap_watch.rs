//! Watches a tap for the events that a worker waits for.
//!
//! The worker's own event set watches only for readability, and only code that the worker calls may change it. A tap
//! must also be watched for writability. While the guest has provided no buffers, the tap must not be watched, because
//! a frame that cannot be delivered would wake the worker endlessly. The tap is therefore in a separate event set,
//! which is readable when an awaited event of the tap occurs.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::device::WorkerError;

/// An event set that contains at most the tap.
#[derive(Debug)]
pub(super) struct TapWatch {
    epoll: Epoll,
    tap: RawFd,
    wanted: EventSet,
}

impl TapWatch {
    /// Creates an empty event set. `tap` must stay open as long as it exists.
    pub(super) fn new(tap: RawFd) -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            tap,
            wanted: EventSet::empty(),
        })
    }

    /// Starts or stops waiting for a readable frame.
    pub(super) fn readable(&mut self, wanted: bool) -> Result<(), WorkerError> {
        self.change(EventSet::IN, wanted)
    }

    /// Starts or stops waiting until the tap accepts a frame.
    pub(super) fn writable(&mut self, wanted: bool) -> Result<(), WorkerError> {
        self.change(EventSet::OUT, wanted)
    }

    /// Whether this waits for a readable frame.
    pub(super) fn wants_readable(&self) -> bool {
        self.wanted.contains(EventSet::IN)
    }

    /// Whether this waits until the tap accepts a frame.
    pub(super) fn wants_writable(&self) -> bool {
        self.wanted.contains(EventSet::OUT)
    }

    fn change(&mut self, bit: EventSet, on: bool) -> Result<(), WorkerError> {
        let before = self.wanted;
        let mut after = before;
        after.set(bit, on);
        if after == before {
            return Ok(());
        }
        // Errors are reported even for a descriptor with an empty event mask, hence Delete instead of Modify with an
        // empty mask.
        let operation = if before.is_empty() {
            ControlOperation::Add
        } else if after.is_empty() {
            ControlOperation::Delete
        } else {
            ControlOperation::Modify
        };
        self.epoll
            .ctl(operation, self.tap, EpollEvent::new(after, 0))
            .map_err(|source| WorkerError::Host {
                what: "watching a tap",
                source,
            })?;
        self.wanted = after;
        Ok(())
    }
}

impl AsRawFd for TapWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}
