//! Receiving: from the tap to the guest (virtio 1.2 §5.1.6.3, §5.1.6.4).
//!
//! Buffers that the guest has provided are taken ahead of frames and kept in order. A frame goes to the first buffer
//! or, with mergeable buffers, to as many from the front as it needs. A frame that exceeds all available buffers is
//! held until the guest has provided more, because it cannot be returned to the tap.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;

use super::counters::NetCounters;
use super::frame_io::{FRAME_BYTES_MAX, FrameReader, HEADER_BYTES, Read};
use crate::device::WorkerError;
use crate::queue::{ChainBuffers, GuestBuffers, Next, Popped, RamGuard, ServedQueue};
use crate::worker::{Throttle, Turn};

/// The offset of `num_buffers` in the header.
const NUM_BUFFERS_AT: usize = 10;

/// The reason why receiving stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stopped {
    /// No more frames: wait for the tap.
    NoFrame,
    /// No more buffers: wait for the guest.
    NoBuffer,
    /// The rate limit is reached: wait for its timer.
    Throttled,
    /// The turn is over: the tap is still readable.
    TurnOver,
    /// The tap fails: try again at the guest's next notification.
    TapFailed,
}

/// A chain that was taken from the ring in advance.
struct Ready {
    head: u16,
    /// `None`: unusable, to be returned in its order.
    buffers: Option<GuestBuffers>,
}

/// The receiving half of a queue pair.
pub(super) struct Receiver {
    pub(super) queue: ServedQueue,
    mergeable: bool,
    ready: VecDeque<Ready>,
    ready_bytes: usize,
    reader: FrameReader,
    /// Space for one frame, allocated when the buffers first were too small for the longest frame.
    spill: Vec<u8>,
    /// Length of the held frame.
    held_bytes: Option<usize>,
}

impl Receiver {
    pub(super) fn new(queue: ServedQueue, mergeable: bool) -> Self {
        Self {
            queue,
            mergeable,
            ready: VecDeque::new(),
            ready_bytes: 0,
            reader: FrameReader::default(),
            spill: Vec::new(),
            held_bytes: None,
        }
    }

    /// Puts buffers taken in advance back, as if never taken.
    pub(super) fn put_back(&mut self) {
        // Never more than the ring has entries.
        self.queue.unpop(self.ready.len() as u16);
        self.ready.clear();
        self.ready_bytes = 0;
    }

