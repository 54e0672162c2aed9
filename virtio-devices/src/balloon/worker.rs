//! The queue half of the balloon, on its own thread.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use ::state::{Part, Saved, StateError, parts, require};
use device_facts::{PausePhase, SkipReason};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::accounting::{GuestFaults, Path};
use super::chain;
use super::hinting::CommandEffect;
use super::numbering::{Numbering, QUEUE_SIZES, QueueRole};
use super::shared::{ActiveDriver, Shared, takes_lengths, takes_policy};
use super::spec::VIRTIO_BALLOON_F_PAGE_POISON;
use super::state::BalloonWorkerState;
use super::stats::{STATS_BYTES_MAX, StatsSample};
use super::stats_timer::StatsTimer;
use crate::device::{Activation, GuestRam, HandlerState, Interrupt, QueueHandler, WorkerError};
use crate::queue::{Chain, Next, ServedQueue};
use crate::reclaim::{DiscardEngine, Expected, Extent, GuestRange, Outcome};
use crate::worker::{EventSources, Turn};

/// A batch is processed when it has this many ranges: four full vectors. One chain may exceed the limit by the maximum
/// length of a chain.
const BATCH_RANGES_MAX: usize = 4096;

/// Token of the descriptor that requests statistics.
const REFILL: u32 = 0;
/// Token of the timer that requests statistics.
const POLL: u32 = 1;

/// Serves all queues of the balloon.
#[derive(Debug)]
pub(super) struct BalloonWorker {
    shared: Arc<Shared>,
    engine: DiscardEngine,
    timer: StatsTimer,
    active: Option<Active>,
    /// [`Active::parked`] of the restored driver, until it is active again.
    parked_before: Option<u16>,
    batch: Batch,
    /// Page frame numbers or statistics of one chain.
    bytes: Vec<u8>,
    /// Faults not yet added to the ledger.
    faults: GuestFaults,
}

/// State that exists only while a driver is running.
struct Active {
    ram: GuestRam,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
    queues: Vec<RoleQueue>,
    /// Head of the statistics chain, kept until the next request.
    parked: Option<u16>,
}

struct RoleQueue {
    role: QueueRole,
    queue: ServedQueue,
}

/// Work left in a queue when the worker moves on to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// All chains that were available at the start have been served.
    Nothing,
    /// Chains remain: the turn is over, and the queue has signalled its own doorbell.
    Some,
}

/// How a batch is processed.
#[derive(Clone, Copy, Debug)]
struct Handled {
    /// The path for its counters.
    path: Path,
    /// The reason why none of it is discarded, if any.
    refusal: Option<SkipReason>,
}

/// Collected ranges, and the chains to complete after the discard.
#[derive(Debug, Default)]
struct Batch {
    claims: Vec<GuestRange>,
    heads: Vec<u16>,
    /// The number of claims up to each chain's end.
    ends: Vec<usize>,
    /// The claims in the order of the chains, for a driver that gets their initialized lengths.
    ordered: Vec<GuestRange>,
    /// Fault counts before the first chain of the batch was read.
    faults_before: GuestFaults,
}

impl std::fmt::Debug for Active {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let roles = self.queues.iter().map(|q| (q.queue.index(), q.role));
        f.debug_struct("Active")
            .field("features", &format_args!("{:#x}", self.features))
            .field("queues", &roles.collect::<Vec<_>>())
            .field("parked", &self.parked)
            .finish_non_exhaustive()
    }
}

impl BalloonWorker {
    pub(super) fn new(shared: Arc<Shared>, engine: DiscardEngine, timer: StatsTimer) -> Self {
        Self {
            shared,
            engine,
            timer,
            active: None,
            parked_before: None,
            batch: Batch::default(),
            bytes: Vec::new(),
            faults: GuestFaults::default(),
        }
    }

