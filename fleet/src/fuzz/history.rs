//! Decodes arbitrary bytes as a host, its VMs and rounds of plans.

use crate::config::Config;
use crate::model::{
    Bytes, CgroupMemory, FeatureLevel, GuestClaims, HostFacts, InForce, Interlock, Inventory,
    Lessons, Pressure, PriorityClass, ReclaimFigures, VmFacts, VmId, VmPolicy, VmSample,
};
use crate::planner::{Action, ActionKind, Block, PlannerMemory, Present, VmMemory, plan};
use strum::VariantArray as _;

const ROUNDS_MAX: usize = 16;
const VMS_MAX: usize = 4;
const HOST: Bytes = Bytes::gib(32);
/// Times between two rounds, ms.
const PAUSES_MS: [u64; 4] = [1000, 5000, 60_000, 3_600_000];
/// The choice by which the agent restarts, and keeps only its lessons.
const RESTART: u8 = 0x7f;
/// Orders are late by up to 255 of these, ms.
const LATE_MS: u64 = 100;

/// Makes the plans; returns the number of their actions.
///
/// # Panics
/// A plan takes memory beyond what a VM's policy allows.
pub(super) fn plans(bytes: &[u8]) -> usize {
    let mut input = Numbers(bytes);
    let config = config(input.byte());
    let mut vms: Vec<Vm> = (0..=usize::from(input.byte()) % VMS_MAX)
        .map(|index| Vm::new(index, &mut input))
        .collect();
    let mut memory = PlannerMemory::default();
    let mut actions = 0;
    let mut now_ms = 0;
    for _ in 0..ROUNDS_MAX {
        if input.0.is_empty() {
            break;
        }
        let choice = input.byte();
        now_ms += PAUSES_MS[usize::from(choice % 4)];
        let mut lessons: Vec<Lessons> = vms.iter().map(|_| Lessons::default()).collect();
        if choice == RESTART {
            for (lessons, vm) in lessons.iter_mut().zip(&vms) {
                *lessons = memory
                    .vm(vm.id.as_str())
                    .map(VmMemory::lessons)
                    .unwrap_or_default();
            }
            memory = PlannerMemory::default();
        }
        let inventory = Inventory {
            now_ms,
            host: host(choice, now_ms, &mut input),
            vms: vms
                .iter_mut()
                .zip(lessons)
                .map(|(vm, lessons)| VmFacts {
                    lessons,
                    ..vm.facts(now_ms, &mut input)
                })
                .collect(),
            promised: input.rarely(),
            wanted: (0..choice >> 6).map(|_| input.part(HOST)).collect(),
        };
        let plan = plan(&inventory, &config, &memory);
        actions += plan.actions.len();
        for action in &plan.actions {
            let at = vms.iter().position(|vm| vm.id == action.vm);
            let at = at.expect("actions are about VMs of the inventory");
            check_order(action, &inventory, &vms[at], u64::from(choice) * LATE_MS);
            if let ActionKind::Balloon { from, to } = action.kind {
                check(&inventory, &inventory.vms[at], from, to);
                vms[at].target = to;
            }
        }
        assert_eq!(plan.headroom().ledger, plan.ledger);
        for explanation in &plan.explanations {
            assert!(!explanation.to_string().is_empty());
        }
        memory = plan.memory;
    }
    actions
}

/// An order that is carried out after `late_ms`, when nothing else has changed, is about the right machine.
fn check_order(action: &Action, inventory: &Inventory, vm: &Vm, late_ms: u64) {
    assert!(!action.to_string().is_empty());
    let present = Present {
        epoch: vm.epoch,
        now_ms: inventory.now_ms + late_ms,
        host_available: inventory.host.available,
        balloon_target: vm.target,
    };
    assert_ne!(action.check(&present), Err(Block::Replaced));
    let replaced = Present {
        epoch: vm.epoch + 1,
        ..present
    };
    assert_eq!(action.check(&replaced), Err(Block::Replaced));
}

/// A VM keeps its minimum, unless its size is impossible on this host.
fn check(inventory: &Inventory, vm: &VmFacts, from: Bytes, to: Bytes) {
    if to > from && vm.configured <= inventory.host.limit() {
        assert!(
            vm.configured - to >= vm.policy.min,
            "{vm:?}: {from} to {to}"
        );
    }
}

fn config(choice: u8) -> Config {
    let mut config = Config::default();
    let resort = &mut config.last_resort;
    for (bit, step) in [
        &mut resort.memory_high,
        &mut resort.swap,
        &mut resort.pause,
        &mut resort.kill,
    ]
    .into_iter()
    .enumerate()
    {
        *step = choice >> bit & 1 != 0;
    }
    config
}

fn host(choice: u8, now_ms: u64, input: &mut Numbers<'_>) -> HostFacts {
    let group = choice >> 2 & 0b111 == 0;
    HostFacts {
        // Sometimes the host cannot be read.
        at_ms: if choice >> 5 & 1 == 0 { now_ms } else { 0 },
        total: HOST,
        available: input.part(HOST),
        cgroup: group.then(|| CgroupMemory {
            limit: input.part(HOST),
            current: input.part(HOST),
            reclaimable: input.part(HOST),
        }),
        pressure: Pressure {
            some_avg10: f64::from(input.byte() / 4),
            some_total_us: u64::from(input.byte()) * now_ms,
            ..Pressure::default()
        },
        swap_total: Bytes::gib(1),
        swap_free: input.part(Bytes::gib(1)),
        ..HostFacts::default()
    }
}

