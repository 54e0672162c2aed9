//! One round of the control loop: follow what is there, plan, and act.

use std::sync::Arc;
use std::time::Instant;

use super::control::{Agent, unix_ms};
use super::vms::Direction;
use crate::execute::{GroupFile, Settled};
use crate::model::{Bytes, Inventory, VmId};
use crate::planner::{Action, ActionKind, Plan, Present, plan};
use crate::reservations::SeenVm;
use crate::sample::{
    Found, Order, OrderDone, VmEvent, VmEventKind, VmReading, VmWorker, WorkerSettings,
};

/// A balloon that turns round within this time has swung.
const OSCILLATION_MS: u64 = 60_000;

impl Agent {
    pub(super) fn follow_sockets(&mut self, found: Vec<Found>) {
        let settings = self.worker_settings();
        let teller = self.teller();
        let change = self.vms.follow(found, |found, number| {
            VmWorker::start(found, number, settings.clone(), teller.clone())
        });
        let lines = [
            ("found", change.appeared),
            ("replaced", change.replaced),
            ("gone", change.went),
        ];
        for (text, ids) in lines {
            for id in ids {
                self.journal
                    .enter(unix_ms(), "vm", id.as_str(), text.to_owned());
            }
        }
    }

    /// Lets every VM be served by a new thread under the settings as they are now.
    pub(super) fn restart_workers(&mut self) {
        let settings = self.worker_settings();
        let teller = self.teller();
        self.vms.restart(|found, number| {
            VmWorker::start(found, number, settings.clone(), teller.clone())
        });
    }

    fn worker_settings(&self) -> WorkerSettings {
        let control = &self.settings.config.control;
        WorkerSettings {
            sample: control.sample.duration(),
            deadline: control.sample_deadline.duration(),
            proc: self.host_files.proc.clone(),
            cgroup_root: self.host_files.cgroup_root.clone(),
            clock: self.clock(),
            counters: Arc::clone(&self.published.requests),
        }
    }

    pub(super) fn vm_event(&mut self, event: VmEvent) {
        let name = event.id.as_str();
        let known = self.vms.get(name).map(|vm| vm.worker.number());
        if known != Some(event.worker) {
            // From a thread whose VM is gone or replaced.
            return;
        }
        match event.kind {
            VmEventKind::Sampled(reading, process) => self.sampled(name, *reading, process),
            VmEventKind::Missed(failure) => {
                let Some(vm) = self.vms.get_mut(name) else {
                    return;
                };
                vm.missed = vm.missed.saturating_add(1);
                vm.failure = Some(failure.kind());
                if vm.missed == 1 {
                    let text = format!("no answer: {}", api::error_chain(&failure).join(": "));
                    self.journal.enter(unix_ms(), "vm", name, text);
                }
            }
            VmEventKind::Done(done) => self.order_done(name, &done),
        }
    }

    fn sampled(&mut self, name: &str, reading: VmReading, process: u64) {
        let before = self.vms.get(name).and_then(|vm| vm.reading.as_ref());
        let urgent = self.is_urgent(before, &reading);
        let was_away = self.vms.get(name).is_some_and(|vm| vm.missed > 0);
        if self.vms.sampled(name, reading, process) {
            let text = "another machine stands behind the name".to_owned();
            self.journal.enter(unix_ms(), "vm", name, text);
        } else if was_away {
            self.journal
                .enter(unix_ms(), "vm", name, "answers again".to_owned());
        }
        self.plan_wanted |= urgent;
    }

    /// Whether a guest with a balloon began to suffer: it should not wait for the next plan.
    fn is_urgent(&self, before: Option<&VmReading>, now: &VmReading) -> bool {
        let (Some(guest), Some(before)) = (now.sample.guest, before) else {
            return false;
        };
        if now.sample.balloon_target == Bytes::ZERO {
            return false;
        }
        let control = &self.settings.config.control;
        let has = now.configured - now.sample.ballooned;
        let least = has.part(control.suffer).max(control.suffer_min);
        let stalls = |reading: &VmReading| {
            reading.sample.guest.map_or(0, |guest| {
                guest.alloc_stalls.unwrap_or(0) + guest.oom_kills.unwrap_or(0)
            })
        };
        guest.available < least || stalls(now) > stalls(before)
    }

    fn order_done(&mut self, name: &str, done: &OrderDone) {
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
        match (&done.order, &done.result) {
            (Order::Pause, Ok(())) => vm.paused_by_us = true,
            (Order::Resume, Ok(())) => vm.paused_by_us = false,
            _ => {}
        }
        if let Err(error) = &done.result {
            self.decisions.count(done.order.name(), "order", "error");
            let text = format!(
                "{} failed: {}",
                done.order.name(),
                api::error_chain(error).join(": ")
            );
            self.journal.enter(unix_ms(), "action", name, text);
        }
    }

    /// What is known now.
    pub(super) fn inventory(&self) -> Inventory {
        let now_unix_ms = unix_ms();
        Inventory {
            now_ms: self.now_ms(),
            host: self.facts,
            vms: self
                .vms
                .iter()
                .filter_map(|vm| {
                    let name = self.settings.policy_name(vm.id.as_str());
                    vm.facts(|size| self.settings.config.vm_policy(name, size))
                })
                .collect(),
            promised: self.book.outstanding(
                now_unix_ms,
                self.settings.config.admission.reservation,
                |name| self.seen(name),
            ),
        }
    }

    /// What is there of the VM of a reservation.
    pub(super) fn seen(&self, name: &str) -> Option<SeenVm> {
        let vm = self.vms.get(name)?;
        let resident = vm.reading.as_ref()?.sample.resident;
        // One that hangs is there all the same, with its memory; one that nobody listens for is not.
        let ended = matches!(vm.failure, Some("refused" | "no-socket" | "no-vm"));
        (!ended).then_some(SeenVm { resident })
    }