    /// `held`: whether the vCPU that signalled the doorbell waits until this returns.
    fn serve(
        &mut self,
        active: &mut Active,
        queue_index: u16,
        held: bool,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        let mut queues = active.queues.iter();
        let Some(at) = queues.position(|q| q.queue.index() == queue_index) else {
            return Ok(());
        };
        let mem = active.ram.memory().into_inner();
        match active.queues[at].role {
            QueueRole::Inflate => {
                self.serve_discards(active, at, Path::Inflate, &mem, turn)?;
            }
            QueueRole::Reporting => {
                self.serve_discards(active, at, Path::Report, &mem, turn)?;
            }
            QueueRole::Deflate => self.serve_deflate(active, at, &mem, turn)?,
            QueueRole::Stats => self.serve_stats(active, at, &mem, turn)?,
            QueueRole::Hint => self.serve_hints(active, at, &mem, held, turn)?,
        }
        active.queues[at].queue.signal(&mem)
    }

    /// Inflate and reporting: collect, discard, complete.
    fn serve_discards(
        &mut self,
        active: &mut Active,
        at: usize,
        path: Path,
        mem: &GuestMemoryMmap<()>,
        turn: &mut Turn,
    ) -> Result<Left, WorkerError> {
        // Pages in the balloon are allocated, so poison does not apply to them.
        let poisoned = path == Path::Report && self.shared.poison(active.features).is_some();
        let refusal = poisoned.then_some(SkipReason::PagePoison);
        let handled = Handled { path, refusal };
        self.begin_batch();
        let mut started = Instant::now();
        for _ in 0..active.queues[at].queue.available(mem)? {
            let chain = match active.queues[at].queue.next_chain(mem, turn)? {
                Next::Chain(chain) => chain,
                Next::Empty => break,
                Next::TurnOver => {
                    self.finish_batch(active, at, handled, mem, started, turn)?;
                    return Ok(Left::Some);
                }
            };
            self.batch.heads.push(chain.head_index());
            self.gather(path, chain, mem, turn);
            self.batch.ends.push(self.batch.claims.len());
            if self.batch.claims.len() >= BATCH_RANGES_MAX {
                if self.finish_batch(active, at, handled, mem, started, turn)? == Left::Some {
                    return Ok(Left::Some);
                }
                started = Instant::now();
            }
        }
        self.finish_batch(active, at, handled, mem, started, turn)
    }

    fn gather(&mut self, path: Path, chain: Chain<'_>, mem: &GuestMemoryMmap<()>, turn: &mut Turn) {
        let (claims, faults) = (&mut self.batch.claims, &mut self.faults);
        if path == Path::Inflate {
            chain::inflated(chain, mem, &mut self.bytes, claims, turn, faults);
        } else {
            chain::reported(chain, claims, turn, faults);
        }
    }

    /// Hinting: chain by chain, because each is checked separately; see [`super::hinting`].
    fn serve_hints(
        &mut self,
        active: &mut Active,
        at: usize,
        mem: &GuestMemoryMmap<()>,
        held: bool,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        let available = active.queues[at].queue.available(mem)?;
        for position in 0..available {
            let started = Instant::now();
            self.begin_batch();
            let chain = match active.queues[at].queue.next_chain(mem, turn)? {
                Next::Chain(chain) => chain,
                Next::Empty | Next::TurnOver => break,
            };
            let head = chain.head_index();
            let claims = &mut self.batch.claims;
            if let Some(id) = chain::hinted(chain, mem, claims, turn, &mut self.faults) {
                self.obey_hinting_command(active, id);
            }
            if self.batch.claims.is_empty() {
                let queue = &mut active.queues[at].queue;
                chain::answer(queue, mem, &[head], &mut self.faults)?;
                continue;
            }
            self.batch.heads.push(head);
            let is_held = held && position + 1 == available;
            let handled = Handled {
                path: Path::Hint,
                refusal: self.hint_refusal(active, is_held),
            };
            if self.finish_batch(active, at, handled, mem, started, turn)? == Left::Some {
                break;
            }
        }
        Ok(())
    }

    fn obey_hinting_command(&mut self, active: &Active, id: u32) {
        match self.shared.hinting.command(id, &self.shared.config) {
            CommandEffect::None => {}
            CommandEffect::Signal => active.interrupt.signal_config(),
            CommandEffect::NotAskedFor => self.faults.hint_commands_not_asked_for += 1,
        }
    }

