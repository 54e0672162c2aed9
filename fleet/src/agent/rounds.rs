//! One round of the agent: updates its data about host and VMs, plans, and acts.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::DecisionCounts;
use super::acts::Acts;
use super::clock::Clock;
use super::journal::Journal;
use super::lessons::SavedLessons;
use super::locks::VmLock;
use super::vms::{Direction, StartRefusal, Vm, Vms};
use crate::admission::Request;
use crate::agent_config::AgentConfig;
use crate::execute::{Executor, GroupFiles, Order, Settled};
use crate::model::{Bytes, HostFacts, HugePool, InForce, Interlock, Inventory, Ledger, VmId};
use crate::moves::HomeVm;
use crate::placement::MovableVm;
use crate::planner::{
    Action, ActionKind, Block, Plan, PlannerMemory, Present, current_ledger, plan,
};
use crate::reservations::SeenVm;
use crate::sample::{Discovery, Found, PatternError, RequestCounters, SocketOwners, VmReading};
use crate::worker::{OrderDone, VmEvent, VmEventKind, VmWorker, WorkerOptions};

/// A balloon that changes direction within this time counts as oscillating.
const OSCILLATION_MS: u64 = 60_000;
/// How long after its start an agent waits for all VMs' first sample before it reserves anything.
const LEARNING_MS: u64 = 10_000;

/// Number of scans after which a socket that does not belong to a VMM is checked again. The check is expensive, because
/// it inspects all processes, but it must be repeated, because a VMM may inherit the listener later.
const STRANGER_LOOKS: u32 = 15;

/// Starts serving a socket that was found, under a unique number.
pub(super) type Serve = Box<dyn Fn(&Found, u64, &AgentConfig) -> io::Result<VmWorker> + Send>;

/// Serves each VM with a thread; `report` passes its events to the control loop, and false ends the thread.
pub(super) fn with_threads(
    files: GroupFiles,
    clock: Clock,
    counters: Arc<RequestCounters>,
    report: impl Fn(VmEvent) -> bool + Clone + Send + 'static,
) -> Serve {
    Box::new(move |found, number, config| {
        let control = &config.planning.control;
        let options = WorkerOptions {
            sample: control.sample.duration(),
            deadline: control.sample_deadline.duration(),
            wants_activity: config.idle_policy(&found.name).is_some(),
            files: files.clone(),
            clock: clock.zero(),
            counters: Arc::clone(&counters),
        };
        VmWorker::start(found, number, options, report.clone())
    })
}

/// Claims of VMs that have not started yet.
pub(super) struct Claims {
    /// Reserved and not used yet.
    pub(super) promised: Bytes,
    /// The needs of refused VMs that may try again.
    pub(super) wanted: Vec<Bytes>,
}

/// The VMs of this host, the last plan for them, and its pending actions.
pub(super) struct VmRounds {
    discovery: Discovery,
    proc: PathBuf,
    clock: Clock,
    serve: Serve,
    vms: Vms,
    acts: Acts,
    lessons: SavedLessons,
    memory: PlannerMemory,
    plan: Arc<Plan>,
    executor: Executor,
    decisions: DecisionCounts,
}

impl VmRounds {
    pub(super) fn new(
        config: &AgentConfig,
        proc: PathBuf,
        (clock, serve): (Clock, Serve),
        (acts, lessons): (Acts, SavedLessons),
    ) -> Result<Self, PatternError> {
        let memory = PlannerMemory {
            state_since_ms: clock.now_ms(),
            window_from_ms: clock.now_ms(),
            ..PlannerMemory::default()
        };
        Ok(Self {
            discovery: Discovery::new(&config.discovery.sockets)?,
            proc,
            clock,
            serve,
            vms: Vms::default(),
            acts,
            lessons,
            memory,
            plan: Arc::default(),
            executor: Executor::default(),
            decisions: DecisionCounts::default(),
        })
    }

