//! A request in progress: its next I/O operation, and its completion.
//!
//! ```text
//!   Read ───────────────────────────────────► done
//!   Write ──(cache is write-through)─► Sync ─► done
//!   Discard ─► PunchHole / OwnDiscard ────► done
//!   WriteZeroes ─► PunchHole ─► ZeroRange ─► WriteZeroBuffer … ─► (Sync) ─► done
//!                  each only if the previous one is not supported
//! ```
//! Each step runs in operations of bounded size. After a short transfer, the step is repeated for the rest.

use std::time::Instant;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};

use super::engine::{IoOperation, ZERO_BUFFER_BYTES};
use crate::queue::GuestBuffers;

/// Repetitions of an operation that the host temporarily rejects.
const RETRIES_MAX: u32 = 64;

/// Maximum number of bytes that one operation reads, writes or zeroes: the maximum of one Linux request.
const PIECE_BYTES_MAX: u64 = 4 << 20;

/// Maximum number of bytes that one operation discards. Discarding moves no data, so its cost per byte is 64 times
/// lower.
const DISCARD_PIECE_BYTES_MAX: u64 = 64 * PIECE_BYTES_MAX;

/// Maximum number of clusters that one operation discards: each has an entry in a table, which is changed under a lock.
const DISCARD_PIECE_CLUSTERS_MAX: u64 = 64 << 10;

/// Maximum number of bytes that one operation discards on an image with these clusters, if it has any.
pub(super) fn discard_piece_bytes(cluster_bytes: Option<u32>) -> u64 {
    let clusters = cluster_bytes.map(|bytes| DISCARD_PIECE_CLUSTERS_MAX * u64::from(bytes));
    clusters.map_or(DISCARD_PIECE_BYTES_MAX, |bytes| {
        bytes.min(DISCARD_PIECE_BYTES_MAX)
    })
}

/// Minimum cost of a job, in bytes moved: the time of one access to a disk.
const COST_MIN: u64 = 64 << 10;

/// Cost of writing data to stable storage.
const SYNC_COST: u64 = 1 << 20;

/// The location of the data, and the part not yet moved.
#[derive(Debug)]
pub(super) struct Transfer {
    offset: u64,
    /// The part that the next operation moves.
    piece: GuestBuffers,
    /// The part after it.
    rest: Option<GuestBuffers>,
}

impl Transfer {
    pub(super) fn new(offset: u64, mut data: GuestBuffers) -> Self {
        if data.bytes() as u64 <= PIECE_BYTES_MAX {
            return Self {
                offset,
                piece: data,
                rest: None,
            };
        }
        Self {
            offset,
            piece: data.split_front(PIECE_BYTES_MAX as usize),
            rest: Some(data),
        }
    }

    /// `front` and then `data`.
    pub(super) fn with_front(offset: u64, front: GuestBuffers, data: GuestBuffers) -> Self {
        Self {
            offset,
            piece: front,
            rest: Some(data),
        }
    }

    /// Whether there is more to move.
    fn advance(&mut self, moved: u64) -> bool {
        self.offset += moved;
        self.piece.advance(moved as usize);
        if self.piece.bytes() == 0
            && let Some(rest) = &mut self.rest
        {
            self.piece = rest.split_front(PIECE_BYTES_MAX as usize);
        }
        self.piece.bytes() > 0
    }
}

/// A part of the image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

impl Range {
    /// The front of the range, up to a multiple of `bytes_max`: if the range is aligned, so is each piece.
    fn piece(self, bytes_max: u64) -> Self {
        Self {
            offset: self.offset,
            bytes: self.bytes.min(bytes_max - self.offset % bytes_max),
        }
    }

    /// Whether more than `done` bytes remain.
    fn advance(&mut self, done: u64) -> bool {
        self.offset += done;
        self.bytes = self.bytes.saturating_sub(done);
        self.bytes > 0
    }
}

/// The kind of the request, for the counters. Bytes are those of the whole request.
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
    Read(Transfer),
    Write(Transfer),
    Sync,
    /// Punches a hole, unless the image has its `own` way of discarding.
    Discard {
        range: Range,
        own: bool,
    },
    PunchHole(Range),
    ZeroRange(Range),
    WriteZeroBuffer(Range),
}

/// A request in progress.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) head: u16,
    pub(super) status: GuestBuffers,
    pub(super) kind: Kind,
    pub(super) started: Instant,
    /// The data must be on stable storage before the request completes.
    pub(super) write_through: bool,
    /// From [`discard_piece_bytes`].
    pub(super) discard_piece_bytes: u64,
    pub(super) step: Step,
    pub(super) retries: u32,
    /// Zeroes written so far, because the host cannot zero a range.
    pub(super) zero_bytes: u64,
}

/// The effect of a completed operation on its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// [`Job::operation`] returns another operation.
    Again,
    /// Finished with this status byte; with an errno if the host is at fault.
    Done { status: u8, host_errno: Option<i32> },
}

const OK: Progress = Progress::Done {
    status: VIRTIO_BLK_S_OK as u8,
    host_errno: None,
};