    fn hint_refusal(&self, active: &Active, is_held: bool) -> Option<SkipReason> {
        if !self.shared.hinting.is_running() {
            Some(SkipReason::HintStale)
        } else if !is_held {
            Some(SkipReason::HintNotHeld)
        } else {
            let poisoned = self.shared.poison(active.features).is_some();
            poisoned.then_some(SkipReason::PagePoison)
        }
    }

    fn begin_batch(&mut self) {
        self.batch.claims.clear();
        self.batch.heads.clear();
        self.batch.ends.clear();
        self.batch.ordered.clear();
        self.batch.faults_before = self.faults;
    }

    /// Discards the collected ranges and only then completes their chains. If a command arrives in between, the chains
    /// go back to the ring and are served again from the start. Until they are completed, the guest does not use their
    /// memory, so discarding it twice has the same effect as once.
    fn finish_batch(
        &mut self,
        active: &mut Active,
        at: usize,
        handled: Handled,
        mem: &GuestMemoryMmap<()>,
        started: Instant,
        turn: &mut Turn,
    ) -> Result<Left, WorkerError> {
        if self.batch.heads.is_empty() {
            return Ok(Left::Nothing);
        }
        let Handled { path, refusal } = handled;
        // Held until the chains are completed: a pause is complete when no batch holds a passage.
        let passage = (path == Path::Report).then(|| self.shared.report_gate.begin());
        let paused = matches!(passage, Some(Err(_)));
        let refusal = refusal.or(paused.then_some(SkipReason::ReportingPaused));
        let is_told = path == Path::Report && takes_lengths(active.features) && refusal.is_none();
        if is_told {
            self.batch.ordered.clone_from(&self.batch.claims);
        }
        let outcome = match refusal {
            Some(reason) => Some(skip_all(&self.batch.claims, reason)),
            None => {
                let expected = expected(path, active.features);
                let claims = &mut self.batch.claims;
                self.engine
                    .discard_unless_called(&active.ram, claims, expected, turn)
            }
        };
        let queue = &mut active.queues[at].queue;
        let Some(outcome) = outcome else {
            self.faults = self.batch.faults_before;
            // At most as many as the ring has entries.
            queue.put_back(self.batch.heads.len() as u16)?;
            return Ok(Left::Some);
        };
        if paused && self.shared.control.phase() == PausePhase::PausedByGuest {
            self.faults.reports_while_paused += self.batch.heads.len() as u64;
        }
        let lengths = match is_told {
            true => self.batch.initialized_lengths(&self.engine),
            false => Vec::new(),
        };
        chain::answer_with(queue, mem, &self.batch.heads, &lengths, &mut self.faults)?;
        let chains = self.batch.heads.len() as u64;
        drop(passage);
        self.begin_batch();
        let mut figures = self.shared.ledger.path(path);
        let first_failure = figures.failed.ranges == 0 && outcome.failed.ranges > 0;
        figures.record(&outcome, chains, started.elapsed());
        drop(figures);
        // Logged once: a guest could repeat the error at will, and the counters show the rest.
        if let Some(e) = outcome.first_error.filter(|_| first_failure) {
            log::warn!("balloon: cannot return guest memory to the host ({path:?}): {e}");
        }
        Ok(Left::Nothing)
    }

    /// Deflation itself needs no work: the pages return when they are touched. But once it is completed, the driver
    /// uses the pages. So everything inflated before must be discarded first, whichever doorbell was served first.
    fn serve_deflate(
        &mut self,
        active: &mut Active,
        at: usize,
        mem: &GuestMemoryMmap<()>,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        // This order ensures that no page deflated here was inflated after the check below.
        let available = active.queues[at].queue.available(mem)?;
        let mut queues = active.queues.iter();
        if let Some(inflate) = queues.position(|queue| queue.role == QueueRole::Inflate) {
            let left = self.serve_discards(active, inflate, Path::Inflate, mem, turn)?;
            active.queues[inflate].queue.signal(mem)?;
            if left == Left::Some {
                return active.queues[at].queue.ring_again();
            }
        }
        let queue = &mut active.queues[at].queue;
        let mut deflated = Extent::default();
        for _ in 0..available {
            let Next::Chain(chain) = queue.next_chain(mem, turn)? else {
                break;
            };
            let head = chain.head_index();
            chain::deflated(chain, &mut deflated, turn, &mut self.faults);
            chain::answer(queue, mem, &[head], &mut self.faults)?;
        }
        self.shared.ledger.deflate().add_all(deflated);
        Ok(())
    }

