//! The planner: a pure function from facts, configuration and memory to a plan, without a clock.
//!
//! A plan leaves no choice to the executor: it contains absolute targets, each with its preconditions. Executing a plan
//! twice has the same effect as executing it once. The planner's state between two plans is part of the plan
//! ([`Plan::memory`]), so that simulator, tests and agent use it in the same way.
//!
//! ```text
//! facts ─► observe ─► ledger ─► state ─► urgent gives ─► takes ─► other gives ─► last resorts ─► actions
//!          (what the             (how     (suffering)     (two phases: gives come only out of memory
//!           samples               tight)                   that is free now)
//!           tell)
//! ```

mod burst;
mod give;
mod last_resort;
mod memory;
mod observe;
mod plan;
mod reporting;
mod state;
mod take;
mod view;
mod write;

pub use memory::{PlannerMemory, PressureMemory, Reporting, Squeezed, VmMemory};
pub use plan::{
    Action, ActionKind, Block, Decision, Explanation, HostExplanation, Phase, Plan, Precondition,
    Present, Reason,
};

use std::borrow::Cow;
use std::collections::BTreeSet;

use crate::config::{Config, ControlConfig, SafetyRule};
use crate::model::{Bytes, HostState, Inventory, Ledger, VmFacts, VmId};
use give::Budget;
use take::Demand;
use view::View;

/// Makes the next plan.
///
/// The order of the VMs in the inventory has no influence. The state of a VM that is not in it is dropped.
pub fn plan(inventory: &Inventory, config: &Config, memory: &PlannerMemory) -> Plan {
    advance(inventory, config, memory.clone())
}

/// Like [`plan`], for a caller that does not need the old memory any more.
pub fn advance(inventory: &Inventory, config: &Config, mut memory: PlannerMemory) -> Plan {
    let (inventory, impossible) = &believable(inventory, config);
    let mut views = views(inventory, impossible, config, &mut memory);
    burst::record(&mut memory, &mut views, inventory.now_ms, &config.control);
    let ledger = ledger(inventory, config, &memory, &views);
    let before = memory.state;
    let pressed = state::pressed_by(&mut memory.pressure, inventory, &views, config);
    enter(
        &mut memory,
        state::next(before, pressed, &ledger, config),
        inventory.now_ms,
    );

    let mut host = HostExplanation {
        state_before: before,
        state: memory.state,
        free: inventory.host.free_fraction(ledger.reserved),
        burst_coverage: ledger.burst_coverage(),
        pressure_elsewhere: memory.pressure.is_foreign(inventory.now_ms),
        ..HostExplanation::default()
    };
    let mut budget = Budget::new(&ledger, &config.control);
    let others = decide(
        &mut views,
        &mut budget,
        &ledger,
        &mut host,
        &mut memory,
        inventory,
        config,
    );
    host.granted = budget.granted;
    host.owed = budget.owed;
    host.last_resort = memory.last_resort;
    write::plan(views, others, host, ledger, memory, inventory, config)
}