    /// Looks for sockets, and starts serving new or replaced ones.
    pub(super) fn scan(&mut self, config: &AgentConfig, journal: &mut Journal) {
        let (proc, serve, owners) = (&self.proc, &self.serve, OnceCell::new());
        let change = self.vms.follow(self.discovery.scan(), |found, number| {
            if let Some(fault) = found.fault {
                return Err(StartRefusal {
                    why: fault.to_owned(),
                    looks: 0,
                });
            }
            let owners = owners.get_or_init(|| SocketOwners::read(proc));
            if !config.discovery.any_program
                && let Some(stranger) = owners.stranger(&found.socket)
            {
                return Err(StartRefusal {
                    why: format!("the socket belongs to {stranger}, which is not a VMM"),
                    looks: STRANGER_LOOKS,
                });
            }
            let lock = VmLock::take(&found.identity)?;
            Ok((serve(found, number, config)?, lock))
        });
        for (id, why) in change.refused {
            journal.enter("vm", id.as_str(), format!("not served: {why}"));
        }
        let lines = [
            ("found", change.appeared),
            ("replaced", change.replaced),
            ("gone", change.went),
        ];
        for (text, ids) in lines {
            for id in ids {
                journal.enter("vm", id.as_str(), text.to_owned());
            }
        }
    }

    /// Applies a new configuration.
    pub(super) fn reload(&mut self, before: &AgentConfig, config: &AgentConfig) {
        if let Ok(discovery) = Discovery::new(&config.discovery.sockets) {
            self.discovery = discovery;
        }
        let watches = |config: &AgentConfig, vm: &Vm| config.idle_policy(vm.id.as_str()).is_some();
        let is_other = |vm: &Vm| watches(before, vm) != watches(config, vm);
        let other_watch = self.vms.iter().any(is_other);
        let (before, after) = (&before.planning.control, &config.planning.control);
        if before.sample != after.sample
            || before.sample_deadline != after.sample_deadline
            || other_watch
        {
            let serve = &self.serve;
            self.vms
                .restart(|found, number| serve(found, number, config));
        }
    }

    /// Processes an event; true if the next plan should not wait.
    pub(super) fn event(
        &mut self,
        event: VmEvent,
        config: &AgentConfig,
        journal: &mut Journal,
    ) -> bool {
        let name = event.id.as_str();
        let known = self.vms.get(name).map(|vm| vm.worker.number());
        if known != Some(event.worker) {
            // The event is from a thread whose VM has ended or was replaced.
            return false;
        }
        match event.kind {
            VmEventKind::Sampled(reading, process) => {
                return self.sampled(name, *reading, process, config, journal);
            }
            VmEventKind::Missed(failure) => {
                let Some(vm) = self.vms.get_mut(name) else {
                    return false;
                };
                vm.missed = vm.missed.saturating_add(1);
                vm.failure = Some(failure.kind());
                if vm.missed == 1 {
                    let text = format!("no answer: {}", api::error_line(&failure));
                    journal.enter("vm", name, text);
                }
            }
            VmEventKind::Done(done) => self.order_done(name, &done, journal),
            VmEventKind::Replaced(order) => {
                if let Some(vm) = self.vms.get_mut(name) {
                    vm.order_ended(&order);
                }
            }
        }
        false
    }

    /// The current facts.
    pub(super) fn inventory(
        &self,
        config: &AgentConfig,
        facts: &HostFacts,
        claims: Claims,
    ) -> Inventory {
        let now_ms = self.now_ms();
        let vms = self.vms.iter().filter_map(|vm| {
            let policy = |size| config.vm_policy(vm.id.as_str(), size);
            let known = (self.acts.of(&vm.id), self.lessons.of(&vm.id, vm.process()));
            vm.facts(policy, known, now_ms)
        });
        Inventory {
            now_ms,
            host: *facts,
            vms: vms.collect(),
            promised: claims.promised,
            wanted: claims.wanted,
        }
    }

    /// The current ledger, with the bursts and grants of the last plan.
    pub(super) fn ledger(
        &self,
        config: &AgentConfig,
        facts: &HostFacts,
        promised: Bytes,
    ) -> Ledger {
        let wanted = Vec::new();
        let inventory = self.inventory(config, facts, Claims { promised, wanted });
        current_ledger(&inventory, &config.planning, &self.plan, &self.memory)
    }