    /// Parses statistics and keeps their buffer.
    fn serve_stats(
        &mut self,
        active: &mut Active,
        at: usize,
        mem: &GuestMemoryMmap<()>,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        let queue = &mut active.queues[at].queue;
        for _ in 0..queue.available(mem)? {
            let Next::Chain(chain) = queue.next_chain(mem, turn)? else {
                break;
            };
            let head = chain.head_index();
            let (bytes, faults) = (&mut self.bytes, &mut self.faults);
            chain::read(chain, mem, STATS_BYTES_MAX, bytes, turn, faults);
            if head >= queue.size() {
                // It could never be returned, and no saved state may contain it.
                chain::answer(queue, mem, &[head], &mut self.faults)?;
                continue;
            }
            // The standard allows one buffer. The device keeps the newest.
            if let Some(older) = active.parked.replace(head) {
                self.faults.stats_surplus_buffers += 1;
                chain::answer(queue, mem, &[older], &mut self.faults)?;
            }
            let private = takes_policy(active.features);
            let now = Instant::now();
            let sample = StatsSample::parse(&self.bytes, now, private, &mut self.faults);
            self.shared.stats.publish(sample);
        }
        Ok(())
    }

    /// Returns the parked statistics buffer if a new one is wanted.
    fn request_refill(&mut self, active: &mut Active) -> Result<(), WorkerError> {
        if !self.shared.stats.is_wanted() {
            return Ok(());
        }
        let stats_queue = active
            .queues
            .iter_mut()
            .find(|q| q.role == QueueRole::Stats);
        // Without a parked buffer there is nothing to return: the guest has it, and its arrival satisfies the request.
        let (Some(RoleQueue { queue, .. }), Some(head)) = (stats_queue, active.parked.take())
        else {
            return Ok(());
        };
        let mem = active.ram.memory().into_inner();
        chain::answer(queue, &mem, &[head], &mut self.faults)?;
        queue.signal(&mem)
    }

    /// Runs `work` on the active state, if there is one, and records the faults.
    fn while_active(
        &mut self,
        work: impl FnOnce(&mut Self, &mut Active) -> Result<(), WorkerError>,
    ) -> Result<(), WorkerError> {
        // Taken out for the call, so that both halves can be changed at once.
        let Some(mut active) = self.active.take() else {
            return Ok(());
        };
        let result = work(self, &mut active);
        if result.is_ok() {
            self.active = Some(active);
        } else {
            // No queue is served until the next reset. Callers that wait for statistics, or query whether reports
            // arrive, must be notified.
            self.reset();
        }
        if self.faults != GuestFaults::default() {
            self.shared.ledger.faults().add_all(&self.faults);
            self.faults = GuestFaults::default();
        }
        result
    }
}

impl QueueHandler for BalloonWorker {
    fn name(&self) -> String {
        "__balloon".to_owned()
    }

    fn activate(
        &mut self,
        activation: Activation,
        _sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        let enabled = activation.queues.iter().map(|queue| queue.index);
        let numbering = Numbering::of(activation.features, enabled);
        let mut queues = Vec::with_capacity(activation.queues.len());
        for active in activation.queues {
            match numbering.role(active.index) {
                Some(role) => {
                    let interrupt = Arc::clone(&activation.interrupt);
                    let queue =
                        ServedQueue::new(active, activation.features, interrupt, &activation.mem);
                    queues.push(RoleQueue { role, queue });
                }
                None => self.shared.ledger.faults().queues_unexplained += 1,
            }
        }
        let has = |role| queues.iter().any(|queue| queue.role == role);
        if has(QueueRole::Stats) {
            self.shared.stats.activate();
        }
        self.shared.set_driver(Some(ActiveDriver {
            features: activation.features,
            has_reporting_queue: has(QueueRole::Reporting),
            has_hint_queue: has(QueueRole::Hint),
        }));
        self.active = Some(Active {
            ram: activation.mem,
            features: activation.features,
            interrupt: activation.interrupt,
            queues,
            parked: self.parked_before.take(),
        });
        Ok(())
    }

