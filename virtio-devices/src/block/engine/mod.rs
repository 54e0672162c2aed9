//! I/O on an image: by io_uring, or by system calls on the worker thread. `docs/decisions/0004-block-io-engine.md`
//! states the default and the reasons.

#![allow(unsafe_code)]
// UNSAFETY: declares `IoEngine::submit`, whose callers guarantee that memory stays valid.

mod bounce;
mod calls;
mod io_uring;
mod sync;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::image::Image;
use io_uring::IoUringEngine;
use sync::SyncEngine;

pub(super) use calls::ZERO_BUFFER_BYTES;

/// The engine that serves a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// io_uring if the kernel supports and allows it, otherwise system calls.
    #[default]
    Auto,
    /// io_uring; an error if it is not available.
    IoUring,
    /// System calls on the worker thread, one at a time.
    Sync,
}

/// One operation on the image. Offsets and lengths in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) enum IoOperation<'a> {
    Read {
        offset: u64,
        into: &'a [libc::iovec],
    },
    Write {
        offset: u64,
        from: &'a [libc::iovec],
    },
    /// Writes up to [`ZERO_BUFFER_BYTES`] zeroes.
    WriteZeroBuffer { offset: u64, bytes: u64 },
    /// `fdatasync`.
    Sync,
    /// Deallocates; the range reads as zeroes afterwards.
    PunchHole { offset: u64, bytes: u64 },
    /// Zeroes the range and keeps it allocated.
    ZeroRange { offset: u64, bytes: u64 },
    /// BLKDISCARD on a block device; the content is undefined afterwards.
    DeviceDiscard { offset: u64, bytes: u64 },
}

/// The end of an operation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Completion {
    /// The id given to `submit`.
    pub(super) id: u16,
    /// Number of bytes moved (may be fewer than requested), or the negated errno.
    pub(super) result: i32,
}

/// Executes operations for one queue, on that queue's worker thread.
pub(super) trait IoEngine: Send {
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

/// Creates the engine for one queue of `depth` requests.
///
/// # Errors
/// io_uring was configured and is not available.
pub(super) fn new_engine(
    choice: EngineChoice,
    image: &Arc<Image>,
    depth: u16,
) -> io::Result<Box<dyn IoEngine>> {
    if choice == EngineChoice::Sync {
        return Ok(Box::new(SyncEngine::new(Arc::clone(image))));
    }
    match IoUringEngine::new(Arc::clone(image), depth) {
        Ok(engine) => Ok(Box::new(engine)),
        Err(error) if choice == EngineChoice::Auto => {
            log::info!(
                "restricted io_uring is not available ({error}); disk I/O uses system calls"
            );
            Ok(Box::new(SyncEngine::new(Arc::clone(image))))
        }
        Err(error) => Err(error),
    }
}