    /// Moves frames until there are no more or one cannot be delivered. The caller signals the driver.
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
        let stopped = self.receive(tap, ram, counters, throttle, turn);
        // The guest may unmap them before there is a frame.
        if self.queue.is_translated() {
            self.put_back();
        }
        stopped
    }

    fn receive(
        &mut self,
        tap: RawFd,
        ram: &RamGuard,
        counters: &NetCounters,
        throttle: &mut Throttle,
        turn: &mut Turn,
    ) -> Result<Stopped, WorkerError> {
        self.queue.disable_doorbell(ram)?;
        while !turn.is_over() {
            self.fill(ram, counters, turn)?;
            if self
                .ready
                .front()
                .is_none_or(|front| front.buffers.is_none())
            {
                if self.queue.enable_doorbell(ram)? {
                    continue;
                }
                return Ok(Stopped::NoBuffer);
            }
            if let Some(bytes) = self.held_bytes {
                if self.deliver_held(ram, bytes, counters)? || self.queue.enable_doorbell(ram)? {
                    continue;
                }
                return Ok(Stopped::NoBuffer);
            }
            if !throttle.admits() {
                counters.throttled.count();
                return Ok(Stopped::Throttled);
            }
            // Without mergeable buffers the guest cannot provide the rest.
            if self.mergeable && self.ready_bytes < FRAME_BYTES_MAX {
                self.spill.resize(FRAME_BYTES_MAX, 0);
            }
            let usable = self.ready.iter().map_while(|ready| ready.buffers.as_ref());
            let usable = usable.take(if self.mergeable { usize::MAX } else { 1 });
            turn.charge_call(1, FRAME_BYTES_MAX as u64);
            let read = self.reader.read(tap, usable, &mut self.spill);
            if let Ok(Read::Frame(bytes) | Read::Spilled(bytes)) = read {
                throttle.charge(bytes.saturating_sub(HEADER_BYTES) as u64);
            }
            match read {
                Ok(Read::Frame(bytes)) => self.deliver(ram, bytes, counters)?,
                Ok(Read::Spilled(bytes)) => self.held_bytes = Some(bytes),
                Ok(Read::TooLong) => counters.rx_drops.count(),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(Stopped::NoFrame),
                    io::ErrorKind::Interrupted => {}
                    _ => {
                        if counters.tap_errors.count_loudly() {
                            log::warn!("reading from a tap: {error}");
                        }
                        // The guest's next buffer triggers another attempt.
                        self.queue.enable_doorbell(ram)?;
                        return Ok(Stopped::TapFailed);
                    }
                },
            }
        }
        Ok(Stopped::TurnOver)
    }

    /// Takes buffers until the longest frame would fit, and returns unusable ones that have reached the front.
    fn fill(
        &mut self,
        ram: &RamGuard,
        counters: &NetCounters,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        // At most one ring of buffers per call, because a guest may add more in the meantime.
        for _ in 0..self.queue.size() {
            while let Some(Ready {
                head,
                buffers: None,
            }) = self.ready.front()
            {
                self.queue.push_used(ram, *head, 0)?;
                self.ready.pop_front();
            }
            let wanted = if self.mergeable { FRAME_BYTES_MAX } else { 1 };
            if self.ready_bytes >= wanted || self.ready.len() >= usize::from(self.queue.size()) {
                return Ok(());
            }
            let Next::Chain(popped) = self.queue.next(ram, turn)? else {
                return Ok(());
            };
            let ready = usable(popped, counters);
            self.ready_bytes += ready.buffers.as_ref().map_or(0, GuestBuffers::bytes);
            self.ready.push_back(ready);
        }
        Ok(())
    }

    /// Copies the held frame to the front buffers and passes it to the driver, if they are large enough. False: the
    /// guest has to provide more.
    fn deliver_held(
        &mut self,
        ram: &RamGuard,
        bytes: usize,
        counters: &NetCounters,
    ) -> Result<bool, WorkerError> {
        let usable = || self.ready.iter().map_while(|ready| ready.buffers.as_ref());
        if usable().map(GuestBuffers::bytes).sum::<usize>() < bytes {
            // A ring full of buffers that are too small, or blocked by an invalid chain, will never suffice.
            let in_vain = self.ready.len() >= usize::from(self.queue.size())
                || self.ready.iter().any(|ready| ready.buffers.is_none());
            if in_vain {
                self.held_bytes = None;
                counters.rx_drops.count();
            }
            return Ok(in_vain);
        }
        let mut left = &self.spill[..bytes];
        for buffers in usable() {
            left = &left[buffers.copy_in(left)..];
        }
        self.held_bytes = None;
        self.deliver(ram, bytes, counters)?;
        Ok(true)
    }

    /// Passes the frame in the front buffers to the driver.
    fn deliver(
        &mut self,
        ram: &RamGuard,
        bytes: usize,
        counters: &NetCounters,
    ) -> Result<(), WorkerError> {
        if bytes < HEADER_BYTES {
            counters.rx_drops.count();
            return Ok(());
        }
        let mut left = bytes;
        let mut count: usize = 0;
        for ready in &self.ready {
            let room = ready.buffers.as_ref().map_or(0, GuestBuffers::bytes);
            left = left.saturating_sub(room);
            count += 1;
            if left == 0 {
                break;
            }
        }
        if let Some(Ready {
            buffers: Some(first),
            ..
        }) = self.ready.front()
        {
            // At most one per ring entry, so it fits.
            first.copy_in_at(NUM_BUFFERS_AT, &(count as u16).to_le_bytes());
        }
        let mut left = bytes;
        let ready_bytes = &mut self.ready_bytes;
        let used = self.ready.drain(..count).map(|ready| {
            let room = ready.buffers.as_ref().map_or(0, GuestBuffers::bytes);
            *ready_bytes -= room;
            let written = left.min(room);
            left -= written;
            // A frame has at most FRAME_BYTES_MAX bytes.
            (ready.head, written as u32)
        });
        self.queue.push_used_together(ram, used)?;
        counters.received(bytes - HEADER_BYTES);
        Ok(())
    }
}

/// A receive buffer must be writable throughout and hold at least a header.
fn usable(popped: Popped, counters: &NetCounters) -> Ready {
    let head = popped.head;
    match popped.buffers {
        Ok(ChainBuffers { readable, writable })
            if readable.bytes() == 0 && writable.bytes() >= HEADER_BYTES =>
        {
            Ready {
                head,
                buffers: Some(writable),
            }
        }
        other => {
            if counters.bad_requests.count_loudly() {
                log::warn!("guest offered a bad receive buffer: {:?}", other.err());
            }
            Ready {
                head,
                buffers: None,
            }
        }
    }
}
