//! A request on its way: which I/O operation is next, and when it is finished.
//!
//! ```text
//!   Read ───────────────────────────────────► done
//!   Write ──(cache is write-through)─► Sync ─► done
//!   Discard ─► PunchHole / DeviceDiscard ────► done
//!   WriteZeroes ─► PunchHole ─► ZeroRange ─► WriteZeroBuffer … ─► (Sync) ─► done
//!                  each only where the one before is not supported
//! ```
//! Short transfers repeat a step with what is left.

use std::time::Instant;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};

use super::engine::{IoOperation, ZERO_BUFFER_BYTES};
use crate::guest_buffers::GuestBuffers;

/// Repetitions of an operation the host could not take just now.
const RETRIES_MAX: u32 = 64;

/// What the request was, for the counters. Bytes are of the whole request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read(u64),
    Write(u64),
    Flush,
    Discard(u64),
    WriteZeroes(u64),
}

/// The operation to do next.
#[derive(Debug)]
pub(super) enum Step {
    Read {
        offset: u64,
        data: GuestBuffers,
    },
    Write {
        offset: u64,
        data: GuestBuffers,
    },
    Sync,
    Discard {
        offset: u64,
        bytes: u64,
        device: bool,
    },
    PunchHole {
        offset: u64,
        bytes: u64,
    },
    ZeroRange {
        offset: u64,
        bytes: u64,
    },
    WriteZeroBuffer {
        offset: u64,
        bytes: u64,
    },
}

/// A request being carried out.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) head: u16,
    pub(super) status: GuestBuffers,
    pub(super) kind: Kind,
    pub(super) started: Instant,
    /// Data is to be on stable storage before the request completes.
    pub(super) write_through: bool,
    pub(super) step: Step,
    pub(super) retries: u32,
}

/// What a completed operation means for its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// [`Job::operation`] has another operation.
    Again,
    /// Finished with this status byte; an errno if the host is to blame.
    Done { status: u8, host_errno: Option<i32> },
}

const OK: Progress = Progress::Done {
    status: VIRTIO_BLK_S_OK as u8,
    host_errno: None,
};

impl Job {
    /// The next operation.
    pub(super) fn operation(&self) -> IoOperation<'_> {
        match &self.step {
            Step::Read { offset, data } => IoOperation::Read {
                offset: *offset,
                into: data.iovecs(),
            },
            Step::Write { offset, data } => IoOperation::Write {
                offset: *offset,
                from: data.iovecs(),
            },
            Step::Sync => IoOperation::Sync,
            &Step::Discard {
                offset,
                bytes,
                device: true,
            } => IoOperation::DeviceDiscard { offset, bytes },
            &Step::Discard { offset, bytes, .. } | &Step::PunchHole { offset, bytes } => {
                IoOperation::PunchHole { offset, bytes }
            }
            &Step::ZeroRange { offset, bytes } => IoOperation::ZeroRange { offset, bytes },
            &Step::WriteZeroBuffer { offset, bytes } => IoOperation::WriteZeroBuffer {
                offset,
                bytes: bytes.min(ZERO_BUFFER_BYTES),
            },
        }
    }

    /// Takes the result of that operation: bytes moved, or a negated errno.
    pub(super) fn advance(&mut self, result: i32) -> Progress {
        match u64::try_from(result) {
            Ok(moved) => self.succeeded(moved),
            Err(_) => self.failed(-result),
        }
    }

    fn succeeded(&mut self, moved: u64) -> Progress {
        let left = match &mut self.step {
            Step::Read { offset, data } | Step::Write { offset, data } => {
                data.advance(moved as usize);
                *offset += moved;
                data.bytes() as u64
            }
            Step::WriteZeroBuffer { offset, bytes } => {
                *offset += moved;
                *bytes = bytes.saturating_sub(moved);
                *bytes
            }
            Step::Sync | Step::Discard { .. } | Step::PunchHole { .. } | Step::ZeroRange { .. } => {
                0
            }
        };
        if left == 0 {
            return self.moved_all();
        }
        if moved == 0 {
            // The image has become shorter under us.
            return io_error(libc::EIO);
        }
        Progress::Again
    }

    fn moved_all(&mut self) -> Progress {
        let writes = matches!(self.kind, Kind::Write(_) | Kind::WriteZeroes(_));
        if self.write_through && writes && !matches!(self.step, Step::Sync) {
            self.step = Step::Sync;
            return Progress::Again;
        }
        OK
    }

    fn failed(&mut self, errno: i32) -> Progress {
        let unsupported = matches!(errno, libc::EOPNOTSUPP | libc::ENODEV | libc::EINVAL);
        match (&self.step, errno) {
            (_, libc::EINTR | libc::EAGAIN) if self.retries < RETRIES_MAX => {
                self.retries += 1;
                Progress::Again
            }
            (Step::Discard { .. }, libc::EOPNOTSUPP) => Progress::Done {
                status: VIRTIO_BLK_S_UNSUPP as u8,
                host_errno: None,
            },
            (&Step::PunchHole { offset, bytes }, _) if unsupported => {
                self.step = Step::ZeroRange { offset, bytes };
                Progress::Again
            }
            (&Step::ZeroRange { offset, bytes }, _) if unsupported => {
                self.step = Step::WriteZeroBuffer { offset, bytes };
                Progress::Again
            }
            _ => io_error(errno),
        }
    }
}

fn io_error(errno: i32) -> Progress {
    Progress::Done {
        status: VIRTIO_BLK_S_IOERR as u8,
        host_errno: Some(errno),
    }
}
