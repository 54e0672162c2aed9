//! Transmitting: from the guest to the tap (virtio 1.2 §5.1.6.2).

use std::io;
use std::os::fd::RawFd;

use super::counters::NetCounters;
use super::frame_io::{FRAME_BYTES_MAX, HEADER_BYTES, write_frame};
use crate::device::WorkerError;
use crate::queue::{ChainBuffers, Next, RamGuard, ServedQueue};
use crate::worker::{Throttle, Turn};

/// The reason why transmitting stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stopped {
    /// No more frames: wait for the guest.
    NoFrame,
    /// The tap is full: wait for it.
    NoRoom,
    /// The rate limit is reached: wait for its timer.
    Throttled,
    /// The turn is over; the queue has signalled its own doorbell.
    TurnOver,
}

/// The transmitting half of a queue pair.
pub(super) struct Transmitter {
    pub(super) queue: ServedQueue,
}

impl Transmitter {
    pub(super) fn new(queue: ServedQueue) -> Self {
        Self { queue }
    }

    /// Moves frames until there are no more or the tap is full. The caller signals the driver.
    ///
    /// # Errors
    /// The ring is unusable.
    pub(super) fn run(
        &mut self,
        tap: RawFd,
        ram: &RamGuard,
        counters: &NetCounters,
        throttle: &mut Throttle,
        turn: &mut Turn,
    ) -> Result<Stopped, WorkerError> {
        self.queue.disable_doorbell(ram)?;
        loop {
            if !throttle.admits() {
                counters.throttled.count();
                return Ok(Stopped::Throttled);
            }
            let popped = match self.queue.next(ram, turn)? {
                Next::Chain(popped) => popped,
                Next::Empty if self.queue.enable_doorbell(ram)? => continue,
                Next::Empty => return Ok(Stopped::NoFrame),
                Next::TurnOver => return Ok(Stopped::TurnOver),
            };
            let sent = match popped.buffers {
                Ok(ChainBuffers { readable, writable })
                    if writable.bytes() == 0
                        && (HEADER_BYTES + 1..=FRAME_BYTES_MAX).contains(&readable.bytes()) =>
                {
                    turn.charge_call(1, readable.bytes() as u64);
                    write_frame(tap, &readable)
                }
                other => {
                    if counters.bad_requests.count_loudly() {
                        log::warn!("guest sent a bad frame: {:?}", other.err());
                    }
                    self.queue.push_used(ram, popped.head, 0)?;
                    continue;
                }
            };
            match sent {
                Ok(bytes) => {
                    let bytes = bytes.saturating_sub(HEADER_BYTES);
                    throttle.charge(bytes as u64);
                    counters.transmitted(bytes);
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        self.queue.unpop(1);
                        return Ok(Stopped::NoRoom);
                    }
                    io::ErrorKind::Interrupted => {
                        self.queue.unpop(1);
                        continue;
                    }
                    _ => counters.tx_drops.count(),
                },
            }
            self.queue.push_used(ram, popped.head, 0)?;
        }
    }
}
