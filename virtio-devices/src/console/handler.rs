//! The queue half of the console.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use state::{Bytes, Part, Saved, State, StateError, parts, require};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::endpoint::ConsoleEndpoint;
use super::output::{BACKLOG_BYTES_MAX, Output, Written};
use super::shared::Shared;
use crate::device::{Activation, GuestRam, HandlerState, QueueHandler, WorkerError};
use crate::queue::{GuestBuffers, Next, Popped, ServedQueue};
use crate::taken::with_taken;
use crate::worker::{EventSources, Turn};

const PART: Part = parts::CONSOLE_OUTPUT;

/// Queue numbers (virtio 1.2 §5.3.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Tokens of the event sources.
const TOKEN_INPUT: u32 = 0;
const TOKEN_OUTPUT: u32 = 1;
/// Queue callbacks cannot register sources; they signal this event to request it.
const TOKEN_REARM: u32 = 2;

/// Maximum number of bytes written from one chain. Linux never sends more than 32 KiB at once; the rest of a longer
/// chain is dropped and counted.
const CHAIN_BYTES_MAX: usize = 64 << 10;
/// Maximum number of bytes moved at once.
const CHUNK_BYTES: usize = 4 << 10;

/// The state of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Input {
    /// Watched: the worker wakes when there is something to read.
    Watched,
    /// Not watched, because the guest has provided no buffer or the device is not active.
    Unwatched,
    /// Cannot be polled (a regular file, `/dev/null`): read when the guest has provided buffers.
    Unpollable,
    /// Missing, at its end, or broken.
    Closed,
}

/// Guest text that the output has not accepted yet. Unread input is not part of the state, because it is still in the
/// host's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleOutputState {
    /// The text.
    pub backlog: Bytes,
}

impl State for ConsoleOutputState {
    const PART: Part = PART;
}

/// The state while the device is active.
struct Active {
    mem: GuestRam,
    receive: Option<ServedQueue>,
    transmit: Option<ServedQueue>,
}

/// The queue half.
pub(super) struct ConsoleHandler {
    name: String,
    input: Option<File>,
    input_state: Input,
    output: Output,
    output_watched: bool,
    shared: Arc<Shared>,
    rearm: EventFd,
    chunk: Box<[u8]>,
    active: Option<Active>,
}

crate::debug_fields!(ConsoleHandler {
    name,
    input_state,
    output
});

impl ConsoleHandler {
    pub(super) fn new(
        id: &str,
        endpoint: ConsoleEndpoint,
        shared: Arc<Shared>,
    ) -> Result<Self, WorkerError> {
        let rearm = EventFd::new(EFD_NONBLOCK).map_err(|source| WorkerError::Host {
            what: "eventfd",
            source,
        })?;
        Ok(Self {
            name: id.to_owned(),
            input_state: if endpoint.input.is_some() {
                Input::Unwatched
            } else {
                Input::Closed
            },
            input: endpoint.input,
            output: Output::new(endpoint.output),
            output_watched: false,
            shared,
            rearm,
            chunk: vec![0; CHUNK_BYTES].into_boxed_slice(),
            active: None,
        })
    }

    /// Moves input to the guest's buffers. True: no buffer is left.
    fn receive(&mut self, active: &mut Active, turn: &mut Turn) -> Result<bool, WorkerError> {
        let Active {
            mem,
            receive: Some(queue),
            ..
        } = active
        else {
            return Ok(true);
        };
        let ram = mem.memory();
        let mut starved = false;
        loop {
            let next = queue.next_writable(&ram, 1, turn, || {
                self.shared.counters.bad_chains.count();
            })?;
            let (head, buffers) = match next {
                Next::Chain(next) => next,
                Next::Empty => {
                    starved = true;
                    break;
                }
                Next::TurnOver => break,
            };
            let room = self.chunk.len().min(buffers.bytes());
            turn.charge_call(1, room as u64);
            let Some(count) = self.read_input(room) else {
                // Not kept: the guest may unmap it before there is input.
                queue.unpop(1);
                break;
            };
            buffers.copy_in(&self.chunk[..count]);
            self.shared.counters.rx_bytes.add(count as u64);
            let count = u32::try_from(count).expect("at most a chunk");
            queue.push_used(&ram, head, count)?;
        }
        queue.signal(&ram)?;
        Ok(starved)
    }