/// The constant properties of a VM, and its balloon.
struct Vm {
    id: VmId,
    level: FeatureLevel,
    configured: Bytes,
    has_balloon: bool,
    policy: VmPolicy,
    epoch: u64,
    missed: u32,
    target: Bytes,
    counted: u64,
}

impl Vm {
    fn new(index: usize, input: &mut Numbers<'_>) -> Self {
        let choice = input.byte();
        let configured = input.part(Bytes::gib(16));
        let (min, max) = (input.part(configured), input.part(configured));
        let classes = PriorityClass::VARIANTS;
        Self {
            id: VmId::from(format!("vm{index}")),
            level: match choice % 8 {
                0 => FeatureLevel::L0,
                1 => FeatureLevel::L1,
                _ => FeatureLevel::L2,
            },
            configured,
            has_balloon: choice >> 3 & 0b111 != 0,
            policy: VmPolicy {
                min: min.min(max).min(configured),
                max: min.max(max).min(configured),
                shares: u32::from(input.byte()) * 20,
                class: classes[usize::from(input.byte()) % classes.len()],
                balloon: choice >> 6 != 0,
                reporting: choice >> 6 != 1,
                enforce: choice >> 6 == 2,
            },
            epoch: 1,
            missed: 0,
            target: Bytes::ZERO,
            counted: 0,
        }
    }

    fn facts(&mut self, now_ms: u64, input: &mut Numbers<'_>) -> VmFacts {
        let choice = input.byte();
        match choice % 16 {
            0 => self.missed += 1,
            1 => {
                self.epoch += 1;
                self.target = Bytes::ZERO;
                self.counted = 0;
            }
            _ => self.missed = 0,
        }
        let interlock = match choice >> 4 {
            0 => Some(Interlock::Migration),
            1 => Some(Interlock::Paused),
            2 => Some(Interlock::Pinned),
            _ => None,
        };
        VmFacts {
            id: self.id.clone(),
            epoch: self.epoch,
            level: self.level,
            configured: self.configured,
            has_balloon: self.has_balloon,
            policy: self.policy,
            interlock,
            in_force: InForce {
                high: choice == 0x32,
                swap: choice == 0x33,
                paused: interlock == Some(Interlock::Paused),
                max: (choice == 0x34).then(|| input.part(self.configured)),
            },
            lessons: Lessons::default(),
            sample: (choice != 0x35).then(|| self.sample(now_ms, input)),
            missed_samples: self.missed,
        }
    }

    fn sample(&mut self, now_ms: u64, input: &mut Numbers<'_>) -> VmSample {
        let choice = input.byte();
        let at_ms = now_ms.saturating_sub(60_000 * u64::from(self.missed));
        self.counted += u64::from(input.byte() / 16);
        let figure = |input: &mut Numbers<'_>| input.part(self.configured);
        // Mostly the guest follows.
        let follows = !choice.is_multiple_of(4);
        VmSample {
            at_ms,
            balloon_target: if follows { self.target } else { figure(input) },
            ballooned: if follows { self.target } else { figure(input) },
            resident: figure(input),
            swapped: input.rarely(),
            obtainable: input.rarely(),
            guest: (choice >> 2 & 0b111 != 0).then(|| GuestClaims {
                at_ms,
                free: figure(input),
                available: figure(input),
                alloc_stalls: Some(self.counted),
                major_faults: Some(self.counted * 100),
                swap_in: Some(Bytes::mib(self.counted)),
                oom_kills: Some(self.counted / 100),
            }),
            reclaim: (choice >> 5 != 0).then(|| ReclaimFigures {
                reporting_active: choice >> 5 != 1,
                inhibited: choice >> 5 == 2,
                policy_in_effect: choice >> 5 > 4,
                reported: figure(input),
                discarded: figure(input),
                repopulated: figure(input),
                skipped: input.rarely(),
                report_p99_us: u64::from(input.byte()) * 100,
            }),
        }
    }
}

/// Takes figures from the front of the bytes; zeros when they are exhausted.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn byte(&mut self) -> u8 {
        let (byte, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *byte
    }

    /// Mostly a part of the whole, or somewhat more; sometimes any number.
    fn part(&mut self, whole: Bytes) -> Bytes {
        match self.byte() {
            part @ 0..=239 => whole.scale(f64::from(part) / 220.0),
            _ => self.any(),
        }
    }

    /// Mostly zero.
    fn rarely(&mut self) -> Bytes {
        match self.byte() {
            0..=199 => Bytes::ZERO,
            _ => self.any(),
        }
    }

    /// A number of any order of magnitude.
    fn any(&mut self) -> Bytes {
        let shift = self.byte() % 64;
        Bytes((u64::from(self.byte()) << 8 | u64::from(self.byte())) << shift)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    use super::*;

    /// Without actions, the checks of `plans` would mean nothing.
    #[test]
    fn plans_of_random_bytes_keep_minimums() {
        let mut runner = TestRunner::deterministic();
        let mut actions = 0;
        for _ in 0..500 {
            let bytes = prop::collection::vec(any::<u8>(), 0..400);
            actions += plans(&bytes.new_tree(&mut runner).expect("bytes").current());
        }
        assert!(actions > 100, "{actions}");
    }
}
