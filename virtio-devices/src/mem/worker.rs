//! Queue half of virtio-mem, on its own thread.

use std::io;
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

/// Blocks opened or closed before the worker checks for commands: a system call each, of some 10 µs. With an assigned
/// device, the host also provides and pins the memory, so their size counts, too.
const BLOCKS_AT_ONCE: u64 = 16;
const BYTES_AT_ONCE: u64 = 64 << 20;

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
    /// With all of the region.
    ram: GuestRam,
    engine: DiscardEngine,
    blocks: Blocks,
    /// A request stopped half-way: blocks can be open without being plugged, or the other way round.
    unsettled: bool,
}

impl MemWorker {
    pub(super) fn new(
        name: String,
        shared: Arc<Shared>,
        ram: GuestRam,
        engine: DiscardEngine,
    ) -> Self {
        Self {
            name,
            blocks: Blocks::new(shared.region.block_count()),
            shared,
            ram,
            engine,
            unsettled: false,
        }
    }

    /// Opens or closes runs of blocks. `None`: a command arrived in between.
    fn set_access(
        &self,
        runs: impl IntoIterator<Item = Range<u64>>,
        open: bool,
        turn: &mut Turn,
    ) -> Option<io::Result<()>> {
        let blocks_at_once =
            (BYTES_AT_ONCE / self.shared.region.block_bytes()).clamp(1, BLOCKS_AT_ONCE);
        let mut first = true;
        for run in runs {
            let mut start = run.start;
            while start < run.end {
                if !std::mem::take(&mut first) && turn.is_called() {
                    return None;
                }
                let end = run.end.min(start + blocks_at_once);
                let range = self.shared.region.range(&(start..end));
                (start..end).for_each(|_block| turn.charge_call(1, 0));
                if let Err(error) = self.shared.access.set(range, open) {
                    return Some(Err(error));
                }
                start = end;
            }
        }
        Some(Ok(()))
    }

    /// Closes all blocks that are not plugged, and opens those that are.
    fn settle(&mut self, turn: &mut Turn) -> Option<io::Result<()>> {
        let plugged = self.blocks.plugged_runs();
        let ends = plugged.iter().map(|run| run.end);
        let starts = plugged.iter().map(|run| run.start);
        let closed = [0]
            .into_iter()
            .chain(ends)
            .zip(starts.chain([self.shared.region.block_count()]))
            .map(|(start, end)| start..end);
        for (runs, open) in [(closed.collect(), false), (plugged.clone(), true)] {
            let runs: Vec<Range<u64>> = runs;
            if let Err(error) = self.set_access(runs, open, turn)? {
                return Some(Err(error));
            }
        }
        self.unsettled = false;
        Some(Ok(()))
    }

    /// Logs why blocks cannot be opened or closed; once, because a guest could repeat it at will.
    fn refuse(&self, error: &io::Error) -> Answer {
        if self.shared.tally.requests_busy.get() == 0 {
            log::warn!("{}: blocks cannot be opened or closed: {error}", self.name);
        }
        Answer::Busy
    }

