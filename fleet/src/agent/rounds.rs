//! One round of the agent: follow what is there, plan, and act.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::DecisionCounts;
use super::clock::Clock;
use super::journal::Journal;
use super::vms::{Direction, Vm, Vms};
use crate::agent_config::AgentConfig;
use crate::execute::{Executor, GroupFiles, Order, Settled};
use crate::model::{Bytes, HostFacts, Inventory, Ledger, VmId};
use crate::placement::MovableVm;
use crate::planner::{Action, ActionKind, Block, Plan, PlannerMemory, Present, plan};
use crate::reservations::SeenVm;
use crate::sample::{Discovery, Found, PatternError, RequestCounters, VmReading};
use crate::worker::{OrderDone, VmEvent, VmEventKind, VmWorker, WorkerOptions};

/// A balloon that turns round within this time has swung.
const OSCILLATION_MS: u64 = 60_000;
/// How long after its start an agent waits for all VMs' first sample before it promises anything.
const LEARNING_MS: u64 = 10_000;

/// Hands a VM's event to the control loop; false ends the VM's thread.
type Report = Arc<dyn Fn(VmEvent) -> bool + Send + Sync>;

/// What the threads of all VMs share.
pub(super) struct Workers {
    pub(super) files: GroupFiles,
    pub(super) clock: Clock,
    pub(super) counters: Arc<RequestCounters>,
    pub(super) report: Report,
}

impl Workers {
    fn start(&self, found: &Found, number: u64, config: &AgentConfig) -> std::io::Result<VmWorker> {
        let control = &config.planning.control;
        let options = WorkerOptions {
            sample: control.sample.duration(),
            deadline: control.sample_deadline.duration(),
            files: self.files.clone(),
            clock: self.clock.zero(),
            counters: Arc::clone(&self.counters),
        };
        let report = Arc::clone(&self.report);
        VmWorker::start(found, number, options, move |event| report(event))
    }
}

/// The VMs of this host, the last plan for them, and what of it is still to be done.
pub(super) struct VmRounds {
    discovery: Discovery,
    workers: Workers,
    vms: Vms,
    memory: PlannerMemory,
    plan: Arc<Plan>,
    executor: Executor,
    decisions: DecisionCounts,
}

impl VmRounds {
    pub(super) fn new(config: &AgentConfig, workers: Workers) -> Result<Self, PatternError> {
        Ok(Self {
            discovery: Discovery::new(&config.discovery.sockets)?,
            workers,
            vms: Vms::default(),
            memory: PlannerMemory::default(),
            plan: Arc::default(),
            executor: Executor::default(),
            decisions: DecisionCounts::default(),
        })
    }

