//! The queue half of the balloon, on its own thread.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::accounting::{GuestFaults, Path};
use super::hinting::CommandEffect;
use super::numbering::{Numbering, QueueRole};
use super::policy::PausePhase;
use super::shared::{ActiveDriver, Shared, takes_policy};
use super::spec::VIRTIO_BALLOON_F_PAGE_POISON;
use super::stats::{STATS_BYTES_MAX, StatsSample};
use super::stats_timer::StatsTimer;
use super::{chain, hint, inflate, reporting};
use crate::device::{Activation, GuestRam, Interrupt, QueueHandler, WorkerError};
use crate::reclaim::{DiscardEngine, Expected, Extent, GuestRange, Outcome, SkipReason};
use crate::worker::EventSources;

/// A batch is worked off when it has this many ranges: four full vectors. One
/// chain may take it past that by what a chain may hold.
const BATCH_RANGES_MAX: usize = 4096;

/// Token of the descriptor that says somebody wants statistics.
const REFILL: u32 = 0;
/// Token of the timer that asks for them.
const POLL: u32 = 1;

/// Serves all queues of the balloon.
#[derive(Debug)]
pub(super) struct BalloonWorker {
    shared: Arc<Shared>,
    engine: DiscardEngine,
    timer: StatsTimer,
    active: Option<Active>,
    batch: Batch,
    /// Page frame numbers or statistics of one chain.
    bytes: Vec<u8>,
    /// Not yet in the ledger.
    faults: GuestFaults,
}

/// What exists only while a driver is running.
struct Active {
    ram: GuestRam,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
    queues: Vec<RoleQueue>,
    /// Head of the statistics chain we keep until somebody asks.
    parked: Option<u16>,
}

struct RoleQueue {
    index: u16,
    role: QueueRole,
    queue: Queue,
}

/// How a batch is worked off.
#[derive(Clone, Copy, Debug)]
struct Handled {
    /// Where it is counted.
    path: Path,
    /// Why none of it is to be discarded, if so.
    refusal: Option<SkipReason>,
}

/// Ranges collected, and the chains that wait for them to be discarded.
#[derive(Debug, Default)]
struct Batch {
    claims: Vec<GuestRange>,
    heads: Vec<u16>,
}

