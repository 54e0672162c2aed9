//! Writes the plan: ordered actions, explanations, and memory for the next plan.

use crate::config::{Config, ControlConfig};
use crate::model::{Bytes, Inventory, Ledger, VmId};

use super::view::View;
use super::{
    Action, ActionKind, Decision, Explanation, HostExplanation, Phase, Plan, PlannerMemory,
    Precondition, Reason, VmMemory, reporting, take,
};

/// Number of planning intervals for which a plan is valid.
const VALID_PLANS: u64 = 2;

/// Everything needed to write an action.
struct Writer<'a> {
    inventory: &'a Inventory,
    config: &'a Config,
    reserve: Bytes,
    granted: Bytes,
    free: Vec<Action>,
    grant: Vec<Action>,
}

pub(super) fn plan(
    mut views: Vec<View<'_>>,
    others: Vec<(usize, ActionKind, Reason)>,
    host: HostExplanation,
    ledger: Ledger,
    mut memory: PlannerMemory,
    inventory: &Inventory,
    config: &Config,
) -> Plan {
    let mut writer = Writer {
        inventory,
        config,
        reserve: ledger.reserved,
        granted: Bytes::ZERO,
        free: Vec::new(),
        grant: Vec::new(),
    };
    let mut explanations = Vec::with_capacity(views.len());
    for view in &mut views {
        explanations.push(explain(view, inventory.now_ms));
        writer.lever(view, &host);
        writer.enforce(view);
        writer.balloon(view);
    }
    for (index, kind, reason) in others {
        let action = writer.action(&views[index], Phase::Free, kind, reason);
        writer.free.push(action);
    }
    memory.vms = views.into_iter().map(remember).collect();
    writer.free.append(&mut writer.grant);
    Plan {
        at_ms: inventory.now_ms,
        host,
        ledger,
        actions: writer.free,
        explanations,
        memory,
    }
}

fn remember(view: View<'_>) -> (VmId, VmMemory) {
    (view.facts.id.clone(), view.memory)
}

impl Writer<'_> {
    fn action(&self, view: &View<'_>, phase: Phase, kind: ActionKind, reason: Reason) -> Action {
        let host_available_min = match phase {
            Phase::Free => Bytes::ZERO,
            Phase::Grant => self.reserve + self.granted,
        };
        Action {
            vm: view.facts.id.clone(),
            phase,
            kind,
            reason,
            requires: Precondition {
                epoch: view.facts.epoch,
                valid_until_ms: self.inventory.now_ms + VALID_PLANS * self.config.control.plan.0,
                host_available_min,
                balloon_target: matches!(kind, ActionKind::Balloon { .. }).then_some(view.target),
            },
        }
    }

    fn lever(&mut self, view: &mut View<'_>, host: &HostExplanation) {
        if let Some(way) = reporting::lever(view, host.state, self.config) {
            view.memory.reporting = Some(way);
            let kind = reporting::action(way, &self.config.reporting);
            let action = self.action(view, Phase::Free, kind, Reason::ReportingLever);
            self.free.push(action);
        }
    }

    /// Limits a lying VM to the memory that it claims to use, so that it harms only itself.
    fn enforce(&mut self, view: &mut View<'_>) {
        if view.in_other_hands() {
            return;
        }
        let limit = (view.facts.policy.enforce && view.memory.distrusted).then(|| {
            view.memory
                .enforced
                .unwrap_or_else(|| view.enforced_limit())
        });
        if limit != view.memory.enforced {
            view.memory.enforced = limit;
            let kind = ActionKind::MemoryMax { limit };
            let action = self.action(view, Phase::Free, kind, Reason::Lying);
            self.free.push(action);
        }
    }

    fn balloon(&mut self, view: &mut View<'_>) {
        if view.to == view.target {
            return;
        }
        let grant = view.grant(view.to);
        let phase = if grant > Bytes::ZERO {
            Phase::Grant
        } else {
            Phase::Free
        };
        self.granted += grant;
        let kind = ActionKind::Balloon {
            from: view.target,
            to: view.to,
        };
        let action = self.action(view, phase, kind, view.reason);
        remember_move(view, grant, self.inventory.now_ms, &self.config.control);
        match phase {
            Phase::Free => self.free.push(action),
            Phase::Grant => self.grant.push(action),
        }
    }
}

/// Records a move of a balloon for the next plans.
fn remember_move(view: &mut View<'_>, grant: Bytes, now_ms: u64, control: &ControlConfig) {
    let pending = view.pending_gain(control);
    let memory = &mut view.memory;
    let grows = view.to > view.target;
    memory.turn(grows, now_ms);
    memory.asked_at_ms = now_ms;
    memory.asked_before = view.target;
    memory.asked_from = view.sample.ballooned;
    if view.to > view.target {
        memory.asked_gain = pending + view.gain;
        memory.taken_at_ms = now_ms;
        memory.give_blocked_until_ms = now_ms + control.block_give.0;
    } else {
        memory.asked_gain = pending.min(view.to - view.sample.ballooned);
        if view.reason != Reason::Stuck {
            // After a silence, `learned_min` protects the guest, and decreases when the guest needs less.
            let reversals = match view.reason {
                Reason::StallSuspected => 0,
                _ => memory.reversals,
            };
            let block = control.block_take.0 << reversals;
            memory.take_blocked_until_ms = now_ms + block.min(control.block_max.0);
        }
    }
    if grant > Bytes::ZERO {
        memory.granted += grant;
        memory.granted_at_ms = now_ms;
    }
    memory.target = view.to;
}

fn explain(view: &View<'_>, now_ms: u64) -> Explanation {
    let decision = if view.to > view.target {
        Decision::Take(view.to - view.target)
    } else if view.to < view.target {
        Decision::Give(view.target - view.to)
    } else {
        Decision::Keep
    };
    Explanation {
        vm: view.facts.id.clone(),
        decision,
        reason: if take::in_use(&view.memory.squeezed) && decision == Decision::Keep {
            Reason::LastResort
        } else {
            view.reason
        },
        target_before: view.target,
        target_after: view.to,
        target_range: (view.low, view.high),
        ballooned: view.sample.ballooned,
        resident: view.sample.resident,
        callable: view.facts.liability(),
        guest_available: view.available,
        guest_keeps: view.keeps,
        class: view.facts.policy.class,
        sample_age_ms: view
            .facts
            .sample
            .map(|sample| now_ms.saturating_sub(sample.at_ms)),
        stuck: view.memory.stuck,
        trusted: !view.memory.distrusted,
        interlock: view.facts.interlock,
        take_blocked_ms: view.memory.take_blocked_until_ms.saturating_sub(now_ms),
    }
}