fn decide(
    views: &mut [View<'_>],
    budget: &mut Budget,
    ledger: &Ledger,
    host: &mut HostExplanation,
    memory: &mut PlannerMemory,
    inventory: &Inventory,
    config: &Config,
) -> Vec<(usize, ActionKind, Reason)> {
    let (now_ms, control) = (inventory.now_ms, &config.control);
    for view in views.iter_mut() {
        take::hold_to_maximum(view, now_ms, control);
        take::pin_stuck(view);
    }
    give::give_urgent(views, budget, now_ms, config);

    let giving = host.state.max(HostState::Yellow);
    let mut firm = Bytes::ZERO;
    for view in views.iter() {
        let freeable = view.freeable(giving, now_ms, control);
        host.freeable += freeable.gain;
        host.freeable_soon += freeable.soon;
        firm += freeable.firm;
    }
    host.pending = views.iter().map(|view| view.pending_gain(control)).sum();
    host.wanted = wanted(ledger, host, firm, inventory, config);
    let demand = demand(ledger, budget, host, now_ms, config);
    let near = if control.safety.has(SafetyRule::DeadBand) {
        control.dead_band
    } else {
        Bytes(1)
    };
    if demand.shortage >= near || demand.firm >= near {
        host.taken = take::take(views, &demand, control);
    }
    // Memory that a refused VM waits for is not given to guests without need.
    let relax_since_ms = (host.state == HostState::Green && host.wanted == Bytes::ZERO)
        .then_some(memory.state_since_ms);
    give::give_rest(views, budget, host.state, relax_since_ms, now_ms, config);
    explain_untouched(views, now_ms, config);

    let missing = host.shortage - host.taken;
    let helpless =
        missing >= control.dead_band || host.state == HostState::Red && host.taken == Bytes::ZERO;
    last_resort::last_resort(views, memory, helpless, inventory, config)
}

/// The memory to take: the shortage below the goal, minus pending memory, plus memory owed to suffering guests.
fn demand(
    ledger: &Ledger,
    budget: &Budget,
    host: &mut HostExplanation,
    now_ms: u64,
    config: &Config,
) -> Demand {
    let control = &config.control;
    if host.state > HostState::Green {
        host.goal = ledger.usable.part(config.thresholds.yellow.leave);
    }
    let granted = if control.safety.has(SafetyRule::GrantedCounts) {
        ledger.granted + budget.granted
    } else {
        Bytes::ZERO
    };
    let there = ledger.available + host.pending;
    host.shortage = (host.goal + budget.owed + granted) - there;
    let for_newcomers = match host.wanted {
        Bytes::ZERO => Bytes::ZERO,
        wanted => (unavailable(ledger, config) + budget.owed + wanted) - there,
    };
    // The rest is rounded up to a step, because without it no VM can be admitted.
    let for_newcomers = match for_newcomers {
        Bytes::ZERO => Bytes::ZERO,
        missing => missing.max(control.dead_band),
    };
    Demand {
        now_ms,
        state: host.state,
        shortage: host.shortage.max(for_newcomers),
        reason: if host.shortage >= for_newcomers {
            Reason::Shortage
        } else {
            Reason::Newcomer
        },
        firm: firm(ledger, control),
    }
}

/// The part of the available memory that admission cannot reserve.
fn unavailable(ledger: &Ledger, config: &Config) -> Bytes {
    ledger.burst + ledger.promised + ledger.granted + config.newcomers_leave(ledger.usable)
}

/// The needs of refused VMs, smallest first, as far as guests can return the memory. Guests are not asked for memory
/// that would not suffice to admit a VM. `firm` is memory that balloons take in the process although it is not
/// resident: it stops being callable, and thus reduces a burst that is limited by the callable memory.
fn wanted(
    ledger: &Ledger,
    host: &HostExplanation,
    firm: Bytes,
    inventory: &Inventory,
    config: &Config,
) -> Bytes {
    let callable = ledger.callable_liability - firm;
    let then = Ledger {
        burst: ledger.burst.min(callable),
        ..*ledger
    };
    let most = (ledger.available + host.pending + host.freeable) - unavailable(&then, config);
    let mut needs = inventory.wanted.clone();
    needs.sort_unstable();
    let sums = needs.iter().scan(Bytes::ZERO, |sum, &need| {
        *sum += need;
        Some(*sum)
    });
    sums.take_while(|&sum| sum <= most)
        .last()
        .unwrap_or_default()
}

/// Callable memory that must become firm, so that the burst does not exceed the available memory.
fn firm(ledger: &Ledger, control: &ControlConfig) -> Bytes {
    let covered = ledger.available.scale(1.0 / state::BURST_LEAVE);
    if control.safety.has(SafetyRule::Burst) && ledger.burst > covered {
        ledger.callable_liability - covered
    } else {
        Bytes::ZERO
    }
}

/// The inventory with bounded claims, and the VMs that claimed impossible values. No host runs VMs of more than
/// `overcommit_max` times its memory. If a VM claims to be larger, its observed memory is used instead, so that the
/// ledger stays correct.
fn believable<'a>(
    inventory: &'a Inventory,
    config: &Config,
) -> (Cow<'a, Inventory>, BTreeSet<VmId>) {
    let possible = inventory
        .host
        .limit()
        .scale(config.admission.overcommit_max.max(1.0));
    let mut bounded = Cow::Borrowed(inventory);
    let mut impossible = BTreeSet::new();
    for (index, vm) in inventory.vms.iter().enumerate() {
        let sample = vm.sample.unwrap_or_default();
        // Without facts about the host, no size is known to be too large.
        if possible == Bytes::ZERO {
            continue;
        }
        // Nor can it take more than there is.
        let obtainable = sample.obtainable.min(possible - vm.configured);
        if obtainable < sample.obtainable
            && let Some(sample) = &mut bounded.to_mut().vms[index].sample
        {
            sample.obtainable = obtainable;
        }
        if vm.configured <= possible {
            continue;
        }
        impossible.insert(vm.id.clone());
        let vm = &mut bounded.to_mut().vms[index];
        vm.configured = sample.resident.min(possible);
        vm.policy.max = vm.policy.max.min(vm.configured);
        vm.policy.min = vm.policy.min.min(vm.configured);
        if let Some(sample) = &mut vm.sample {
            sample.resident = sample.resident.min(possible);
            sample.ballooned = Bytes::ZERO;
            sample.swapped = Bytes::ZERO;
        }
    }
    (bounded, impossible)
}