impl Job {
    /// The job's cost for the host, in bytes moved.
    pub(super) fn cost(&self) -> u64 {
        let cost = match self.kind {
            Kind::Read(bytes) | Kind::Write(bytes) | Kind::WriteZeroes(bytes) => bytes,
            Kind::Discard(bytes) => bytes / (self.discard_piece_bytes / PIECE_BYTES_MAX),
            Kind::Flush => SYNC_COST,
        };
        let sync_cost = if self.writes_through() { SYNC_COST } else { 0 };
        cost.max(COST_MIN) + sync_cost
    }

    /// Number of data bytes that the job moves between the guest and the image.
    pub(super) fn data_bytes(&self) -> u64 {
        match self.kind {
            Kind::Read(bytes) | Kind::Write(bytes) => bytes,
            Kind::WriteZeroes(_) | Kind::Discard(_) | Kind::Flush => 0,
        }
    }

    /// Whether the job takes too many operations for a pause to wait for all of them.
    pub(super) fn is_long(&self) -> bool {
        match self.kind {
            Kind::Read(bytes) | Kind::Write(bytes) | Kind::WriteZeroes(bytes) => {
                bytes > PIECE_BYTES_MAX
            }
            Kind::Discard(bytes) => bytes > self.discard_piece_bytes,
            Kind::Flush => false,
        }
    }

    fn writes_through(&self) -> bool {
        self.write_through && matches!(self.kind, Kind::Write(_) | Kind::WriteZeroes(_))
    }

    /// The next operation.
    pub(super) fn operation(&self) -> IoOperation<'_> {
        match &self.step {
            Step::Read(transfer) => IoOperation::Read {
                offset: transfer.offset,
                into: transfer.piece.iovecs(),
            },
            Step::Write(transfer) => IoOperation::Write {
                offset: transfer.offset,
                from: transfer.piece.iovecs(),
            },
            Step::Sync => IoOperation::Sync,
            Step::Discard { own, .. } => {
                let Range { offset, bytes } = self.piece();
                if *own {
                    IoOperation::OwnDiscard { offset, bytes }
                } else {
                    IoOperation::PunchHole { offset, bytes }
                }
            }
            Step::PunchHole(_) => {
                let Range { offset, bytes } = self.piece();
                IoOperation::PunchHole { offset, bytes }
            }
            Step::ZeroRange(_) => {
                let Range { offset, bytes } = self.piece();
                IoOperation::ZeroRange { offset, bytes }
            }
            Step::WriteZeroBuffer(_) => {
                let Range { offset, bytes } = self.piece();
                IoOperation::WriteZeroBuffer { offset, bytes }
            }
        }
    }

    /// The part of the image that the next operation concerns.
    pub(super) fn piece(&self) -> Range {
        match &self.step {
            Step::Read(transfer) | Step::Write(transfer) => Range {
                offset: transfer.offset,
                bytes: transfer.piece.bytes() as u64,
            },
            Step::Sync => Range {
                offset: 0,
                bytes: 0,
            },
            Step::Discard { range, .. } => range.piece(self.discard_piece_bytes),
            Step::PunchHole(range) | Step::ZeroRange(range) => range.piece(PIECE_BYTES_MAX),
            Step::WriteZeroBuffer(range) => Range {
                offset: range.offset,
                bytes: range.bytes.min(ZERO_BUFFER_BYTES),
            },
        }
    }

    /// Processes the result of that operation: bytes moved, or a negated errno.
    pub(super) fn advance(&mut self, result: i32) -> Progress {
        match u64::try_from(result) {
            Ok(moved) => self.succeeded(moved),
            Err(_) => self.failed(-result),
        }
    }

    fn succeeded(&mut self, moved: u64) -> Progress {
        let piece_bytes = self.piece().bytes;
        let (more, moved) = match &mut self.step {
            Step::Read(transfer) | Step::Write(transfer) => (transfer.advance(moved), moved),
            Step::WriteZeroBuffer(range) => {
                self.zero_bytes += moved;
                (range.advance(moved), moved)
            }
            Step::Sync => (false, 0),
            // These operations complete in full or fail.
            Step::Discard { range, .. } | Step::PunchHole(range) | Step::ZeroRange(range) => {
                (range.advance(piece_bytes), piece_bytes)
            }
        };
        if !more {
            return self.moved_all();
        }
        if moved == 0 {
            // The image was truncated during use.
            return io_error(libc::EIO);
        }
        Progress::Again
    }

    fn moved_all(&mut self) -> Progress {
        if self.writes_through() && !matches!(self.step, Step::Sync) {
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
            (&Step::PunchHole(range), _) if unsupported => {
                self.step = Step::ZeroRange(range);
                Progress::Again
            }
            (&Step::ZeroRange(range), _) if unsupported => {
                self.step = Step::WriteZeroBuffer(range);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Small clusters make a discard expensive, whatever its length.
    #[test]
    fn discards_are_bounded_in_clusters_and_bytes() {
        const MIB: u64 = 1 << 20;
        assert_eq!(discard_piece_bytes(None), 256 * MIB);
        for (cluster_bytes, mib) in [
            (512, 32),
            (1024, 64),
            (4096, 256),
            (65536, 256),
            (2 << 20, 256),
        ] {
            assert_eq!(discard_piece_bytes(Some(cluster_bytes)), mib * MIB);
        }
    }
}