impl std::fmt::Debug for Active {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let roles = self.queues.iter().map(|q| (q.index, q.role));
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
            batch: Batch::default(),
            bytes: Vec::new(),
            faults: GuestFaults::default(),
        }
    }

    /// `held`: the vCPU that rang waits until this returns.
    fn serve(
        &mut self,
        active: &mut Active,
        queue_index: u16,
        held: bool,
    ) -> Result<(), WorkerError> {
        let Some(at) = active.queues.iter().position(|q| q.index == queue_index) else {
            return Ok(());
        };
        let mem = active.ram.memory().into_inner();
        let role = active.queues[at].role;
        let answered = match role {
            QueueRole::Inflate => self.serve_discards(active, at, Path::Inflate, &mem)?,
            QueueRole::Reporting => self.serve_discards(active, at, Path::Report, &mem)?,
            QueueRole::Deflate => self.serve_deflate(active, at, &mem)?,
            QueueRole::Stats => self.serve_stats(active, at, &mem)?,
            QueueRole::Hint => self.serve_hints(active, at, &mem, held)?,
        };
        if answered {
            notify(&mut active.queues[at], &mem, active.interrupt.as_ref())?;
        }
        Ok(())
    }

    /// Inflate and reporting: collect, discard, answer.
    fn serve_discards(
        &mut self,
        active: &mut Active,
        at: usize,
        path: Path,
        mem: &GuestMemoryMmap<()>,
    ) -> Result<bool, WorkerError> {
        let index = active.queues[at].index;
        let available = chain::available(&active.queues[at].queue, index, mem)?;
        // Pages in the balloon are allocated ones: poison is no matter there.
        let poisoned = path == Path::Report && self.shared.poison(active.features).is_some();
        let refusal = poisoned.then_some(SkipReason::PagePoison);
        let handled = Handled { path, refusal };
        self.batch.clear();
        let mut started = Instant::now();
        for _ in 0..available {
            let Some(chain) = chain::take(&mut active.queues[at].queue, index, mem)? else {
                break;
            };
            self.batch.heads.push(chain.head_index());
            let (claims, faults) = (&mut self.batch.claims, &mut self.faults);
            match path {
                Path::Inflate => inflate::gather(chain, mem, &mut self.bytes, claims, faults),
                Path::Report => reporting::gather(chain, claims, faults),
                Path::Hint => unreachable!("hints are judged chain by chain"),
            }
            if claims.len() >= BATCH_RANGES_MAX {
                self.finish_batch(active, at, handled, mem, started)?;
                started = Instant::now();
            }
        }
        self.finish_batch(active, at, handled, mem, started)?;
        Ok(available > 0)
    }

    /// Hinting: chain by chain, because each is judged by itself; see [`hint`].
    fn serve_hints(
        &mut self,
        active: &mut Active,
        at: usize,
        mem: &GuestMemoryMmap<()>,
        held: bool,
    ) -> Result<bool, WorkerError> {
        let index = active.queues[at].index;
        let available = chain::available(&active.queues[at].queue, index, mem)?;
        for position in 0..available {
            let started = Instant::now();
            let Some(chain) = chain::take(&mut active.queues[at].queue, index, mem)? else {
                break;
            };
            self.batch.clear();
            let head = chain.head_index();
            let claims = &mut self.batch.claims;
            if let Some(id) = hint::gather(chain, mem, claims, &mut self.faults) {
                self.obey_hinting_command(active, id);
            }
            if self.batch.claims.is_empty() {
                let queue = &mut active.queues[at].queue;
                chain::answer(queue, index, mem, head, &mut self.faults)?;
                continue;
            }
            self.batch.heads.push(head);
            let is_held = held && position + 1 == available;
            let handled = Handled {
                path: Path::Hint,
                refusal: self.hint_refusal(active, is_held),
            };
            self.finish_batch(active, at, handled, mem, started)?;
        }
        Ok(available > 0)
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

    /// Discards what has been collected and only then answers its chains.
    fn finish_batch(
        &mut self,
        active: &mut Active,
        at: usize,
        handled: Handled,
        mem: &GuestMemoryMmap<()>,
        started: Instant,
    ) -> Result<(), WorkerError> {
        if self.batch.heads.is_empty() {
            return Ok(());
        }
        let Handled { path, refusal } = handled;
        // Held until the chains are answered: a pause is one when nobody is past here.
        let passage = (path == Path::Report).then(|| self.shared.control.gate().begin());
        let paused = matches!(passage, Some(Err(_)));
        let refusal = refusal.or(paused.then_some(SkipReason::ReportingPaused));
        if paused && self.shared.control.phase() == PausePhase::PausedByGuest {
            self.faults.reports_while_paused += self.batch.heads.len() as u64;
        }
        let outcome = match refusal {
            Some(reason) => skip_all(&self.batch.claims, reason),
            None => {
                let expected = expected(path, active.features);
                self.engine
                    .discard(&active.ram, &mut self.batch.claims, expected)
            }
        };
        let RoleQueue { index, queue, .. } = &mut active.queues[at];
        for head in &self.batch.heads {
            chain::answer(queue, *index, mem, *head, &mut self.faults)?;
        }
        let chains = self.batch.heads.len() as u64;
        self.batch.clear();
        let mut figures = self.shared.ledger.path(path);
        let first_failure = figures.failed.ranges == 0 && outcome.failed.ranges > 0;
        figures.record(&outcome, chains, started.elapsed());
        drop(figures);
        // Once: the counters tell the rest, and a guest could repeat it at will.
        if let Some(e) = outcome.first_error.filter(|_| first_failure) {
            log::warn!("balloon: guest memory cannot be given back ({path:?}): {e}");
        }
        Ok(())
    }

    /// Deflation costs nothing: the pages come back when they are touched. But once
    /// it is answered the driver uses them, so whatever was inflated before must be
    /// done first, whichever doorbell was heard first.
    fn serve_deflate(
        &mut self,
        active: &mut Active,
        at: usize,
        mem: &GuestMemoryMmap<()>,
    ) -> Result<bool, WorkerError> {
        // In this order: nothing deflated here was inflated after the look below.
        let available = chain::available(&active.queues[at].queue, active.queues[at].index, mem)?;
        let mut queues = active.queues.iter();
        if let Some(inflate) = queues.position(|queue| queue.role == QueueRole::Inflate)
            && self.serve_discards(active, inflate, Path::Inflate, mem)?
        {
            notify(&mut active.queues[inflate], mem, active.interrupt.as_ref())?;
        }
        let at = &mut active.queues[at];
        let mut deflated = Extent::default();
        for _ in 0..available {
            let Some(chain) = chain::take(&mut at.queue, at.index, mem)? else {
                break;
            };
            let head = chain.head_index();
            inflate::count_deflated(chain, &mut deflated, &mut self.faults);
            chain::answer(&mut at.queue, at.index, mem, head, &mut self.faults)?;
        }
        self.shared.ledger.deflate().add_all(deflated);
        Ok(available > 0)
    }

    /// Takes in statistics and keeps their buffer. Returns whether one was answered.
    fn serve_stats(
        &mut self,
        active: &mut Active,
        at: usize,
        mem: &GuestMemoryMmap<()>,
    ) -> Result<bool, WorkerError> {
        let RoleQueue { index, queue, .. } = &mut active.queues[at];
        let mut answered = false;
        for _ in 0..chain::available(queue, *index, mem)? {
            let Some(chain) = chain::take(queue, *index, mem)? else {
                break;
            };
            let head = chain.head_index();
            chain::read(
                chain,
                mem,
                STATS_BYTES_MAX,
                &mut self.bytes,
                &mut self.faults,
            );
            // The standard allows one buffer. We keep the newest.
            if let Some(older) = active.parked.replace(head) {
                self.faults.stats_surplus_buffers += 1;
                chain::answer(queue, *index, mem, older, &mut self.faults)?;
                answered = true;
            }
            let private = takes_policy(active.features);
            let now = Instant::now();
            let sample = StatsSample::parse(&self.bytes, now, private, &mut self.faults);
            self.shared.stats.publish(sample);
        }
        Ok(answered)
    }

    /// Returns the parked statistics buffer if somebody wants a new one.
    fn request_refill(&mut self, active: &mut Active) -> Result<(), WorkerError> {
        if !self.shared.stats.is_wanted() {
            return Ok(());
        }
        let stats_queue = active
            .queues
            .iter_mut()
            .find(|q| q.role == QueueRole::Stats);
        // Without a buffer there is nothing to return: it is with the guest,
        // and when it comes it answers the request.
        let (Some(at), Some(head)) = (stats_queue, active.parked.take()) else {
            return Ok(());
        };
        let mem = active.ram.memory().into_inner();
        chain::answer(&mut at.queue, at.index, &mem, head, &mut self.faults)?;
        notify(at, &mem, active.interrupt.as_ref())
    }

    /// Runs `work` on the active state, if there is one, and books the faults.
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
            // Nothing is served from here to the next reset: whoever waits
            // for statistics, or asks whether reports arrive, must know.
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
                Some(role) => queues.push(RoleQueue {
                    index: active.index,
                    role,
                    queue: active.queue,
                }),
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
            parked: None,
        });
        Ok(())
    }

    fn queue_ready(&mut self, queue_index: u16) -> Result<(), WorkerError> {
        self.while_active(|worker, active| worker.serve(active, queue_index, false))
    }

    fn queue_ready_while_held(&mut self, queue_index: u16) -> Result<(), WorkerError> {
        self.while_active(|worker, active| worker.serve(active, queue_index, true))
    }

    fn source_ready(&mut self, token: u32, _sources: &mut EventSources) -> Result<(), WorkerError> {
        match token {
            REFILL => {
                if let Err(e) = self.shared.refill.read() {
                    // Nothing to read: somebody was faster. What is wanted tells.
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

    fn reset(&mut self) {
        self.active = None;
        self.batch.clear();
        self.shared.set_driver(None);
        self.shared.hinting.forget_driver(&self.shared.config);
        self.shared.stats.reset();
    }
}

impl Batch {
    fn clear(&mut self) {
        self.claims.clear();
        self.heads.clear();
    }
}

/// What the guest may rely on. With PAGE_POISON it wants free pages as they are, or filled with its
/// value, and gets here only if that is zero (virtio 1.2 §5.5.6.7.2). Pages in the balloon are
/// allocated ones, which nobody reads before they are written.
fn expected(path: Path, features: u64) -> Expected {
    if path != Path::Inflate && features & VIRTIO_BALLOON_F_PAGE_POISON != 0 {
        Expected::Zeros
    } else {
        Expected::Anything
    }
}

/// The outcome of not even trying.
fn skip_all(claims: &[GuestRange], reason: SkipReason) -> Outcome {
    let mut outcome = Outcome::default();
    for claim in claims {
        outcome.requested.add(claim.bytes);
    }
    outcome.skipped.add(reason, outcome.requested.bytes);
    outcome
}

fn notify(
    at: &mut RoleQueue,
    mem: &GuestMemoryMmap<()>,
    interrupt: &dyn Interrupt,
) -> Result<(), WorkerError> {
    let needed = at.queue.needs_notification(mem);
    if needed.map_err(|e| chain::unusable(at.index, &e))? {
        interrupt.signal_queue(at.index);
    }
    Ok(())
}
