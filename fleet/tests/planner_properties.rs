//! Property tests: invariants of every plan for arbitrary hosts and guests.
//!
//! Hosts and guests are adversarial: figures are inconsistent, samples go missing, and guests change their behaviour
//! from one sample to the next. Each plan starts from the memory of the previous plans.

use fleet::config::Config;
use fleet::model::*;
use fleet::planner::{
    Action, ActionKind, Block, Phase, Plan, PlannerMemory, Present, Reason, plan,
};
use proptest::prelude::*;
use strum::VariantArray as _;

const SAMPLE_MS: u64 = 5000;

fn claims() -> impl Strategy<Value = Option<(f64, f64, u64)>> {
    prop::option::weighted(0.8, (0.0..1.2f64, 0.0..1.0f64, 0u64..3))
}

prop_compose! {
    fn policy()(
        min in 0.0..1.0f64,
        max in 0.5..1.0f64,
        shares in prop::sample::select(vec![0u32, 1, 1000, 1000, 5000]),
        class in prop::sample::select(PriorityClass::VARIANTS.to_vec()),
    ) -> (f64, f64, u32, PriorityClass) { (min.min(max), max, shares, class) }
}

/// Fractions of a VM's size, converted to bytes by [`vm`].
type Parts = (f64, f64, f64);

fn vm(
    index: usize,
    step: u64,
    configured: Bytes,
    (min, max, shares, class): (f64, f64, u32, PriorityClass),
    (target, ballooned, resident): Parts,
    claims: Option<(f64, f64, u64)>,
    missed: bool,
) -> VmFacts {
    let now_ms = (step + 1) * SAMPLE_MS;
    let at_ms = if missed {
        now_ms.saturating_sub(60_000)
    } else {
        now_ms
    };
    VmFacts {
        id: VmId::from(format!("vm{index:03}")),
        epoch: 1,
        level: FeatureLevel::L2,
        configured,
        has_balloon: true,
        policy: VmPolicy {
            min: configured.scale(min),
            max: configured.scale(max),
            shares,
            class,
            ..VmPolicy::halves(configured)
        },
        interlock: None,
        in_force: InForce::default(),
        lessons: Lessons::default(),
        sample: Some(VmSample {
            at_ms,
            balloon_target: configured.scale(target),
            ballooned: configured.scale(ballooned),
            resident: configured.scale(resident),
            swapped: Bytes::ZERO,
            obtainable: Bytes::ZERO,
            guest: claims.map(|(available, free, stalls)| GuestClaims {
                at_ms,
                available: configured.scale(available),
                free: configured.scale(available * free),
                alloc_stalls: Some(stalls * step),
                ..GuestClaims::default()
            }),
            reclaim: Some(ReclaimFigures {
                reporting_active: true,
                inhibited: false,
                ..ReclaimFigures::default()
            }),
        }),
        missed_samples: if missed { 5 } else { 0 },
    }
}

prop_compose! {
    fn inventory(step: u64, policies: Vec<(u64, (f64, f64, u32, PriorityClass))>)(
        free in 0.0..0.6f64,
        some_avg10 in prop::sample::select(vec![0.0, 0.0, 0.0, 2.0, 10.0, 40.0]),
        parts in prop::collection::vec(((0.0..1.0f64, 0.0..1.0f64, 0.0..1.1f64), claims(), prop::bool::weighted(0.1)), policies.len()),
        wanted in prop::collection::vec(0u64..16_384, 0..3),
    ) -> Inventory {
        let total = Bytes::gib(64);
        Inventory {
            now_ms: (step + 1) * SAMPLE_MS,
            host: HostFacts {
                at_ms: (step + 1) * SAMPLE_MS,
                total,
                available: total.scale(free),
                pressure: Pressure { some_avg10, ..Pressure::default() },
                ..HostFacts::default()
            },
            vms: policies.iter().zip(&parts).enumerate()
                .map(|(index, ((mib, policy), (parts, claims, missed)))| {
                    vm(index, step, Bytes::mib(*mib), *policy, *parts, *claims, *missed)
                })
                .collect(),
            promised: Bytes::ZERO,
            wanted: wanted.into_iter().map(Bytes::mib).collect(),
        }
    }
}