    /// Makes the next plan and hands over the actions that are allowed now.
    pub(super) fn plan_and_act(
        &mut self,
        config: &AgentConfig,
        facts: &HostFacts,
        claims: Claims,
        journal: &mut Journal,
    ) {
        let begin = Instant::now();
        let inventory = self.inventory(config, facts, claims);
        let plan = plan(&inventory, &config.planning, &self.memory);
        self.decisions.plans += 1;
        self.decisions.plan_us += u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        let (before, now) = (plan.host.state_before, plan.host.state);
        if before != now {
            let text = format!(
                "{before} → {now}: {} of the usable memory free, {} short",
                plan.host.free, plan.host.shortage
            );
            journal.enter("state", "", text);
        }
        if config.agent.dry_run {
            self.pretend(&plan, journal);
        } else {
            self.memory = plan.memory.clone();
            self.keep_lessons();
            self.executor.replace(plan.actions.clone());
        }
        self.plan = Arc::new(plan);
        self.act(facts, journal);
    }

    /// Saves what was learned, before any action depends on it.
    fn keep_lessons(&mut self) {
        for (id, memory) in &self.memory.vms {
            if let Some(vm) = self.vms.get(id.as_str()) {
                self.lessons.enter(id, vm.process(), memory.lessons());
            }
        }
        let vms = &self.vms;
        if let Err(error) = self.lessons.save(|id| vms.get(id.as_str()).is_some()) {
            log::error!("cannot save the lessons about VMs: {error}");
        }
    }

    /// Hands over all actions that are allowed now.
    pub(super) fn act(&mut self, facts: &HostFacts, journal: &mut Journal) {
        self.resend(journal);
        let (now_ms, host_available) = (self.now_ms(), facts.available());
        let (vms, acts) = (RefCell::new(&mut self.vms), &mut self.acts);
        let settled = self.executor.run(
            |action| {
                let vms = vms.borrow();
                let vm = vms.get(action.vm.as_str())?;
                Some(Present {
                    epoch: vm.epoch,
                    now_ms,
                    host_available,
                    balloon_target: vm.target(),
                })
            },
            |action| {
                let mut vms = vms.borrow_mut();
                let Some(vm) = vms.get_mut(action.vm.as_str()) else {
                    return false;
                };
                let order = Order::from(&action.kind);
                let process = vm.process();
                // An act that cannot be saved could not be undone.
                match acts.begin(&vm.id, process, &order) {
                    Ok(()) => vm.order(order),
                    Err(error) => {
                        log::error!("{}: {action} was not performed: {error}", vm.id);
                        false
                    }
                }
            },
        );
        for (action, settled) in settled {
            self.settle(&action, settled, journal);
        }
    }

    /// Excludes a VM from management, or includes it again; false if there is none with that name.
    ///
    /// # Errors
    /// The change cannot be saved, and is not made.
    pub(super) fn pin(
        &mut self,
        name: &str,
        pinned: bool,
        journal: &mut Journal,
    ) -> io::Result<bool> {
        let Some(vm) = self.vms.get_mut(name) else {
            return Ok(false);
        };
        self.acts.pin(&vm.id, vm.process(), pinned)?;
        vm.pinned = pinned;
        let text = if pinned { "pinned" } else { "unpinned" };
        journal.enter("vm", name, text.to_owned());
        Ok(true)
    }

    /// Orders every balloon emptied and all acts undone, for the VMs that this agent may manage.
    pub(super) fn restore(&mut self, config: &AgentConfig) {
        for vm in self.vms.iter_mut().filter(|vm| may_restore(vm, config)) {
            let balloon = (vm.target() > Bytes::ZERO).then_some(Order::Balloon(Bytes::ZERO));
            for order in balloon.into_iter().chain(self.acts.undoing(&vm.id)) {
                vm.order(order);
            }
        }
    }

    /// Whether orders are in progress.
    pub(super) fn has_orders(&self) -> bool {
        self.vms.iter().any(|vm| vm.orders > 0)
    }

    /// VMs that are not confirmed to be in their state without this agent.
    pub(super) fn unrestored(&self, config: &AgentConfig) -> Vec<String> {
        let mine = self.vms.iter().filter(|vm| may_restore(vm, config));
        let left = mine.filter(|vm| {
            vm.is_unconfirmed()
                || vm.orders > 0
                || vm.target() > Bytes::ZERO
                || self.acts.of(&vm.id) != InForce::default()
        });
        left.map(|vm| vm.id.to_string()).collect()
    }

