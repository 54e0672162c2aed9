//! The queue half: moves packets in and out of the rings.

use std::sync::Arc;

use state::{Saved, StateError, parts};
use vm_memory::GuestAddressSpace;

use super::counters::Shared;
use super::muxer::{Muxer, VsockConnectionsState};
use super::packet::{HEADER_BYTES, Header};
use crate::device::{Activation, GuestRam, HandlerState, QueueHandler, WorkerError};
use crate::queue::{ChainBuffers, ChainError, GuestBuffers, Next, Popped, ServedQueue};
use crate::taken::with_taken;
use crate::worker::{EventSources, Turn};

/// Queue numbers (virtio 1.2 §5.10.2). Buffers on the event queue, 2, are never used: no event is sent.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Token of the only source.
const TOKEN_HOST: u32 = 0;

/// Maximum number of data bytes in one packet, in either direction. Linux sends no more.
const DATA_BYTES_MAX: usize = 64 << 10;

struct Active {
    mem: GuestRam,
    receive: Option<ServedQueue>,
    transmit: Option<ServedQueue>,
    /// The event queue is kept for its position.
    others: Vec<ServedQueue>,
}

/// The queue half.
pub(super) struct VsockHandler {
    name: String,
    muxer: Muxer,
    shared: Arc<Shared>,
    data: Box<[u8]>,
    active: Option<Active>,
}

crate::debug_fields!(VsockHandler { name, muxer });

impl VsockHandler {
    pub(super) fn new(name: String, muxer: Muxer, shared: Arc<Shared>) -> Self {
        Self {
            name,
            muxer,
            shared,
            data: vec![0; DATA_BYTES_MAX].into_boxed_slice(),
            active: None,
        }
    }

    /// Processes the guest's packets.
    fn transmit(&mut self, active: &mut Active, turn: &mut Turn) -> Result<(), WorkerError> {
        let Some(queue) = &mut active.transmit else {
            return Ok(());
        };
        let ram = active.mem.memory();
        queue.disable_doorbell(&ram)?;
        loop {
            match queue.next(&ram, turn)? {
                Next::Chain(Popped { head, buffers }) => {
                    self.take_packet(buffers, turn);
                    queue.push_used(&ram, head, 0)?;
                }
                Next::Empty if queue.enable_doorbell(&ram)? => queue.disable_doorbell(&ram)?,
                Next::Empty | Next::TurnOver => break,
            }
        }
        queue.signal(&ram)
    }

    fn take_packet(&mut self, chain: Result<ChainBuffers, ChainError>, turn: &mut Turn) {
        self.shared.tx_packets.count();
        let Ok(ChainBuffers { mut readable, .. }) = chain else {
            return self.shared.bad_packet("unusable buffers");
        };
        let mut bytes = [0; HEADER_BYTES];
        if readable.copy_out(&mut bytes) < HEADER_BYTES {
            return self.shared.bad_packet("shorter than its header");
        }
        readable.advance(HEADER_BYTES);
        let header = Header::from_bytes(&bytes);
        let len = header.len as usize;
        if len > readable.bytes().min(DATA_BYTES_MAX) {
            return self
                .shared
                .bad_packet("shorter than its header states, or too long");
        }
        let data = &mut self.data[..len];
        readable.copy_out(data);
        self.shared.tx_bytes.add(len as u64);
        self.muxer.take_packet(&header, data, turn);
    }

    /// Passes waiting packets to the guest.
    fn receive(&mut self, active: &mut Active, turn: &mut Turn) -> Result<(), WorkerError> {
        let Some(queue) = &mut active.receive else {
            return Ok(());
        };
        let ram = active.mem.memory();
        queue.disable_doorbell(&ram)?;
        while self.muxer.has_packets() {
            // Space for at least one byte of data.
            let next = queue.next_writable(&ram, HEADER_BYTES + 1, turn, || {
                self.shared.bad_packet("no room for a packet");
            });
            match next? {
                Next::Chain((head, buffers)) => match self.fill(&buffers, turn) {
                    Some(written) => queue.push_used(&ram, head, written)?,
                    // No packet was available. The buffer is kept for the next one.
                    None => queue.unpop(1),
                },
                // The guest will notify the device when it provides a buffer.
                Next::Empty if queue.enable_doorbell(&ram)? => queue.disable_doorbell(&ram)?,
                Next::Empty | Next::TurnOver => break,
            }
        }
        queue.signal(&ram)
    }

    /// Writes the next packet. Returns its length; `None` if there is none.
    fn fill(&mut self, buffers: &GuestBuffers, turn: &mut Turn) -> Option<u32> {
        let room = (buffers.bytes() - HEADER_BYTES).min(DATA_BYTES_MAX);
        let header = self.muxer.next_packet(&mut self.data, room, turn)?;
        let len = header.len as usize;
        buffers.copy_in(&header.to_bytes());
        buffers.copy_in_at(HEADER_BYTES, &self.data[..len]);
        self.shared.rx_packets.count();
        self.shared.rx_bytes.add(len as u64);
        // A header and at most 64 KiB.
        Some((HEADER_BYTES + len) as u32)
    }

    fn serve(&mut self, turn: &mut Turn, transmit: bool) -> Result<(), WorkerError> {
        with_taken(
            self,
            |it| &mut it.active,
            |it, active| {
                if transmit {
                    it.transmit(active, turn)?;
                }
                it.receive(active, turn)
            },
        )
    }
}

impl QueueHandler for VsockHandler {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        let (mem, queues) = activation.serve();
        let mut active = Active {
            mem,
            receive: None,
            transmit: None,
            others: Vec::new(),
        };
        for queue in queues {
            match queue.index() {
                RECEIVE => active.receive = Some(queue),
                TRANSMIT => active.transmit = Some(queue),
                _ => active.others.push(queue),
            }
        }
        self.active = Some(active);
        sources.add(self.muxer.fd(), TOKEN_HOST)?;
        self.muxer.start().map_err(|source| WorkerError::Host {
            what: "epoll_ctl(ADD)",
            source,
        })
    }

    fn queue_ready(&mut self, queue_index: u16, turn: &mut Turn) -> Result<(), WorkerError> {
        self.serve(turn, queue_index == TRANSMIT)
    }

    fn source_ready(
        &mut self,
        _token: u32,
        _sources: &mut EventSources,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        self.muxer
            .serve_host(turn)
            .map_err(|source| WorkerError::Host {
                what: "epoll_wait",
                source,
            })?;
        self.serve(turn, false)
    }

    fn reset(&mut self) {
        self.active = None;
        self.muxer.stop();
    }

    fn state(&self) -> HandlerState {
        let queues = self.active.iter().flat_map(|active| {
            let known = active.receive.iter().chain(&active.transmit);
            known.chain(&active.others).map(ServedQueue::position)
        });
        HandlerState {
            queues: queues.collect(),
            own: Some(Saved::of(&self.muxer.state())),
        }
    }

    fn restore(&mut self, own: Option<&Saved>) -> Result<(), StateError> {
        let missing =
            || StateError::invalid(parts::VSOCK_CONNECTIONS, "connections", "are missing");
        let state: VsockConnectionsState = own.ok_or_else(missing)?.read()?;
        self.muxer.restore(&state)
    }
}