    /// Looks for sockets, and has those that are new or replaced served.
    pub(super) fn scan(&mut self, config: &AgentConfig, journal: &mut Journal) {
        let workers = &self.workers;
        let change = self.vms.follow(self.discovery.scan(), |found, number| {
            workers.start(found, number, config)
        });
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

    /// Follows a new configuration.
    pub(super) fn reload(&mut self, before: &AgentConfig, config: &AgentConfig) {
        if let Ok(discovery) = Discovery::new(&config.discovery.sockets) {
            self.discovery = discovery;
        }
        let (before, after) = (&before.planning.control, &config.planning.control);
        if before.sample != after.sample || before.sample_deadline != after.sample_deadline {
            let workers = &self.workers;
            self.vms
                .restart(|found, number| workers.start(found, number, config));
        }
    }

    /// Takes an event over; true when the next plan should not wait.
    pub(super) fn event(
        &mut self,
        event: VmEvent,
        config: &AgentConfig,
        journal: &mut Journal,
    ) -> bool {
        let name = event.id.as_str();
        let known = self.vms.get(name).map(|vm| vm.worker.number());
        if known != Some(event.worker) {
            // From a thread whose VM is gone or replaced.
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
                    let text = format!("no answer: {}", api::error_chain(&failure).join(": "));
                    journal.enter("vm", name, text);
                }
            }
            VmEventKind::Done(done) => self.order_done(name, &done, journal),
        }
        false
    }

    /// What is known now.
    pub(super) fn inventory(
        &self,
        config: &AgentConfig,
        facts: &HostFacts,
        promised: Bytes,
    ) -> Inventory {
        let vms = self.vms.iter().filter_map(|vm| {
            let name = config.policy_name(vm.id.as_str());
            vm.facts(|size| config.planning.vm_policy(name, size))
        });
        Inventory {
            now_ms: self.workers.clock.now_ms(),
            host: *facts,
            vms: vms.collect(),
            promised,
        }
    }

    /// The books as they are now, with what the last plan learned of bursts and grants.
    pub(super) fn ledger(
        &self,
        config: &AgentConfig,
        facts: &HostFacts,
        promised: Bytes,
    ) -> Ledger {
        let inventory = self.inventory(config, facts, promised);
        let reserve = config.planning.reserve(inventory.host.limit());
        let last = &self.plan.ledger;
        Ledger::of(&inventory, reserve, last.burst, last.granted)
    }

    /// Makes the next plan and hands over what may be done now.
    pub(super) fn plan_and_act(
        &mut self,
        config: &AgentConfig,
        facts: &HostFacts,
        promised: Bytes,
        journal: &mut Journal,
    ) {
        let begin = Instant::now();
        let inventory = self.inventory(config, facts, promised);
        let plan = plan(&inventory, &config.planning, &self.memory);
        self.decisions.plans += 1;
        self.decisions.plan_us += u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        let (before, now) = (plan.host.state_before, plan.host.state);
        if before != now {
            let text = format!(
                "{before} → {now}: {} of the usable memory free, {} lacking",
                plan.host.free, plan.host.shortage
            );
            journal.enter("state", "", text);
        }
        if config.agent.dry_run {
            self.pretend(&plan, journal);
        } else {
            self.memory = plan.memory.clone();
            self.executor.replace(plan.actions.clone());
        }
        self.plan = Arc::new(plan);
        self.act(facts, journal);
    }

    /// Hands over whatever may be done now.
    pub(super) fn act(&mut self, facts: &HostFacts, journal: &mut Journal) {
        let (now_ms, host_available) = (self.workers.clock.now_ms(), facts.available());
        let vms = &self.vms;
        let settled = self.executor.run(
            |action| {
                let vm = vms.get(action.vm.as_str())?;
                Some(Present {
                    epoch: vm.epoch,
                    now_ms,
                    host_available,
                    balloon_target: vm.target(),
                })
            },
            |action| {
                vms.get(action.vm.as_str())
                    .is_some_and(|vm| vm.worker.order(Order::from(&action.kind)))
            },
        );
        for (action, settled) in settled {
            self.settle(&action, settled, journal);
        }
    }

    /// Excludes a VM from management, or includes it again; false when there is none of that name.
    pub(super) fn pin(&mut self, name: &str, pinned: bool, journal: &mut Journal) -> bool {
        let Some(vm) = self.vms.get_mut(name) else {
            return false;
        };
        vm.pinned = pinned;
        let text = if pinned { "pinned" } else { "unpinned" };
        journal.enter("vm", name, text.to_owned());
        true
    }

    /// Orders every balloon away; how many orders went out.
    pub(super) fn order_restore(&mut self) -> usize {
        let balloons = self.vms.iter().filter(|vm| vm.target() > Bytes::ZERO);
        balloons
            .filter(|vm| vm.worker.order(Order::Balloon(Bytes::ZERO)))
            .count()
    }

    /// Whether there are VMs of which nothing is known yet, shortly after the start.
    pub(super) fn is_learning(&self) -> bool {
        self.workers.clock.now_ms() < LEARNING_MS
            && self
                .vms
                .iter()
                .any(|vm| vm.reading.is_none() && vm.missed == 0)
    }

    /// What is there of the VM of a reservation.
    pub(super) fn seen(&self, name: &str) -> Option<SeenVm> {
        let vm = self.vms.get(name)?;
        let resident = vm.reading.as_ref()?.sample.resident;
        // One that hangs is there all the same, with its memory; one that nobody listens for is not.
        let ended = matches!(vm.failure, Some("refused" | "no-socket" | "no-vm"));
        (!ended).then_some(SeenVm { resident })
    }

    pub(super) fn has_vm(&self, name: &str) -> bool {
        self.vms.get(name).is_some()
    }

    /// The name that discovery gives the VM of this socket.
    pub(super) fn name_of_socket(&self, socket: &Path) -> Option<String> {
        self.discovery.name(socket)
    }

    /// The VMs as others may move them.
    pub(super) fn movable(&self, config: &AgentConfig) -> Vec<MovableVm> {
        let vms = self.vms.iter().filter_map(|vm| {
            let reading = vm.reading.as_ref()?;
            let name = config.policy_name(vm.id.as_str());
            let policy = config.planning.vm_policy(name, reading.configured);
            Some(MovableVm {
                id: vm.id.clone(),
                min: policy.min,
                max: reading.configured,
                resident: reading.sample.resident,
                class: policy.class,
                movable: vm.missed == 0 && vm.interlock().is_none(),
                moved: None,
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
        urgent
    }

    fn order_done(&mut self, name: &str, done: &OrderDone, journal: &mut Journal) {
        let Some(vm) = self.vms.get_mut(name) else {
            return;
        };
        if let Order::Balloon(bytes) = done.order {
            if vm.ordered == Some(bytes) {
                vm.ordered = None;
            }
            if done.result.is_ok()
                && let Some(reading) = &mut vm.reading
            {
                // Until the next sample this is what is known to be asked for.
                reading.sample.balloon_target = bytes;
            }
        }
        if let Err(error) = &done.result {
            self.decisions.count(done.order.name(), "order", "error");
            let text = format!(
                "{} failed: {}",
                done.order.name(),
                api::error_chain(error).join(": ")
            );
            journal.enter("action", name, text);
        }
    }

    /// Enters what would be done, and remembers the VMs as if it had not been planned, because nothing happens to them.
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
            Settled::Gone => ("gone", format!("dropped: {action}: the VM is gone")),
        };
        self.decisions
            .count(action.kind.name(), action.reason.name(), result);
        journal.enter("action", action.vm.as_str(), text);
        if settled == Settled::Ordered {
            self.note_order(&action.vm, &action.kind);
        }
    }

    fn note_order(&mut self, id: &VmId, kind: &ActionKind) {
        let now_ms = self.workers.clock.now_ms();
        let ActionKind::Balloon { from, to } = kind else {
            return;
        };
        let Some(vm) = self.vms.get_mut(id.as_str()) else {
            return;
        };
        vm.ordered = Some(*to);
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

/// Whether a guest with a balloon began to suffer: it should not wait for the next plan.
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
    // A guest may say anything.
    let stalls = |reading: &VmReading| {
        reading.sample.guest.map_or(0, |guest| {
            let stalls = guest.alloc_stalls.unwrap_or(0);
            stalls.saturating_add(guest.oom_kills.unwrap_or(0))
        })
    };
    guest.available < least || stalls(now) > stalls(before)
}
