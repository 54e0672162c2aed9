//! The queue half, on its own thread.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use state::{Part, Saved, State, StateError, parts, require};

use super::blocks::Blocks;
use super::request::{ANSWER_BYTES, Answer, BlockState, Named, REQUEST_BYTES, Request};
use super::shared::Shared;
use crate::device::GuestRam;
use crate::queue::{ChainBuffers, ChainError, Driver, Reply, SingleQueueDevice};
use crate::reclaim::{DiscardEngine, Expected, GuestRange, Outcome};
use crate::worker::Turn;

const PART: Part = parts::MEM_BLOCKS;

/// The plugged blocks. There can be more than the host requests, while the guest is still returning some.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemBlocksState {
    /// Runs of plugged blocks, ascending.
    pub plugged: Vec<RunState>,
}

/// Consecutive blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Number of the first block.
    pub first: u64,
    /// Number of blocks.
    pub count: u64,
}

impl State for MemBlocksState {
    const PART: Part = PART;
}

/// Serves the only queue, and tracks which blocks are plugged. A reset of the device does not plug or unplug blocks
/// (virtio 1.2 §5.15.5.2): the next driver finds them unchanged. A reboot creates a new device.
#[derive(Debug)]
pub(super) struct MemWorker {
    name: String,
    shared: Arc<Shared>,
    engine: DiscardEngine,
    blocks: Blocks,
}

impl MemWorker {
    pub(super) fn new(name: String, shared: Arc<Shared>, engine: DiscardEngine) -> Self {
        Self {
            name,
            blocks: Blocks::new(shared.region.block_count()),
            shared,
            engine,
        }
    }

    /// Executes a request. `None`: a command arrived during it, and the request must be executed again.
    fn carry_out(&mut self, mem: &GuestRam, request: Request, turn: &mut Turn) -> Option<Answer> {
        let answer = match request {
            Request::Plug(named) => self.named(named).map_or(Answer::Error, |it| self.plug(it)),
            Request::Unplug(named) => match self.named(named) {
                Some(blocks) => self.unplug(mem, blocks, turn)?,
                None => Answer::Error,
            },
            Request::UnplugAll => {
                let runs = self.blocks.plugged_runs();
                self.give_back(mem, &runs, turn)?
            }
            Request::State(named) => self.named(named).map_or(Answer::Error, |it| self.state(it)),
            Request::Unknown => Answer::Error,
        };
        let tally = &self.shared.tally;
        let requests = match request {
            Request::Plug(_) => &tally.plug_requests,
            Request::Unplug(_) => &tally.unplug_requests,
            Request::UnplugAll => &tally.unplug_all_requests,
            Request::State(_) => &tally.state_requests,
            Request::Unknown => &tally.requests_unknown,
        };
        requests.count();
        match answer {
            Answer::Error if request == Request::Unknown => {}
            Answer::Ack | Answer::State(_) => {}
            Answer::Nack => tally.requests_nacked.count(),
            Answer::Busy => tally.requests_busy.count(),
            Answer::Error => tally.requests_wrong.count(),
        }
        Some(answer)
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

    fn unplug(&mut self, mem: &GuestRam, blocks: Range<u64>, turn: &mut Turn) -> Option<Answer> {
        if self.blocks.plugged_in(blocks.clone()) < blocks.end - blocks.start {
            return Some(Answer::Error);
        }
        self.give_back(mem, &[blocks], turn)
    }

    fn state(&self, blocks: Range<u64>) -> Answer {
        let plugged = self.blocks.plugged_in(blocks.clone());
        Answer::State(match plugged {
            0 => BlockState::Unplugged,
            all if all == blocks.end - blocks.start => BlockState::Plugged,
            _ => BlockState::Mixed,
        })
    }

    /// Unplugs runs of plugged blocks, if the host can discard all of their memory. A driver may not rely on the
    /// content of a block that it plugs again, so the content need not be zeros.
    fn give_back(
        &mut self,
        mem: &GuestRam,
        runs: &[Range<u64>],
        turn: &mut Turn,
    ) -> Option<Answer> {
        let region = self.shared.region;
        let mut claims: Vec<GuestRange> = runs.iter().map(|run| region.range(run)).collect();
        let engine = &mut self.engine;
        let outcome = engine.discard_unless_called(mem, &mut claims, Expected::Anything, turn)?;
        self.record(&outcome);
        if outcome.discarded.bytes < outcome.requested.bytes {
            return Some(Answer::Busy);
        }
        for run in runs {
            self.blocks.set(run.clone(), false);
        }
        let left_bytes = self.shared.plugged_bytes() - outcome.requested.bytes;
        self.shared.set_plugged_bytes(left_bytes);
        Some(Answer::Ack)
    }

    fn record(&self, outcome: &Outcome) {
        let tally = &self.shared.tally;
        // Logged once: a guest could repeat the error at will, and the counters show the rest.
        if let Some(error) = &outcome.first_error
            && tally.unplug_failed_bytes.get() == 0
        {
            log::warn!(
                "{}: unplugged memory cannot be given back: {error}",
                self.name
            );
        }
        tally.unplug_requested_bytes.add(outcome.requested.bytes);
        tally.unplug_discarded_bytes.add(outcome.discarded.bytes);
        tally.unplug_failed_bytes.add(outcome.failed.bytes);
        tally.unplug_skipped_bytes.add(outcome.skipped.total());
        tally.unplug_syscalls.add(outcome.syscalls);
    }
}

/// The request in a chain, if it is valid and leaves space for the response: a request without a response is not
/// executed.
fn read(buffers: ChainBuffers) -> Option<(Request, ChainBuffers)> {
    let mut bytes = [0; REQUEST_BYTES];
    let whole = buffers.readable.copy_out(&mut bytes) == REQUEST_BYTES;
    let room = buffers.writable.bytes() >= ANSWER_BYTES;
    (whole && room).then(|| (Request::parse(&bytes), buffers))
}

impl SingleQueueDevice for MemWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn answer(
        &mut self,
        driver: &Driver,
        request: Result<ChainBuffers, ChainError>,
        turn: &mut Turn,
    ) -> Reply {
        let Some((request, buffers)) = request.ok().and_then(read) else {
            self.shared.tally.requests_malformed.count();
            return Reply::Done(0);
        };
        let Some(answer) = self.carry_out(&driver.ram, request, turn) else {
            return Reply::PutBack;
        };
        buffers.writable.copy_in(&answer.bytes());
        Reply::Done(ANSWER_BYTES as u32)
    }

    fn own_state(&self) -> Option<Saved> {
        let run = |run: &Range<u64>| RunState {
            first: run.start,
            count: run.end - run.start,
        };
        Some(Saved::of(&MemBlocksState {
            plugged: self.blocks.plugged_runs().iter().map(run).collect(),
        }))
    }

    fn restore(&mut self, own: Option<&Saved>) -> Result<(), StateError> {
        let missing = || StateError::invalid(PART, "plugged", "is missing");
        let state: MemBlocksState = own.ok_or_else(missing)?.read()?;
        let mut end = 0;
        let mut plugged = 0;
        for run in &state.plugged {
            let last = run.first.checked_add(run.count);
            let run_end = last.filter(|last| *last <= self.shared.region.block_count());
            require(
                run.count > 0 && run.first >= end && run_end.is_some(),
                PART,
                "plugged",
                || format!("cannot contain {run:?}"),
            )?;
            end = run.first + run.count;
            self.blocks.set(run.first..end, true);
            plugged += run.count;
        }
        self.shared
            .set_plugged_bytes(self.shared.region.bytes_of(plugged));
        Ok(())
    }
}