/// Joins facts and memory, both by name, and processes new samples.
fn views<'a>(
    inventory: &'a Inventory,
    impossible: &BTreeSet<VmId>,
    config: &Config,
    memory: &mut PlannerMemory,
) -> Vec<View<'a>> {
    let mut facts: Vec<&VmFacts> = inventory.vms.iter().collect();
    facts.sort_by(|a, b| a.id.cmp(&b.id));
    facts.dedup_by(|a, b| a.id == b.id);
    let mut known = std::mem::take(&mut memory.vms).into_iter().peekable();
    facts
        .into_iter()
        .map(|facts| {
            while known.next_if(|(id, _)| *id < facts.id).is_some() {}
            let mut vm = known
                .next_if(|(id, _)| *id == facts.id)
                .map(|(_, vm)| vm)
                .unwrap_or_default();
            observe::observe(facts, &mut vm, inventory.now_ms, &config.control);
            vm.distrusted |= impossible.contains(&facts.id);
            View::new(facts, vm, inventory.now_ms, config)
        })
        .collect()
}

fn ledger(
    inventory: &Inventory,
    config: &Config,
    memory: &PlannerMemory,
    views: &[View<'_>],
) -> Ledger {
    let reserve = config.reserve(inventory.host.limit());
    let granted = views.iter().map(|view| view.memory.granted).sum();
    let mut ledger = Ledger::of(inventory, reserve, Bytes::ZERO, granted);
    for view in views.iter().filter(|view| view.memory.distrusted) {
        ledger.callable_liability += unbelieved(view.facts);
    }
    ledger.with_burst(burst::expected(
        memory,
        ledger.callable_liability,
        &config.control,
    ))
}

/// The current ledger between two plans, with the last plan's bursts, grants and distrusted guests.
pub fn current_ledger(
    inventory: &Inventory,
    config: &Config,
    last: &Plan,
    memory: &PlannerMemory,
) -> Ledger {
    let (inventory, impossible) = &believable(inventory, config);
    let reserve = config.reserve(inventory.host.limit());
    let mut ledger = Ledger::of(inventory, reserve, Bytes::ZERO, last.ledger.granted);
    for vm in &inventory.vms {
        let remembered = memory.vm(vm.id.as_str());
        if impossible.contains(&vm.id) || remembered.is_some_and(|vm| vm.distrusted) {
            ledger.callable_liability += unbelieved(vm);
        }
    }
    ledger.with_burst(last.ledger.burst)
}

/// Memory that a lying VM may take beyond its claims: all memory that is not resident, because its balloon may be
/// empty.
fn unbelieved(vm: &VmFacts) -> Bytes {
    let resident = vm.sample.unwrap_or_default().resident;
    (vm.configured - resident) - vm.callable()
}

fn enter(memory: &mut PlannerMemory, state: HostState, now_ms: u64) {
    if memory.state != state {
        memory.state = state;
        memory.state_since_ms = now_ms;
    }
}

fn explain_untouched(views: &mut [View<'_>], now_ms: u64, config: &Config) {
    for view in views {
        if view.to != view.target || view.reason != Reason::NoNeed {
            continue;
        }
        let blocked = view
            .off_limits()
            .or_else(|| view.stale(now_ms, &config.control).then_some(Reason::Stale));
        view.reason = match blocked {
            Some(reason) => reason,
            None if view.is_inhibited() => Reason::Inhibited,
            None if view.memory.stuck => Reason::Stuck,
            None if view.memory.distrusted => Reason::Lying,
            None => Reason::NoNeed,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(freeable_gib: u64) -> (Ledger, HostExplanation) {
        let ledger = Ledger {
            usable: Bytes::gib(100),
            available: Bytes::gib(30),
            burst: Bytes::gib(15),
            callable_liability: Bytes::gib(20),
            promised: Bytes::gib(2),
            ..Ledger::default()
        };
        let host = HostExplanation {
            freeable: Bytes::gib(freeable_gib),
            ..HostExplanation::default()
        };
        (ledger, host)
    }

    fn wanted_of(needs_gib: &[u64], freeable_gib: u64) -> Bytes {
        wanted_with(needs_gib, freeable_gib, 0)
    }

    fn wanted_with(needs_gib: &[u64], freeable_gib: u64, firm_gib: u64) -> Bytes {
        let (ledger, host) = host(freeable_gib);
        let inventory = Inventory {
            wanted: needs_gib.iter().copied().map(Bytes::gib).collect(),
            ..Inventory::default()
        };
        let firm = Bytes::gib(firm_gib);
        wanted(&ledger, &host, firm, &inventory, &Config::default())
    }

    #[test]
    fn guests_are_asked_for_as_many_newcomers_as_they_can_give_for() {
        // 30 are available, of which 15 are for the burst, 2 are reserved and 10 are kept for existing guests.
        assert_eq!(wanted_of(&[], 50), Bytes::ZERO);
        assert_eq!(wanted_of(&[8, 4, 4], 5), Bytes::gib(8));
        assert_eq!(wanted_of(&[8, 4, 4], 13), Bytes::gib(16));
        assert_eq!(wanted_of(&[8], 4), Bytes::ZERO, "it would not fit");
    }

    #[test]
    fn what_a_balloon_takes_on_the_way_can_no_longer_be_called_in() {
        // 20 are callable, and 15 of them at once: the first 5 that become firm change nothing.
        assert_eq!(wanted_with(&[8], 4, 5), Bytes::ZERO);
        assert_eq!(wanted_with(&[8], 4, 6), Bytes::gib(8));
    }

    #[test]
    fn newcomers_are_no_shortage_of_the_host() {
        let (ledger, mut host) = host(10);
        host.wanted = Bytes::gib(4);
        let config = Config::default();
        let budget = Budget::new(&ledger, &config.control);
        let demand = demand(&ledger, &budget, &mut host, 0, &config);
        assert_eq!(host.shortage, Bytes::ZERO);
        assert_eq!(demand.shortage, Bytes::gib(1));
        assert_eq!(demand.reason, Reason::Newcomer);
    }
}