    pub(super) fn follow_reservations(&mut self) {
        let mut book = std::mem::take(&mut self.book);
        let dropped = book.follow(unix_ms(), |name| self.seen(name));
        self.book = book;
        match dropped {
            Ok(dropped) => {
                for entry in dropped {
                    let text = format!(
                        "reservation of {} given back, it was {}",
                        entry.promised,
                        entry.phase.name()
                    );
                    self.journal.enter(unix_ms(), "admission", &entry.vm, text);
                }
            }
            Err(error) => log::error!("{}", api::chain_report("reservations", &error)),
        }
    }

    pub(super) fn make_plan(&mut self) {
        let begin = Instant::now();
        let plan = plan(&self.inventory(), &self.settings.config, &self.memory);
        self.decisions.plans += 1;
        self.decisions.plan_us += u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        let (before, now) = (plan.host.state_before, plan.host.state);
        if before != now {
            let text = format!(
                "{before} → {now}: {} of the usable memory free, {} lacking",
                plan.host.free, plan.host.shortage
            );
            self.journal.enter(unix_ms(), "state", "", text);
        }
        if self.settings.agent.dry_run {
            self.tell_dry(&plan);
        } else {
            self.memory = plan.memory.clone();
            self.executor.replace(plan.actions.clone());
        }
        self.plan = Arc::new(plan);
        self.execute();
    }

    /// Tells what would be done, and remembers the VMs as if it had not been planned, because nothing happens to them.
    fn tell_dry(&mut self, plan: &Plan) {
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
            let text = format!("would {}", describe(action));
            self.journal
                .enter(unix_ms(), "action", action.vm.as_str(), text);
        }
        self.memory = memory;
    }

    /// Hands over whatever may be done now.
    pub(super) fn execute(&mut self) {
        let mut executor = std::mem::take(&mut self.executor);
        let (now_ms, host_available) = (self.now_ms(), self.facts.available());
        let vms = &self.vms;
        let settled = executor.run(
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
                    .is_some_and(|vm| vm.worker.order(order_of(&action.kind)))
            },
        );
        self.executor = executor;
        for (action, settled) in settled {
            self.settle(&action, settled);
        }
    }

    fn settle(&mut self, action: &Action, settled: Settled) {
        let result = match settled {
            Settled::Ordered => "ordered",
            Settled::Dropped(crate::planner::Block::Done) => return,
            Settled::Dropped(_) => "dropped",
            Settled::Gone => "gone",
        };
        self.decisions
            .count(action.kind.name(), action.reason.name(), result);
        let text = match settled {
            Settled::Ordered => describe(action),
            Settled::Dropped(block) => format!("dropped: {}: {block}", describe(action)),
            Settled::Gone => format!("dropped: {}: the VM is gone", describe(action)),
        };
        self.journal
            .enter(unix_ms(), "action", action.vm.as_str(), text);
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

    /// Orders every balloon away; how many orders went out.
    pub(super) fn order_restore(&mut self) -> usize {
        let mut count = 0;
        for vm in self.vms.iter() {
            if vm.target() > Bytes::ZERO && vm.worker.order(Order::Balloon(Bytes::ZERO)) {
                count += 1;
            }
        }
        count
    }
}

fn order_of(kind: &ActionKind) -> Order {
    match *kind {
        ActionKind::Balloon { to, .. } => Order::Balloon(to),
        ActionKind::Reporting { policy } => Order::Report(reporting_change(&policy)),
        ActionKind::MemoryMax { limit } => Order::Group(GroupFile::MemoryMax, limit),
        ActionKind::MemoryHigh { limit } => Order::Group(GroupFile::MemoryHigh, limit),
        ActionKind::SwapMax { limit } => Order::Group(GroupFile::SwapMax, Some(limit)),
        ActionKind::Pause => Order::Pause,
        ActionKind::Resume => Order::Resume,
        ActionKind::Kill => Order::Kill,
    }
}

fn reporting_change(policy: &api::ReportingPolicy) -> api::ReclaimThresholdsChange {
    api::ReclaimThresholdsChange {
        reporting_policy: Some(api::ReportingPolicyChange {
            order_min: Some(policy.order_min),
            pending_blocks: Some(policy.pending_blocks),
            delay_ms_max: Some(policy.delay_ms_max),
            age_ms_min: Some(policy.age_ms_min),
            bytes_per_second_max: Some(policy.bytes_per_second_max),
        }),
        ..api::ReclaimThresholdsChange::default()
    }
}

/// An action in words.
pub(super) fn describe(action: &Action) -> String {
    let what = match &action.kind {
        ActionKind::Balloon { from, to } => format!("balloon {from} → {to}"),
        ActionKind::Reporting { policy } => format!(
            "reporting policy: {} blocks pending, {} ms at most, blocks {} ms old",
            policy.pending_blocks, policy.delay_ms_max, policy.age_ms_min
        ),
        ActionKind::MemoryMax { limit } => format!("memory.max {}", show_limit(*limit)),
        ActionKind::MemoryHigh { limit } => format!("memory.high {}", show_limit(*limit)),
        ActionKind::SwapMax { limit } => format!("memory.swap.max {limit}"),
        ActionKind::Pause | ActionKind::Resume | ActionKind::Kill => action.kind.name().to_owned(),
    };
    format!("{what} ({})", action.reason.name())
}

fn show_limit(limit: Option<Bytes>) -> String {
    limit.map_or_else(|| "off".to_owned(), |limit| limit.to_string())
}