    /// Executes a request. `None`: a command arrived during it, and the request must be executed again.
    fn carry_out(&mut self, request: Request, turn: &mut Turn) -> Option<Answer> {
        let settled = if self.unsettled {
            self.settle(turn)?
        } else {
            Ok(())
        };
        let answer = match request {
            Request::Unknown => Answer::Error,
            _ if settled.is_err() => {
                settled.map_or_else(|error| self.refuse(&error), |()| Answer::Busy)
            }
            Request::Plug(named) => match self.named(named) {
                Some(blocks) => self.plug(blocks, turn)?,
                None => Answer::Error,
            },
            Request::Unplug(named) => match self.named(named) {
                Some(blocks) => self.unplug(blocks, turn)?,
                None => Answer::Error,
            },
            Request::UnplugAll => {
                let runs = self.blocks.plugged_runs();
                self.give_back(&runs, turn)?
            }
            Request::State(named) => self.named(named).map_or(Answer::Error, |it| self.state(it)),
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

    fn plug(&mut self, blocks: Range<u64>, turn: &mut Turn) -> Option<Answer> {
        if self.blocks.plugged_in(blocks.clone()) > 0 {
            return Some(Answer::Error);
        }
        let more = self.shared.region.bytes_of(blocks.end - blocks.start);
        let plugged_bytes = self.shared.plugged_bytes() + more;
        if plugged_bytes > self.shared.requested_bytes() {
            return Some(Answer::Nack);
        }
        // Until they are plugged, no more blocks are open than the host has allowed.
        self.unsettled = true;
        if let Err(error) = self.set_access([blocks.clone()], true, turn)? {
            return Some(self.refuse(&error));
        }
        self.unsettled = false;
        self.blocks.set(blocks, true);
        self.shared.set_plugged_bytes(plugged_bytes);
        Some(Answer::Ack)
    }

    fn unplug(&mut self, blocks: Range<u64>, turn: &mut Turn) -> Option<Answer> {
        if self.blocks.plugged_in(blocks.clone()) < blocks.end - blocks.start {
            return Some(Answer::Error);
        }
        self.give_back(&[blocks], turn)
    }

    fn state(&self, blocks: Range<u64>) -> Answer {
        let plugged = self.blocks.plugged_in(blocks.clone());
        Answer::State(match plugged {
            0 => BlockState::Unplugged,
            all if all == blocks.end - blocks.start => BlockState::Plugged,
            _ => BlockState::Mixed,
        })
    }

    /// Unplugs runs of plugged blocks, if the host can close them and discard all of their memory. They are closed first:
    /// what is discarded stays so. A driver may not rely on the content of a block that it plugs again, so
    /// the content need not be zeros.
    fn give_back(&mut self, runs: &[Range<u64>], turn: &mut Turn) -> Option<Answer> {
        let region = self.shared.region;
        self.unsettled = true;
        if let Err(error) = self.set_access(runs.iter().cloned(), false, turn)? {
            self.open_again();
            return Some(self.refuse(&error));
        }
        let mut claims: Vec<GuestRange> = runs.iter().map(|run| region.range(run)).collect();
        let engine = &mut self.engine;
        let outcome =
            engine.discard_unless_called(&self.ram, &mut claims, Expected::Anything, turn)?;
        self.record(&outcome);
        if outcome.discarded.bytes < outcome.requested.bytes {
            self.open_again();
            return Some(Answer::Busy);
        }
        self.unsettled = false;
        for run in runs {
            self.blocks.set(run.clone(), false);
        }
        let left_bytes = self.shared.plugged_bytes() - outcome.requested.bytes;
        self.shared.set_plugged_bytes(left_bytes);
        Some(Answer::Ack)
    }

    /// Blocks that stay plugged are open before the guest reads the response. If the host refuses, the next request
    /// tries it again.
    fn open_again(&mut self) {
        if let Some(Err(error)) = self.settle(&mut Turn::default()) {
            log::error!("{}: plugged blocks cannot be opened: {error}", self.name);
        }
    }

    fn record(&self, outcome: &Outcome) {
        let tally = &self.shared.tally;
        // Logged once: a guest could repeat the error at will, and the counters show the rest.
        if let Some(error) = &outcome.first_error
            && tally.unplug_failed_bytes.get() == 0
        {
            log::warn!(
                "{}: cannot return unplugged memory to the host: {error}",
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
        _driver: &Driver,
        request: Result<ChainBuffers, ChainError>,
        turn: &mut Turn,
    ) -> Reply {
        let Some((request, buffers)) = request.ok().and_then(read) else {
            self.shared.tally.requests_malformed.count();
            return Reply::Done(0);
        };
        let Some(answer) = self.carry_out(request, turn) else {
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
        // There is no worker thread yet, so nothing waits for it.
        match self.settle(&mut Turn::default()) {
            Some(Err(error)) => Err(StateError::invalid(
                PART,
                "plugged",
                format!("cannot be opened on this host: {error}"),
            )),
            _ => Ok(()),
        }
    }
}