    /// When reservations are possible: immediately, or in at most this many seconds, because the agent has just started
    /// and has no plan of all VMs yet.
    pub(super) fn learns_for(&self) -> Option<u64> {
        let learning = self.decisions.plans == 0 || self.has_unheard();
        learning.then(|| {
            LEARNING_MS
                .saturating_sub(self.clock.running_ms())
                .div_ceil(1000)
                .max(1)
        })
    }

    /// Whether VMs are still unknown, shortly after the start.
    pub(super) fn has_unheard(&self) -> bool {
        self.clock.running_ms() < LEARNING_MS
            && self
                .vms
                .iter()
                .any(|vm| vm.reading.is_none() && vm.missed == 0)
    }

    /// The memory that the VM of a reservation already has.
    pub(super) fn seen(&self, name: &str) -> Option<SeenVm> {
        let vm = self.vms.get(name)?;
        let reading = vm.reading.as_ref()?;
        // From now on, the pool's accounts include the pages that a VM on huge pages may still take.
        let resident = match reading.huge_pages {
            true => reading.configured,
            false => reading.sample.resident,
        };
        (!vm.has_ended()).then_some(SeenVm { resident })
    }

    /// The processes of the VMs.
    pub(super) fn pids(&self) -> Vec<i32> {
        let readings = self.vms.iter().filter_map(|vm| vm.reading.as_ref());
        readings.map(|reading| reading.pid).collect()
    }

    /// Huge pages that VMs hold, bytes.
    pub(super) fn pool_held(&self) -> Bytes {
        let readings = self.vms.iter().filter_map(|vm| vm.reading.as_ref());
        readings.map(|reading| reading.pool.held).sum()
    }

    /// The free memory of the pool that VMs may still take.
    pub(super) fn pool_callable(&self, pool: &HugePool) -> Bytes {
        let vms = self.vms.iter().filter(|vm| !vm.has_ended());
        let readings = vms.filter_map(|vm| vm.reading.as_ref());
        readings.map(|reading| reading.pool.callable(pool)).sum()
    }

    /// The planner's clock.
    pub(super) fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// Leaves a VM alone while it is being saved or woken.
    pub(super) fn hold(&mut self, name: &str, held: bool) {
        if let Some(vm) = self.vms.get_mut(name) {
            vm.hold(held);
        }
    }

    /// Leaves these VMs alone while they are being moved to or from another host.
    pub(super) fn hold_moves(&mut self, names: &BTreeSet<String>) {
        for vm in self.vms.iter_mut() {
            vm.move_it(names.contains(vm.id.as_str()));
        }
    }

    /// Sends an order to a VM; false if there is none to receive it.
    pub(super) fn order(&mut self, name: &str, order: Order) -> bool {
        self.vms.get_mut(name).is_some_and(|vm| vm.order(order))
    }

    /// One VM.
    pub(super) fn vm(&self, name: &str) -> Option<&Vm> {
        self.vms.get(name)
    }

    pub(super) fn has_vm(&self, name: &str) -> bool {
        self.vms.get(name).is_some()
    }

    /// The name that discovery gives the VM of this socket.
    pub(super) fn name_of_socket(&self, socket: &Path) -> Option<String> {
        self.discovery.name(socket)
    }

    /// The VMs that others may move.
    pub(super) fn movable(&self, config: &AgentConfig) -> Vec<MovableVm> {
        let vms = self.vms.iter().filter_map(|vm| {
            let reading = vm.reading.as_ref()?;
            let policy = config.vm_policy(vm.id.as_str(), reading.configured);
            let obstacle = obstacle(vm);
            Some(MovableVm {
                id: vm.id.clone(),
                min: policy.min,
                max: reading.configured,
                resident: reading.sample.resident,
                class: policy.class,
                movable: obstacle.is_none(),
                obstacle,
                moved: None,
            })
        });
        vms.collect()
    }