/// Some rounds of samples of the same VMs.
fn history() -> impl Strategy<Value = Vec<Inventory>> {
    prop::collection::vec((512u64..16_384, policy()), 0..12).prop_flat_map(|policies| {
        (0..4u64)
            .map(|step| inventory(step, policies.clone()))
            .collect::<Vec<_>>()
    })
}

fn config() -> Config {
    Config::default()
}

/// Makes all plans except the last; returns the last inventory and the memory for it.
fn remembered(mut history: Vec<Inventory>) -> (Inventory, PlannerMemory) {
    let last = history.pop().expect("a history has inventories");
    let memory = history
        .iter()
        .fold(PlannerMemory::default(), |memory, inventory| {
            plan(inventory, &config(), &memory).memory
        });
    (last, memory)
}

fn balloons(plan: &Plan) -> impl Iterator<Item = (&Action, Bytes, Bytes)> {
    plan.actions.iter().filter_map(|action| match action.kind {
        ActionKind::Balloon { from, to } => Some((action, from, to)),
        _ => None,
    })
}

fn facts<'a>(inventory: &'a Inventory, id: &VmId) -> &'a VmFacts {
    inventory
        .vms
        .iter()
        .find(|vm| vm.id == *id)
        .expect("actions are about VMs of the inventory")
}

/// One sample of a VM and its host: available and swapped-in memory as fractions, whether it responds, and the host's
/// free memory.
fn moment() -> impl Strategy<Value = (f64, f64, bool, f64)> {
    let answers = prop::bool::weighted(0.7);
    (0.0..0.6f64, 0.0..0.01f64, answers, 0.0..0.6f64)
}

/// Times of changes of direction of a balloon that follows its target, ms.
fn turns(moments: &[(f64, f64, bool, f64)], hours: u64) -> Vec<u64> {
    let configured = Bytes::gib(8);
    let (mut memory, mut target) = (PlannerMemory::default(), Bytes::ZERO);
    let (mut grew, mut turns) = (None, Vec::new());
    let mut swapped_in = Bytes::ZERO;
    let mut last = None;
    for (now_ms, (available, swap_in, answers, free)) in (SAMPLE_MS..hours * 3_600_000)
        .step_by(SAMPLE_MS as usize)
        .zip(moments.iter().cycle())
    {
        let mut facts = vm(
            0,
            now_ms / SAMPLE_MS - 1,
            configured,
            (0.2, 1.0, 1000, PriorityClass::Normal),
            (target.ratio(configured), target.ratio(configured), 0.3),
            Some((*available, 0.5, 0)),
            false,
        );
        swapped_in += configured.scale(*swap_in);
        if let Some(claims) = facts
            .sample
            .as_mut()
            .and_then(|sample| sample.guest.as_mut())
        {
            claims.swap_in = Some(swapped_in);
        }
        if *answers {
            last = facts.sample;
        } else {
            facts.missed_samples = 3;
            facts.sample = last;
        }
        let inventory = Inventory {
            now_ms,
            host: HostFacts {
                at_ms: now_ms,
                total: Bytes::gib(16),
                available: Bytes::gib(16).scale(*free),
                ..HostFacts::default()
            },
            vms: vec![facts],
            promised: Bytes::ZERO,
            wanted: Vec::new(),
        };
        let plan = plan(&inventory, &config(), &memory);
        for (_, from, to) in balloons(&plan) {
            if grew.is_some_and(|grew| grew != (to > from)) {
                turns.push(now_ms);
            }
            grew = Some(to > from);
            target = to;
        }
        memory = plan.memory;
    }
    turns
}