    /// Reads up to `room` bytes into the chunk; `None` if no bytes are available.
    fn read_input(&mut self, room: usize) -> Option<usize> {
        let input = self.input.as_mut()?;
        loop {
            match input.read(&mut self.chunk[..room]) {
                Ok(0) => break,
                Ok(count) => return Some(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                // EIO: the other end of a pty is closed, temporarily or permanently.
                Err(_) => break,
            }
        }
        self.input_state = Input::Closed;
        None
    }

    fn transmit(&mut self, active: &mut Active, turn: &mut Turn) -> Result<(), WorkerError> {
        let Active {
            mem,
            transmit: Some(queue),
            ..
        } = active
        else {
            return Ok(());
        };
        let ram = mem.memory();
        while let Next::Chain(Popped { head, buffers }) = queue.next(&ram, turn)? {
            match buffers {
                Ok(buffers) => self.write_out(buffers.readable, turn),
                Err(_) => {
                    self.shared.counters.bad_chains.count();
                }
            }
            queue.push_used(&ram, head, 0)?;
        }
        queue.signal(&ram)?;
        if self.output.backlog_fd().is_some() && !self.output_watched {
            self.ask_to_rearm()?;
        }
        Ok(())
    }

    fn write_out(&mut self, mut buffers: GuestBuffers, turn: &mut Turn) {
        let mut left = buffers.bytes().min(CHAIN_BYTES_MAX);
        let cut = buffers.bytes() - left;
        let mut dropped = if self.output.is_connected() { cut } else { 0 };
        self.shared.counters.tx_bytes.add(left as u64);
        while left > 0 {
            let room = self.chunk.len().min(left);
            let count = buffers.copy_out(&mut self.chunk[..room]);
            if count == 0 {
                break;
            }
            turn.charge_call(1, count as u64);
            dropped += self.output.write(&self.chunk[..count]).dropped_bytes;
            buffers.advance(count);
            left -= count;
        }
        self.count_dropped(Written {
            dropped_bytes: dropped,
        });
    }

    fn count_dropped(&self, written: Written) {
        self.shared
            .counters
            .tx_dropped_bytes
            .add(written.dropped_bytes as u64);
    }

    fn ask_to_rearm(&self) -> Result<(), WorkerError> {
        self.rearm.write(1).map_err(|source| WorkerError::Host {
            what: "ringing the console's own eventfd",
            source,
        })
    }

    /// Watches the sources that are needed: input while the guest has buffers, output while there is a backlog.
    fn rearm(&mut self, sources: &mut EventSources) -> Result<(), WorkerError> {
        // EAGAIN: the request came from an activation and not through the eventfd.
        self.rearm.read().ok();
        if self.input_state == Input::Unwatched
            && let Some(input) = &self.input
        {
            self.input_state = match sources.add(input.as_raw_fd(), TOKEN_INPUT) {
                Ok(()) => Input::Watched,
                Err(WorkerError::Host { source, .. }) if is_unpollable(&source) => {
                    Input::Unpollable
                }
                Err(error) => return Err(error),
            };
        }
        if let Some(fd) = self.output.backlog_fd()
            && !self.output_watched
        {
            match sources.add_writable(fd, TOKEN_OUTPUT) {
                Ok(()) => self.output_watched = true,
                // A file that is always writable never leaves a backlog; the next write tries again.
                Err(WorkerError::Host { source, .. }) if is_unpollable(&source) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn input_ready(
        &mut self,
        active: &mut Active,
        sources: &mut EventSources,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        let starved = self.receive(active, turn)?;
        let Some(input) = &self.input else {
            return Ok(());
        };
        if self.input_state == Input::Closed {
            sources.remove(input.as_raw_fd())?;
            self.input = None;
        } else if starved {
            // Removed until the guest provides a buffer; otherwise the readable input would cause a busy loop.
            sources.remove(input.as_raw_fd())?;
            self.input_state = Input::Unwatched;
        }
        Ok(())
    }

    fn output_ready(&mut self, sources: &mut EventSources) -> Result<(), WorkerError> {
        let watched = self.output.backlog_fd();
        let written = self.output.flush();
        self.count_dropped(written);
        if let Some(fd) = watched
            && self.output.backlog_fd().is_none()
        {
            sources.remove(fd)?;
            self.output_watched = false;
        }
        Ok(())
    }
}

impl QueueHandler for ConsoleHandler {
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
        };
        for queue in queues {
            match queue.index() {
                RECEIVE => active.receive = Some(queue),
                TRANSMIT => active.transmit = Some(queue),
                _ => {}
            }
        }
        self.active = Some(active);
        sources.add(self.rearm.as_raw_fd(), TOKEN_REARM)?;
        self.rearm(sources)
    }

    fn queue_ready(&mut self, queue_index: u16, turn: &mut Turn) -> Result<(), WorkerError> {
        with_taken(
            self,
            |it| &mut it.active,
            |it, active| match (queue_index, it.input_state) {
                (TRANSMIT, _) => it.transmit(active, turn),
                (RECEIVE, Input::Unpollable) => it.receive(active, turn).map(drop),
                (RECEIVE, Input::Unwatched) => it.ask_to_rearm(),
                // Watched input wakes the worker.
                _ => Ok(()),
            },
        )
    }

    fn source_ready(
        &mut self,
        token: u32,
        sources: &mut EventSources,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        with_taken(
            self,
            |it| &mut it.active,
            |it, active| match token {
                TOKEN_INPUT => it.input_ready(active, sources, turn),
                TOKEN_OUTPUT => it.output_ready(sources),
                _ => it.rearm(sources),
            },
        )
    }

    fn state(&self) -> HandlerState {
        let queues = self
            .active
            .iter()
            .flat_map(|it| [&it.receive, &it.transmit]);
        HandlerState {
            queues: queues.flatten().map(ServedQueue::position).collect(),
            own: Some(Saved::of(&ConsoleOutputState {
                backlog: Bytes(self.output.backlog()),
            })),
        }
    }

    fn restore(&mut self, own: Option<&Saved>) -> Result<(), StateError> {
        let own = own.ok_or_else(|| StateError::invalid(PART, "handlers", "has no output"))?;
        let ConsoleOutputState { backlog } = own.read()?;
        let count = backlog.0.len();
        require(count <= BACKLOG_BYTES_MAX, PART, "backlog", || {
            format!("has {count} bytes, at most {BACKLOG_BYTES_MAX} are kept")
        })?;
        let written = self.output.write(&backlog.0);
        self.count_dropped(written);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        // The output is not watched until the next driver arrives, so this is the last attempt.
        let written = self.output.flush();
        self.count_dropped(written);
        // The worker has removed the sources.
        self.output_watched = false;
        if self.input_state == Input::Watched {
            self.input_state = Input::Unwatched;
        }
    }
}

/// The kernel's error for files without a poll operation.
fn is_unpollable(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EPERM)
}