    /// The same, for the part of this agent that moves them.
    pub(super) fn home_vms(&self, config: &AgentConfig) -> Vec<HomeVm> {
        let vms = self.vms.iter().filter(|vm| !vm.has_ended());
        let vms = vms.filter_map(|vm| {
            let reading = vm.reading.as_ref()?;
            let policy = config.vm_policy(vm.id.as_str(), reading.configured);
            let max = reading.configured;
            Some(HomeVm {
                name: vm.id.to_string(),
                socket: vm.socket.clone(),
                process: vm.process(),
                request: Request {
                    min: reading.sample.resident.max(policy.min).min(max),
                    max,
                },
                obstacle: obstacle(vm),
            })
        });
        vms.collect()
    }

    pub(super) fn vms(&self) -> impl Iterator<Item = &Vm> {
        self.vms.iter()
    }

    pub(super) fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    pub(super) fn memory(&self) -> &PlannerMemory {
        &self.memory
    }

    pub(super) fn decisions(&self) -> &DecisionCounts {
        &self.decisions
    }

    /// Grants that wait for memory.
    pub(super) fn grants_waiting(&self) -> usize {
        self.executor.waiting().len()
    }

    fn sampled(
        &mut self,
        name: &str,
        reading: VmReading,
        process: u64,
        config: &AgentConfig,
        journal: &mut Journal,
    ) -> bool {
        let before = self.vms.get(name).and_then(|vm| vm.reading.as_ref());
        let urgent = is_urgent(before, &reading, config);
        let was_away = self.vms.get(name).is_some_and(|vm| vm.missed > 0);
        if self.vms.sampled(name, reading, process) {
            let text = "another machine stands behind the name".to_owned();
            journal.enter("vm", name, text);
        } else if was_away {
            journal.enter("vm", name, "answers again".to_owned());
        }
        self.follow_acts(name);
        urgent
    }

    fn order_done(&mut self, name: &str, done: &OrderDone, journal: &mut Journal) {
        let now_ms = self.now_ms();
        let Some(vm) = self.vms.get_mut(name) else {
            return;
        };
        vm.order_done(done, now_ms);
        if done.result.is_ok() {
            log_unsaved(self.acts.end(&vm.id, &done.order));
        }
        if let Err(error) = &done.result {
            self.decisions.count(done.order.name(), "order", "error");
            let text = format!("{} failed: {}", done.order.name(), api::error_line(error));
            journal.enter("action", name, text);
        }
    }

    /// Sends unconfirmed orders that return memory again.
    fn resend(&mut self, journal: &mut Journal) {
        let now_ms = self.now_ms();
        for vm in self.vms.iter_mut() {
            if let Some(to) = vm.to_resend(now_ms)
                && vm.order(Order::Balloon(to))
            {
                let text = format!("balloon target {to} sent again: the VMM did not confirm it");
                journal.enter("action", vm.id.as_str(), text);
            }
        }
    }

    /// Drops acts that ended without this agent: their process ended, or another client resumed the VM.
    fn follow_acts(&mut self, name: &str) {
        let Some(vm) = self.vms.get_mut(name) else {
            return;
        };
        log_unsaved(self.acts.follow(&vm.id, vm.process()));
        vm.pinned = self.acts.is_pinned(&vm.id);
        if self.acts.of(&vm.id).paused && vm.runs_unasked() {
            log_unsaved(self.acts.end(&vm.id, &Order::Resume));
        }
    }

    /// Records the actions that would be taken, and keeps the VMs as if they had not been planned, because they have no
    /// effect.
    fn pretend(&mut self, plan: &Plan, journal: &mut Journal) {
        let mut memory = plan.memory.clone();
        for action in &plan.actions {
            let old = self.memory.vm(action.vm.as_str()).cloned();
            if let (Some(old), Some((_, new))) =
                (old, memory.vms.iter_mut().find(|(id, _)| *id == action.vm))
            {
                *new = old;
            }
            self.decisions
                .count(action.kind.name(), action.reason.name(), "dry-run");
            journal.enter("action", action.vm.as_str(), format!("would {action}"));
        }
        self.memory = memory;
    }

