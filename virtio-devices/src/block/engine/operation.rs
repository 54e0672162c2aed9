//! The operations of an engine, and its interface.

#![allow(unsafe_code)]
// UNSAFETY: declares `IoEngine::submit`, whose callers guarantee that memory stays valid.

use std::io;
use std::os::fd::RawFd;

/// One operation on the image. Offsets and lengths in bytes.
#[derive(Debug, Clone, Copy)]
pub(in crate::block) enum IoOperation<'a> {
    Read {
        offset: u64,
        into: &'a [libc::iovec],
    },
    Write {
        offset: u64,
        from: &'a [libc::iovec],
    },
    /// Writes up to `ZERO_BUFFER_BYTES` zeroes.
    WriteZeroBuffer { offset: u64, bytes: u64 },
    /// `fdatasync`.
    Sync,
    /// Deallocates; the range reads as zeroes afterwards.
    PunchHole { offset: u64, bytes: u64 },
    /// Zeroes the range and keeps it allocated.
    ZeroRange { offset: u64, bytes: u64 },
    /// BLKDISCARD on a block device; the whole clusters of a qcow2 image. The content is undefined afterwards.
    OwnDiscard { offset: u64, bytes: u64 },
}

/// The end of an operation.
#[derive(Debug, Clone, Copy)]
pub(in crate::block) struct Completion {
    /// The id given to `submit`.
    pub(in crate::block) id: u16,
    /// Number of bytes moved (may be fewer than requested), or the negated errno.
    pub(in crate::block) result: i32,
}

/// Executes operations for one queue, on that queue's worker thread.
pub(in crate::block) trait IoEngine: Send {
    /// Readable while there are completions to reap. `None`: `submit` completes
    /// operations before it returns.
    fn completion_fd(&self) -> Option<RawFd>;

    /// Starts an operation. The number of operations in progress never exceeds the depth for which the engine was
    /// created.
    ///
    /// # Safety
    /// The vectors and the memory behind them must stay valid until the completion with this `id` has been reaped.
    ///
    /// # Errors
    /// The operation has not been started and will not complete.
    unsafe fn submit(&mut self, id: u16, operation: &IoOperation<'_>) -> io::Result<()>;

    /// Submits the started operations to the kernel.
    ///
    /// # Errors
    /// The kernel rejected them; the operations are still pending and the call may be repeated.
    fn flush(&mut self) -> io::Result<()>;

    /// Blocks until a completion can be reaped. Call it only with operations pending.
    ///
    /// # Errors
    /// As `flush`.
    fn wait(&mut self) -> io::Result<()>;

    /// Appends all available completions.
    fn reap(&mut self, completions: &mut Vec<Completion>);
}
