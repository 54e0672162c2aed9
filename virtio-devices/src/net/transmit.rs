//! From the guest to the tap (virtio 1.2 §5.1.6.2).

use std::io;
use std::os::fd::RawFd;

use super::counters::NetCounters;
use super::frame_io::write_frame;
use super::{FRAME_BYTES_MAX, FRAMES_PER_TURN, HEADER_BYTES};
use crate::device::WorkerError;
use crate::guest_buffers::{ChainBuffers, RamGuard};
use crate::served_queue::ServedQueue;

/// Why transmitting stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stopped {
    /// No more frames: wait for the guest.
    NoFrame,
    /// The tap has no room: wait for it.
    NoRoom,
    /// Others' turn.
    TurnOver,
}

/// The transmitting half of a queue pair.
pub(super) struct Transmitter {
    queue: ServedQueue,
}

impl Transmitter {
    pub(super) fn new(queue: ServedQueue) -> Self {
        Self { queue }
    }

    pub(super) fn queue_index(&self) -> u16 {
        self.queue.index()
    }

    /// Asks for another turn after the others.
    ///
    /// # Errors
    /// The doorbell is gone.
    pub(super) fn ring_again(&self) -> Result<(), WorkerError> {
        self.queue.ring_again()
    }

    /// Moves frames until something stops it.
    ///
    /// # Errors
    /// The ring is unusable.
    pub(super) fn run(
        &mut self,
        tap: RawFd,
        ram: &RamGuard,
        counters: &NetCounters,
    ) -> Result<Stopped, WorkerError> {
        let stopped = self.move_frames(tap, ram, counters)?;
        self.queue.signal(ram)?;
        Ok(stopped)
    }

    fn move_frames(
        &mut self,
        tap: RawFd,
        ram: &RamGuard,
        counters: &NetCounters,
    ) -> Result<Stopped, WorkerError> {
        self.queue.disable_doorbell(ram)?;
        for _ in 0..FRAMES_PER_TURN {
            let Some(popped) = self.queue.pop(ram)? else {
                if self.queue.enable_doorbell(ram)? {
                    continue;
                }
                return Ok(Stopped::NoFrame);
            };
            let sent = match popped.buffers {
                Ok(ChainBuffers { readable, writable })
                    if writable.bytes() == 0
                        && (HEADER_BYTES + 1..=FRAME_BYTES_MAX).contains(&readable.bytes()) =>
                {
                    write_frame(tap, &readable)
                }
                other => {
                    if NetCounters::count_loudly(&counters.bad_requests) {
                        log::warn!("guest sent a bad frame: {:?}", other.err());
                    }
                    self.queue.push_used(ram, popped.head, 0)?;
                    continue;
                }
            };
            match sent {
                Ok(bytes) => counters.transmitted(bytes.saturating_sub(HEADER_BYTES)),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        self.queue.unpop(1);
                        return Ok(Stopped::NoRoom);
                    }
                    io::ErrorKind::Interrupted => {
                        self.queue.unpop(1);
                        continue;
                    }
                    _ => NetCounters::count(&counters.tx_drops),
                },
            }
            self.queue.push_used(ram, popped.head, 0)?;
        }
        Ok(Stopped::TurnOver)
    }
}