    fn queue_ready(&mut self, queue_index: u16, turn: &mut Turn) -> Result<(), WorkerError> {
        self.while_active(|worker, active| worker.serve(active, queue_index, false, turn))
    }

    fn queue_ready_while_held(
        &mut self,
        queue_index: u16,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        self.while_active(|worker, active| worker.serve(active, queue_index, true, turn))
    }

    fn source_ready(
        &mut self,
        token: u32,
        _sources: &mut EventSources,
        _turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        match token {
            REFILL => {
                if let Err(e) = self.shared.refill.read() {
                    // Nothing to read: another read was faster. The requested state decides.
                    log::debug!("balloon: statistics request without a signal: {e}");
                }
                let poll_ms = self.shared.stats_poll_ms.load(Ordering::Relaxed);
                self.timer.set(poll_ms);
            }
            POLL => {
                self.timer.restart();
                self.shared.stats.want();
            }
            _ => return Ok(()),
        }
        self.while_active(Self::request_refill)
    }

    fn idle_sources(&self) -> Vec<(RawFd, u32)> {
        vec![
            (self.shared.refill.as_raw_fd(), REFILL),
            (self.timer.fd(), POLL),
        ]
    }

    fn state(&self) -> HandlerState {
        let active = self.active.as_ref();
        let queues = active.iter().flat_map(|active| &active.queues);
        HandlerState {
            queues: queues.map(|it| it.queue.position()).collect(),
            own: Some(Saved::of(&BalloonWorkerState {
                parked: active.map_or(self.parked_before, |active| active.parked),
            })),
        }
    }

    fn restore(&mut self, own: Option<&Saved>) -> Result<(), StateError> {
        const PART: Part = parts::BALLOON_WORKER;
        let missing = || StateError::invalid(PART, "parked", "is missing");
        let BalloonWorkerState { parked } = own.ok_or_else(missing)?.read()?;
        let heads = QUEUE_SIZES.into_iter().max().unwrap_or(0);
        require(
            parked.is_none_or(|head| head < heads),
            PART,
            "parked",
            || format!("is {parked:?}, no ring is so long"),
        )?;
        self.parked_before = parked;
        Ok(())
    }

    fn reset(&mut self) {
        self.parked_before = None;
        self.active = None;
        self.batch = Batch::default();
        self.shared.set_driver(None);
        self.shared.hinting.forget_driver(&self.shared.config);
        self.shared.stats.reset();
    }
}

impl Batch {
    /// For each chain, the number of its first bytes that read as zeros since the engine's last batch.
    fn initialized_lengths(&self, engine: &DiscardEngine) -> Vec<u32> {
        let mut first = 0;
        let length = |end: &usize| {
            let claims = &self.ordered[first..*end];
            first = *end;
            let mut bytes = 0;
            for claim in claims {
                let zeroed = engine.zeroed_prefix(*claim);
                bytes += zeroed;
                if zeroed < claim.bytes {
                    break;
                }
            }
            u32::try_from(bytes).unwrap_or(u32::MAX)
        };
        self.ends.iter().map(length).collect()
    }
}

/// The content that the guest may rely on. With PAGE_POISON it expects free pages unchanged or filled with its value,
/// and this is reached only if that value is zero (virtio 1.2 §5.5.6.7.2). Pages in the balloon are allocated, and are
/// not read before they are written.
fn expected(path: Path, features: u64) -> Expected {
    if path != Path::Inflate && features & VIRTIO_BALLOON_F_PAGE_POISON != 0 {
        Expected::Zeros
    } else {
        Expected::Anything
    }
}

/// The outcome if no discard was attempted.
fn skip_all(claims: &[GuestRange], reason: SkipReason) -> Outcome {
    let mut outcome = Outcome::default();
    for claim in claims {
        outcome.requested.add(claim.bytes);
    }
    outcome.skipped.add(reason, outcome.requested.bytes);
    outcome
}