fn granted(inventory: &Inventory, plan: &Plan) -> Bytes {
    balloons(plan)
        .map(|(action, from, to)| {
            let sample = facts(inventory, &action.vm).sample.unwrap_or_default();
            sample.ballooned.min(from) - to
        })
        .sum()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn no_balloon_turns_more_than_twelve_times_an_hour(moments in prop::collection::vec(moment(), 1..40)) {
        let turns = turns(&moments, 3);
        for window in turns.windows(13) {
            prop_assert!(window[12] - window[0] > 3_600_000, "{turns:?}");
        }
    }

    #[test]
    fn nobody_is_taken_below_its_minimum_or_given_above_its_maximum(history in history()) {
        let (inventory, memory) = remembered(history);
        let plan = plan(&inventory, &config(), &memory);
        for (action, from, to) in balloons(&plan) {
            let vm = facts(&inventory, &action.vm);
            if to > from {
                prop_assert!(vm.configured - to >= vm.policy.min, "{:?}", action);
            } else {
                prop_assert!(vm.configured - to <= vm.policy.max, "{:?}", action);
            }
        }
    }

    #[test]
    fn no_more_is_granted_than_is_free(history in history()) {
        let (inventory, memory) = remembered(history);
        let plan = plan(&inventory, &config(), &memory);
        let free = plan.ledger.available - plan.ledger.granted - plan.ledger.promised;
        prop_assert!(granted(&inventory, &plan) <= free);
        prop_assert_eq!(granted(&inventory, &plan), plan.host.granted);
    }

    #[test]
    fn nothing_moves_in_the_dead_band(history in history()) {
        let (inventory, memory) = remembered(history);
        let plan = plan(&inventory, &config(), &memory);
        let control = config().control;
        for (action, from, to) in balloons(&plan) {
            // Guarantees and emergencies have no dead band, and a stuck balloon's target is exact.
            let exempt = matches!(
                action.reason,
                Reason::BelowMinimum | Reason::Suffering | Reason::StallSuspected | Reason::Stuck | Reason::AboveMaximum
            );
            let configured = facts(&inventory, &action.vm).configured;
            let band = control.dead_band.max(configured.part(control.dead_band_part));
            prop_assert!(exempt || from.distance(to) >= band, "{:?}", action);
        }
    }

    #[test]
    fn frees_stand_before_grants(history in history()) {
        let (inventory, memory) = remembered(history);
        let plan = plan(&inventory, &config(), &memory);
        prop_assert!(plan.actions.is_sorted_by_key(|action| action.phase));
        for (action, from, to) in balloons(&plan) {
            prop_assert!(to < from || action.phase == Phase::Free);
        }
    }

    #[test]
    fn less_memory_takes_no_less_and_gives_no_more(history in history(), less in 0.0..1.0f64) {
        let (mut inventory, memory) = remembered(history);
        // Nothing is taken for a newcomer that no longer fits.
        inventory.wanted.clear();
        let roomy = plan(&inventory, &config(), &memory);
        inventory.host.available = inventory.host.available.scale(less);
        let tight = plan(&inventory, &config(), &memory);
        prop_assert!(tight.host.state >= roomy.host.state);
        prop_assert!(tight.host.shortage >= roomy.host.shortage);
        prop_assert!(tight.host.granted <= roomy.host.granted);
        // Parts are rounded up to dead bands, at most 1 % of 16 GiB, once per class.
        let band = Bytes::mib(5 * 164);
        prop_assert!(tight.host.taken + band >= roomy.host.taken, "{:?} {:?}", tight.host, roomy.host);
    }

    #[test]
    fn order_of_vms_does_not_matter(history in history(), seed in any::<u64>()) {
        let (inventory, memory) = remembered(history);
        let mut shuffled = inventory.clone();
        shuffled.vms.sort_by_key(|vm| {
            vm.id.as_str().bytes().fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
        });
        prop_assert_eq!(plan(&inventory, &config(), &memory), plan(&shuffled, &config(), &memory));
    }

    #[test]
    fn action_carried_out_is_not_carried_out_again(history in history()) {
        let (inventory, memory) = remembered(history);
        let plan = plan(&inventory, &config(), &memory);
        for (action, from, to) in balloons(&plan) {
            let mut present = Present {
                epoch: 1,
                now_ms: inventory.now_ms,
                host_available: inventory.host.available,
                balloon_target: from,
            };
            // A VMM treats targets that differ by less than 1 MiB as equal.
            if from.distance(to) >= Bytes::mib(1) {
                prop_assert_eq!(action.check(&present), Ok(()));
            }
            present.balloon_target = to;
            prop_assert_eq!(action.check(&present), Err(Block::Done));
        }
    }

    #[test]
    fn second_look_at_the_same_samples_takes_only_what_is_still_missing(history in history()) {
        let (mut inventory, memory) = remembered(history);
        inventory.wanted.clear();
        let first = plan(&inventory, &config(), &memory);
        inventory.now_ms += 1;
        let second = plan(&inventory, &config(), &first.memory);
        // Each of twelve balloons may differ from its target by a dead band, 1 % of 16 GiB.
        let blur = Bytes::mib(12 * 164);
        prop_assert!(
            first.host.taken + second.host.taken <= first.host.shortage + blur,
            "{:?} {:?}", first.host, second.host
        );
    }

    #[test]
    fn guests_give_newcomers_no_more_than_they_need_and_nothing_in_vain(history in history()) {
        let (mut inventory, memory) = remembered(history);
        let asked = plan(&inventory, &config(), &memory);
        let most = inventory.wanted.iter().copied().sum::<Bytes>();
        prop_assert!(asked.host.wanted <= most);
        inventory.wanted.clear();
        let quiet = plan(&inventory, &config(), &memory);
        if asked.host.wanted == Bytes::ZERO {
            prop_assert_eq!(&asked, &quiet);
        }
        // Free memory that cannot be reserved is added to their needs; parts are rounded up to dead bands.
        let ledger = &asked.ledger;
        let kept = ledger.burst + ledger.promised + ledger.granted + config().newcomers_leave(ledger.usable);
        let need = (kept + asked.host.owed + asked.host.wanted).max(quiet.host.taken);
        let band = Bytes::mib(5 * 164);
        prop_assert!(asked.host.taken <= need + band, "{:?} {:?}", asked.host, quiet.host);
    }

    #[test]
    fn every_vm_is_explained(history in history()) {
        let (inventory, memory) = remembered(history);
        let plan = plan(&inventory, &config(), &memory);
        prop_assert_eq!(plan.explanations.len(), inventory.vms.len());
        for explanation in &plan.explanations {
            let moved = balloons(&plan).find(|(action, ..)| action.vm == explanation.vm);
            prop_assert_eq!(moved.is_some(), explanation.target_before != explanation.target_after);
            prop_assert!(!explanation.to_string().is_empty());
        }
    }

    #[test]
    fn loop_with_honest_guests_comes_to_rest(
        sizes in prop::collection::vec((1024u64..8192, 0.1..0.9f64, 0.0..0.5f64), 1..12),
        total_part in 0.4..1.2f64,
    ) {
        let quiet = plans_until_quiet(&sizes, total_part);
        prop_assert!(quiet.is_some(), "still moving");
    }
}

