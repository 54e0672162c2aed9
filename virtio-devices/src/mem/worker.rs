//! The queue half, on its own thread.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::GuestAddressSpace;

use super::blocks::Blocks;
use super::request::{ANSWER_BYTES, Answer, BlockState, Named, REQUEST_BYTES, Request};
use super::shared::{Shared, count};
use crate::device::{Activation, GuestRam, QueueHandler, WorkerError};
use crate::guest_buffers::{ChainBuffers, RamGuard};
use crate::reclaim::{DiscardEngine, Expected, GuestRange, Outcome};
use crate::served_queue::ServedQueue;
use crate::worker::EventSources;

/// Requests served before the worker looks at its commands again. Each discards the region at most once.
const REQUESTS_PER_CALL_MAX: usize = 16;

/// Serves the one queue, and knows which blocks are plugged. A reset of the device plugs and unplugs nothing (virtio
/// 1.2 §5.15.5.2): the driver that comes next finds the blocks as they are. A reboot makes another device.
#[derive(Debug)]
pub(super) struct MemWorker {
    name: String,
    shared: Arc<Shared>,
    engine: DiscardEngine,
    blocks: Blocks,
    active: Option<(GuestRam, ServedQueue)>,
}

impl MemWorker {
    pub(super) fn new(name: String, shared: Arc<Shared>, engine: DiscardEngine) -> Self {
        Self {
            name,
            blocks: Blocks::new(shared.region.block_count()),
            shared,
            engine,
            active: None,
        }
    }

    fn serve(
        &mut self,
        mem: &GuestRam,
        ram: &RamGuard,
        queue: &mut ServedQueue,
    ) -> Result<(), WorkerError> {
        for _ in 0..REQUESTS_PER_CALL_MAX {
            let Some(popped) = queue.pop(ram)? else {
                return Ok(());
            };
            let request = popped.buffers.ok().and_then(read);
            let written = match request {
                Some((request, buffers)) => {
                    let answer = self.carry_out(mem, request);
                    buffers.writable.copy_in(&answer.bytes());
                    ANSWER_BYTES as u32
                }
                None => {
                    count(&self.shared.tally.requests_malformed, 1);
                    0
                }
            };
            queue.push_used(ram, popped.head, written)?;
        }
        queue.ring_again()
    }

    fn carry_out(&mut self, mem: &GuestRam, request: Request) -> Answer {
        let tally = &self.shared.tally;
        let answer = match request {
            Request::Plug(named) => {
                count(&tally.plug_requests, 1);
                self.named(named).map_or(Answer::Error, |it| self.plug(it))
            }
            Request::Unplug(named) => {
                count(&tally.unplug_requests, 1);
                let blocks = self.named(named);
                blocks.map_or(Answer::Error, |it| self.unplug(mem, it))
            }
            Request::UnplugAll => {
                count(&tally.unplug_all_requests, 1);
                let runs = self.blocks.plugged_runs();
                self.give_back(mem, &runs)
            }
            Request::State(named) => {
                count(&tally.state_requests, 1);
                self.named(named).map_or(Answer::Error, |it| self.state(it))
            }
            Request::Unknown => {
                count(&tally.requests_unknown, 1);
                return Answer::Error;
            }
        };
        let tally = &self.shared.tally;
        match answer {
            Answer::Ack | Answer::State(_) => {}
            Answer::Nack => count(&tally.requests_nacked, 1),
            Answer::Busy => count(&tally.requests_busy, 1),
            Answer::Error => count(&tally.requests_wrong, 1),
        }
        answer
    }

    fn named(&self, named: Named) -> Option<Range<u64>> {
        self.shared.region.blocks(named.address, named.count)
    }

    fn plug(&mut self, blocks: Range<u64>) -> Answer {
        if self.blocks.plugged_in(blocks.clone()) > 0 {
            return Answer::Error;
        }
        let more = self.shared.region.bytes_of(blocks.end - blocks.start);
        let plugged_bytes = self.shared.plugged_bytes() + more;
        if plugged_bytes > self.shared.requested_bytes() {
            return Answer::Nack;
        }
        self.blocks.set(blocks, true);
        self.shared.set_plugged_bytes(plugged_bytes);
        Answer::Ack
    }

    fn unplug(&mut self, mem: &GuestRam, blocks: Range<u64>) -> Answer {
        if self.blocks.plugged_in(blocks.clone()) < blocks.end - blocks.start {
            return Answer::Error;
        }
        self.give_back(mem, &[blocks])
    }

    fn state(&self, blocks: Range<u64>) -> Answer {
        let plugged = self.blocks.plugged_in(blocks.clone());
        Answer::State(match plugged {
            0 => BlockState::Unplugged,
            all if all == blocks.end - blocks.start => BlockState::Plugged,
            _ => BlockState::Mixed,
        })
    }

    /// Unplugs runs of plugged blocks, if the host takes back all of their memory. A driver may not read what it finds
    /// in a block that it plugs again, so it need not be zeros.
    fn give_back(&mut self, mem: &GuestRam, runs: &[Range<u64>]) -> Answer {
        let region = self.shared.region;
        let mut claims: Vec<GuestRange> = runs.iter().map(|run| region.range(run)).collect();
        let outcome = self.engine.discard(mem, &mut claims, Expected::Anything);
        self.record(&outcome);
        if outcome.discarded.bytes < outcome.requested.bytes {
            return Answer::Busy;
        }
        for run in runs {
            self.blocks.set(run.clone(), false);
        }
        let left_bytes = self.shared.plugged_bytes() - outcome.requested.bytes;
        self.shared.set_plugged_bytes(left_bytes);
        Answer::Ack
    }

    fn record(&self, outcome: &Outcome) {
        let tally = &self.shared.tally;
        // Once: the counters tell the rest, and a guest could repeat it at will.
        if let Some(error) = &outcome.first_error
            && tally.unplug_failed_bytes.load(Ordering::Relaxed) == 0
        {
            log::warn!(
                "{}: unplugged memory cannot be given back: {error}",
                self.name
            );
        }
        count(&tally.unplug_requested_bytes, outcome.requested.bytes);
        count(&tally.unplug_discarded_bytes, outcome.discarded.bytes);
        count(&tally.unplug_failed_bytes, outcome.failed.bytes);
        count(&tally.unplug_skipped_bytes, outcome.skipped.total());
        count(&tally.unplug_syscalls, outcome.syscalls);
    }
}

/// The request in a chain, if it is one and leaves room for the answer: what cannot be answered is not carried out.
fn read(buffers: ChainBuffers) -> Option<(Request, ChainBuffers)> {
    let mut bytes = [0; REQUEST_BYTES];
    let whole = buffers.readable.copy_out(&mut bytes) == REQUEST_BYTES;
    let room = buffers.writable.bytes() >= ANSWER_BYTES;
    (whole && room).then(|| (Request::parse(&bytes), buffers))
}

impl QueueHandler for MemWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn activate(
        &mut self,
        activation: Activation,
        _sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        let Activation {
            mem,
            features,
            queues,
            interrupt,
        } = activation;
        let first = queues.into_iter().next();
        self.active = first.map(|active| (mem, ServedQueue::new(active, features, interrupt)));
        Ok(())
    }

    fn queue_ready(&mut self, _queue_index: u16) -> Result<(), WorkerError> {
        let Some((mem, mut queue)) = self.active.take() else {
            return Ok(());
        };
        let ram = mem.memory();
        let served = self
            .serve(&mem, &ram, &mut queue)
            .and_then(|()| queue.signal(&ram));
        self.active = Some((mem, queue));
        served
    }

    fn reset(&mut self) {
        self.active = None;
    }
}
