//! Tests safety rules with short histories: the planner does harm only without the rule.
//!
//! Rules that need reacting guests are tested by scenarios (`fleet/scenarios`, the key `shows`).

mod histories;

use fleet::config::{Config, SafetyRule};
use fleet::model::*;
use fleet::planner::{ActionKind, Plan, PlannerMemory, plan};
use histories::{inventory, sample, vm};

fn without(rule: Option<SafetyRule>) -> Config {
    let mut config = Config::default();
    if let Some(rule) = rule {
        config.control.safety.switch_off(rule);
    }
    config
}

/// A guest with 3 of its 4 GiB in its balloon; it suffers if too little is left.
fn squeezed(name: &str, at_ms: u64, available: Bytes) -> VmFacts {
    let sample = sample(at_ms, Bytes::gib(3), Bytes::gib(1), available);
    vm(name, Bytes::gib(4), PriorityClass::Normal, sample)
}

const WELL: Bytes = Bytes::mib(200);
const SUFFERING: Bytes = Bytes::mib(10);
const FREE: Bytes = Bytes::gib(2);

#[test]
fn two_phases_keep_grants_to_what_is_free() {
    let granted = |rule| {
        let config = without(rule);
        let round = |now_ms, memory: &PlannerMemory| {
            let vms = ["a", "b"].map(|name| squeezed(name, now_ms, SUFFERING));
            plan(&inventory(now_ms, FREE, vms.to_vec()), &config, memory)
        };
        let first = round(5000, &PlannerMemory::default());
        round(10_000, &first.memory).host.granted
    };
    assert!(granted(None) > Bytes::ZERO);
    assert!(granted(None) <= FREE);
    assert!(granted(Some(SafetyRule::TwoPhase)) > FREE);
}

#[test]
fn what_was_given_and_not_used_is_not_given_again() {
    let granted = |rule| {
        let config = without(rule);
        let round = |now_ms, a: VmFacts, b: VmFacts, memory: &PlannerMemory| -> Plan {
            plan(&inventory(now_ms, FREE, vec![a, b]), &config, memory)
        };
        let first = round(
            5000,
            squeezed("a", 5000, SUFFERING),
            squeezed("b", 5000, WELL),
            &PlannerMemory::default(),
        );
        let second = round(
            10_000,
            squeezed("a", 10_000, SUFFERING),
            squeezed("b", 10_000, WELL),
            &first.memory,
        );
        // The first has not touched the memory that it was given, so the host has as much as before.
        let third = round(
            12_000,
            squeezed("a", 10_000, SUFFERING),
            squeezed("b", 12_000, SUFFERING),
            &second.memory,
        );
        assert!(second.host.granted > Bytes::ZERO);
        second.host.granted + third.host.granted
    };
    assert!(granted(None) <= FREE);
    assert!(granted(Some(SafetyRule::GrantedCounts)) > FREE);
}

#[test]
fn stuck_balloon_is_not_waited_for_for_ever() {
    let asked = |rule| {
        let mut config = without(rule);
        config.control.step = Bytes::gib(8);
        config.control.step_part = Fraction(0.5);
        let mut memory = PlannerMemory::default();
        let mut asked_b = Bytes::ZERO;
        let mut target_a = Bytes::ZERO;
        for round in 1..=12 {
            let now_ms = round * 5000;
            let mut stuck = sample(now_ms, Bytes::ZERO, Bytes::gib(16), Bytes::gib(12));
            stuck.balloon_target = target_a;
            let willing = sample(now_ms, Bytes::ZERO, Bytes::gib(16), Bytes::gib(12));
            let vms = vec![
                vm("a", Bytes::gib(16), PriorityClass::Low, stuck),
                vm("b", Bytes::gib(16), PriorityClass::High, willing),
            ];
            let plan = plan(&inventory(now_ms, Bytes::mib(2500), vms), &config, &memory);
            for action in &plan.actions {
                match action.kind {
                    ActionKind::Balloon { to, .. } if action.vm.as_str() == "a" => target_a = to,
                    ActionKind::Balloon { to, .. } => asked_b = asked_b.max(to),
                    _ => {}
                }
            }
            memory = plan.memory;
        }
        asked_b
    };
    assert!(asked(None) > Bytes::ZERO);
    assert_eq!(asked(Some(SafetyRule::Stuck)), Bytes::ZERO);
}