/// Simulates guests that use a constant fraction of their memory, keep a constant fraction as cache, and follow
/// requests at once. Returns the number of plans until ten consecutive plans do nothing.
fn plans_until_quiet(sizes: &[(u64, f64, f64)], total_part: f64) -> Option<u64> {
    let configured: Vec<Bytes> = sizes.iter().map(|(mib, ..)| Bytes::mib(*mib)).collect();
    let total = configured.iter().copied().sum::<Bytes>().scale(total_part);
    let mut balloon = vec![Bytes::ZERO; sizes.len()];
    let mut memory = PlannerMemory::default();
    let mut idle = 0;
    for round in 1..600 {
        let now_ms = round * SAMPLE_MS;
        let mut vms = Vec::new();
        let mut resident_sum = Bytes::ZERO;
        for (index, (_, used, cache)) in sizes.iter().enumerate() {
            let size = configured[index];
            let used = size.scale(used * 0.8);
            let cache = size.scale(*cache).min(size - balloon[index] - used);
            let available = size - balloon[index] - used;
            let resident = used + cache;
            resident_sum += resident;
            let mut vm = vm(
                index,
                round,
                size,
                (0.3, 1.0, 1000, PriorityClass::Normal),
                (0.0, 0.0, 0.0),
                None,
                false,
            );
            vm.sample = Some(VmSample {
                at_ms: now_ms,
                balloon_target: balloon[index],
                ballooned: balloon[index],
                resident,
                guest: Some(GuestClaims {
                    at_ms: now_ms,
                    available,
                    free: available - cache,
                    ..GuestClaims::default()
                }),
                ..VmSample::default()
            });
            vms.push(vm);
        }
        let inventory = Inventory {
            now_ms,
            host: HostFacts {
                at_ms: now_ms,
                total,
                available: total - resident_sum,
                ..HostFacts::default()
            },
            vms,
            promised: Bytes::ZERO,
            wanted: Vec::new(),
        };
        let plan = plan(&inventory, &config(), &memory);
        idle = if balloons(&plan).next().is_none() {
            idle + 1
        } else {
            0
        };
        if idle == 10 {
            return Some(round);
        }
        for (action, _, to) in balloons(&plan) {
            let index = inventory
                .vms
                .iter()
                .position(|vm| vm.id == action.vm)
                .expect("known");
            balloon[index] = to;
        }
        memory = plan.memory;
    }
    None
}