    fn settle(&mut self, action: &Action, settled: Settled, journal: &mut Journal) {
        let (result, text) = match settled {
            Settled::Dropped(Block::Done) => return,
            Settled::Ordered => ("ordered", action.to_string()),
            Settled::Dropped(block) => ("dropped", format!("dropped: {action}: {block}")),
            Settled::Gone => (
                "gone",
                format!("dropped: {action}: the VM no longer exists"),
            ),
        };
        self.decisions
            .count(action.kind.name(), action.reason.name(), result);
        journal.enter("action", action.vm.as_str(), text);
        if settled == Settled::Ordered {
            self.note_order(&action.vm, &action.kind);
        }
    }

    fn note_order(&mut self, id: &VmId, kind: &ActionKind) {
        let now_ms = self.now_ms();
        let ActionKind::Balloon { from, to } = kind else {
            return;
        };
        let Some(vm) = self.vms.get_mut(id.as_str()) else {
            return;
        };
        let direction = if to > from {
            Direction::Inflate
        } else {
            Direction::Deflate
        };
        if let Some((before, at_ms)) = vm.moved
            && before != direction
            && now_ms.saturating_sub(at_ms) < OSCILLATION_MS
        {
            self.decisions.oscillations += 1;
        }
        vm.moved = Some((direction, now_ms));
    }
}

/// Why a VM cannot be moved now.
fn obstacle(vm: &Vm) -> Option<String> {
    let reading = vm.reading.as_ref()?;
    if vm.missed > 0 {
        return Some("it does not respond".to_owned());
    }
    if let Some(interlock) = vm.interlock() {
        return Some(format!("it must not be changed now: {interlock}"));
    }
    // Another host could not reserve huge pages for it, and moving it would free no other memory here.
    if vm.is_huge() {
        return Some("its memory is in huge pages".to_owned());
    }
    reading.fixed_by.map(str::to_owned)
}

/// An act that ended in memory but not on disk is undone once more by the next agent, which is harmless.
fn log_unsaved(result: io::Result<()>) {
    if let Err(error) = result {
        log::error!("cannot save the list of actions on VMs: {error}");
    }
}

/// Whether a guest with a balloon began to suffer, which should not wait for the next plan.
fn is_urgent(before: Option<&VmReading>, now: &VmReading, config: &AgentConfig) -> bool {
    let (Some(guest), Some(before)) = (now.sample.guest, before) else {
        return false;
    };
    if now.sample.balloon_target == Bytes::ZERO {
        return false;
    }
    let control = &config.planning.control;
    let has = now.configured - now.sample.ballooned;
    let least = has.part(control.suffer).max(control.suffer_min);
    // The guest's data may be arbitrary.
    let stalls = |reading: &VmReading| {
        reading.sample.guest.map_or(0, |guest| {
            let stalls = guest.alloc_stalls.unwrap_or(0);
            stalls.saturating_add(guest.oom_kills.unwrap_or(0))
        })
    };
    guest.available < least || stalls(now) > stalls(before)
}

/// Whether an agent that ends may return a VM's memory: no other manager controls it.
fn may_restore(vm: &Vm, config: &AgentConfig) -> bool {
    let managed = vm.reading.as_ref().is_none_or(|reading| {
        let policy = config.vm_policy(vm.id.as_str(), reading.configured);
        policy.managed()
    });
    let in_other_hands = vm.interlock().is_some_and(Interlock::in_other_hands);
    managed && !in_other_hands && !vm.is_huge() && !config.agent.dry_run
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{GuestClaims, VmSample};

    fn reading(alloc_stalls: u64, oom_kills: u64) -> VmReading {
        VmReading::of_4_gib(VmSample {
            balloon_target: Bytes::gib(1),
            ballooned: Bytes::gib(1),
            guest: Some(GuestClaims {
                available: Bytes::gib(2),
                alloc_stalls: Some(alloc_stalls),
                oom_kills: Some(oom_kills),
                ..GuestClaims::default()
            }),
            ..VmSample::default()
        })
    }

    #[test]
    fn counters_that_a_guest_makes_up_do_no_harm() {
        let config = AgentConfig::default();
        let urgent = |before: &VmReading, now: &VmReading| is_urgent(Some(before), now, &config);
        let (calm, most) = (reading(1, 1), reading(u64::MAX, u64::MAX));
        assert!(urgent(&calm, &most));
        assert!(!urgent(&most, &most));
        assert!(!urgent(&most, &calm));
    }
}
