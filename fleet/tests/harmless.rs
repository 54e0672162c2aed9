//! Regression tests: histories with which an earlier planner did harm.
//!
//! Cases that need reacting guests are in the simulator's tests (`fleet/src/sim/tests.rs`).

mod histories;

use fleet::admission::{Request, admit};
use fleet::config::Config;
use fleet::model::*;
use fleet::planner::{ActionKind, Plan, PlannerMemory, Reason, plan};
use histories::{HOST, inventory};

const SAMPLE_MS: u64 = 5000;
const PLAN_MS: u64 = 2000;

fn vm(name: &str, class: PriorityClass, sample: VmSample) -> VmFacts {
    let mut vm = histories::vm(name, Bytes::gib(8), class, sample);
    vm.policy.min = Bytes::gib(2);
    vm
}

fn sample(at_ms: u64, target: Bytes, ballooned: Bytes, available: Bytes) -> VmSample {
    let resident = Bytes::gib(8) - ballooned;
    VmSample {
        balloon_target: target,
        ..histories::sample(at_ms, ballooned, resident, available)
    }
}

/// The balloon target that the plan requests from a VM.
fn asked(plan: &Plan, name: &str) -> Option<(Bytes, Bytes)> {
    plan.actions.iter().find_map(|action| match action.kind {
        ActionKind::Balloon { from, to } if action.vm.as_str() == name => Some((from, to)),
        _ => None,
    })
}

fn reason(plan: &Plan, name: &str) -> Reason {
    plan.explanations
        .iter()
        .find(|explanation| explanation.vm.as_str() == name)
        .expect("every VM is explained")
        .reason
}

/// Its balloon would take memory from the guest and return none to the host.
#[test]
fn vm_whose_memory_is_pinned_gives_nothing_and_is_not_called_a_liar() {
    let config = Config::default();
    let mut memory = PlannerMemory::default();
    let mut named = 0;
    for now_ms in (0..120_000).step_by(PLAN_MS as usize) {
        let is_pinned = now_ms < 60_000;
        let at_ms = now_ms / SAMPLE_MS * SAMPLE_MS;
        // All of it is resident, with what the balloon held before the device came.
        let mut pinned = sample(at_ms, Bytes::gib(1), Bytes::gib(1), Bytes::gib(5));
        pinned.resident = Bytes::gib(8);
        pinned.reclaim = Some(ReclaimFigures {
            inhibited: is_pinned,
            policy_in_effect: true,
            ..ReclaimFigures::default()
        });
        if !is_pinned {
            pinned.resident = Bytes::gib(7);
        }
        let mut facts = vm("pinned", PriorityClass::Batch, pinned);
        // Its balloon is smaller than its policy asks for.
        facts.policy.max = Bytes::gib(6);
        let plan = plan(
            &inventory(now_ms, Bytes::gib(4), vec![facts]),
            &config,
            &memory,
        );
        let given = asked(&plan, "pinned").filter(|(from, to)| to > from);
        if is_pinned {
            assert_eq!(plan.actions, [], "at {now_ms}");
            named += u32::from(reason(&plan, "pinned") == Reason::Inhibited);
        } else if given.is_some() {
            assert!(named > 0);
            return;
        }
        memory = plan.memory;
    }
    panic!("a VM whose device is gone gives again");
}

#[test]
fn balloon_that_refuses_requests_is_stuck_and_others_give() {
    let config = Config::default();
    let mut memory = PlannerMemory::default();
    let mut requests = 0;
    let mut given = Bytes::ZERO;
    let mut named_stuck = false;
    for now_ms in (0..75_000).step_by(PLAN_MS as usize) {
        let at_ms = now_ms / SAMPLE_MS * SAMPLE_MS;
        let vms = vec![
            // The VMM rejects every request, or confirms it without effect: the target stays zero.
            vm(
                "batch",
                PriorityClass::Batch,
                sample(at_ms, Bytes::ZERO, Bytes::ZERO, Bytes::gib(6)),
            ),
            vm(
                "good",
                PriorityClass::Normal,
                sample(at_ms, given, given, Bytes::gib(6) - given),
            ),
        ];
        let plan = plan(&inventory(now_ms, Bytes::gib(4), vms), &config, &memory);
        requests += u32::from(asked(&plan, "batch").is_some());
        named_stuck |= reason(&plan, "batch") == Reason::Stuck;
        if let Some((_, to)) = asked(&plan, "good") {
            given = to;
        }
        memory = plan.memory;
    }
    assert!(
        requests <= 4,
        "{requests} requests to a VM that refuses all"
    );
    assert!(named_stuck);
    assert!(given >= Bytes::gib(2), "the other VM gave only {given}");
}

#[test]
fn guest_that_reads_back_what_it_gave_is_given_memory() {
    let config = Config::default();
    let target = Bytes::gib(6);
    let available = Bytes::gib(2).scale(0.09);
    for faults_only in [false, true] {
        let mut memory = PlannerMemory::default();
        let mut gave = Bytes::ZERO;
        for step in 1..=4 {
            let now_ms = step * SAMPLE_MS;
            let mut sample = sample(now_ms, target - gave, target - gave, available);
            let read_back = Bytes::mib(200 * 5 * step);
            let claims = sample.guest.as_mut().unwrap();
            if faults_only {
                claims.major_faults = Some(read_back.0 / 4096);
            } else {
                claims.swap_in = Some(read_back);
            }
            let vms = vec![vm("swapping", PriorityClass::Normal, sample)];
            let plan = plan(&inventory(now_ms, Bytes::gib(11), vms), &config, &memory);
            if let Some((from, to)) = asked(&plan, "swapping") {
                assert!(to < from);
                gave += from - to;
            }
            memory = plan.memory;
        }
        assert!(gave > Bytes::ZERO, "nothing was given");
    }
}

#[test]
fn nothing_is_taken_from_a_guest_that_reads_back_what_it_gave() {
    let config = Config::default();
    let mut memory = PlannerMemory::default();
    for step in 1..=6 {
        let now_ms = step * SAMPLE_MS;
        let mut sample = sample(now_ms, Bytes::gib(1), Bytes::gib(1), Bytes::gib(4));
        sample.guest.as_mut().unwrap().swap_in = Some(Bytes::mib(200 * 5 * step));
        let vms = vec![vm("swapping", PriorityClass::Normal, sample)];
        let plan = plan(&inventory(now_ms, Bytes::gib(2), vms), &config, &memory);
        if step > 2 {
            let taken = asked(&plan, "swapping").filter(|(from, to)| to > from);
            assert_eq!(taken, None, "step {step}");
            assert_eq!(reason(&plan, "swapping"), Reason::Need);
        }
        memory = plan.memory;
    }
}

#[test]
fn vm_of_impossible_size_harms_no_books() {
    let config = Config::default();
    for size in [9_000_000_000_000_000_000, u64::MAX, Bytes::gib(32 * 5).0] {
        let honest = vm(
            "honest",
            PriorityClass::Normal,
            sample(SAMPLE_MS, Bytes::ZERO, Bytes::ZERO, Bytes::gib(6)),
        );
        let mut giant = honest.clone();
        giant.id = VmId::from("giant");
        giant.configured = Bytes(size);
        giant.policy.max = Bytes(size);
        let seen = Bytes::gib(1);
        giant.sample.as_mut().unwrap().resident = seen;
        giant.sample.as_mut().unwrap().ballooned = Bytes(size / 2);
        let vms = vec![giant, honest];
        let plan = plan(
            &inventory(SAMPLE_MS, Bytes::gib(20), vms),
            &config,
            &PlannerMemory::default(),
        );
        assert_eq!(plan.ledger.configured, Bytes::gib(8) + seen);
        assert_eq!(plan.ledger.resident, Bytes::gib(8) + seen);
        assert_eq!(plan.ledger.ballooned, Bytes::ZERO);
        assert_eq!(reason(&plan, "giant"), Reason::Lying);
        let request = Request {
            min: Bytes::gib(2),
            max: Bytes::gib(4),
        };
        assert!(admit(&request, &plan.headroom(), &config).is_ok(), "{size}");
    }
}

#[test]
fn memory_that_a_guest_can_plug_unasked_is_a_liability_as_far_as_a_host_can_have_it() {
    let config = Config::default();
    let liability = |obtainable| {
        let mut vm = vm(
            "plugs",
            PriorityClass::Normal,
            sample(SAMPLE_MS, Bytes::ZERO, Bytes::ZERO, Bytes::gib(6)),
        );
        vm.sample.as_mut().unwrap().obtainable = obtainable;
        let inventory = inventory(SAMPLE_MS, Bytes::gib(20), vec![vm]);
        let plan = plan(&inventory, &config, &PlannerMemory::default());
        assert_ne!(reason(&plan, "plugs"), Reason::Lying);
        plan.ledger.callable_liability
    };
    let plain = liability(Bytes::ZERO);
    assert_eq!(liability(Bytes::gib(4)), plain + Bytes::gib(4));
    let most = HOST.scale(config.admission.overcommit_max.max(1.0));
    assert!(liability(Bytes(u64::MAX)) <= most);
}

#[test]
fn balloons_of_silent_guests_go_back_slowly_between_the_marks() {
    let config = Config::default();
    let mut memory = PlannerMemory::default();
    let taken = Bytes::gib(4);
    let mut ballooned = taken;
    let mut gives = 0;
    let hour_ms = 3_600_000;
    for now_ms in (0..2 * hour_ms).step_by(SAMPLE_MS as usize) {
        let mut vm = vm(
            "mute",
            PriorityClass::Normal,
            sample(now_ms, ballooned, ballooned, Bytes::ZERO),
        );
        vm.level = FeatureLevel::L0;
        vm.sample.as_mut().unwrap().guest = None;
        let free = HOST.scale(0.97).scale(0.317);
        let plan = plan(&inventory(now_ms, free, vec![vm]), &config, &memory);
        assert_eq!(plan.host.state, HostState::Green);
        if let Some((from, to)) = asked(&plan, "mute") {
            assert!(to < from);
            assert_eq!(reason(&plan, "mute"), Reason::Relax);
            gives += 1;
            ballooned = to;
        }
        memory = plan.memory;
    }
    assert!(gives <= 12, "{gives} gives in two hours are not slow");
    assert!(
        ballooned <= taken.scale(0.5),
        "{ballooned} of {taken} stayed away"
    );
}

/// The number of balloon requests to a guest that always has spare memory, on a host that is always short of memory,
/// and the final reason for making none. `moved` maps the requested balloon to the actual one.
fn requests_to_a_pressed_guest(
    lessons: &Lessons,
    moved: impl Fn(Bytes, u64) -> Bytes,
) -> (u32, Reason) {
    let config = Config::default();
    let (mut memory, mut target) = (PlannerMemory::default(), Bytes::gib(2));
    let (mut requests, mut last) = (0, Reason::NoNeed);
    for step in 1..=300 {
        let now_ms = step * SAMPLE_MS;
        let sample = sample(now_ms, target, target, Bytes::gib(4));
        let mut vm = vm("pressed", PriorityClass::Normal, sample);
        vm.lessons = lessons.clone();
        let plan = plan(
            &inventory(now_ms, Bytes::gib(3), vec![vm]),
            &config,
            &memory,
        );
        if let Some((_, to)) = asked(&plan, "pressed") {
            requests += 1;
            target = to;
        }
        target = moved(target, step);
        last = reason(&plan, "pressed");
        memory = plan.memory;
    }
    (requests, last)
}

#[test]
fn balloon_that_others_move_back_is_not_moved_for_ever() {
    // A late order, or another client's.
    let back = |target: Bytes, step: u64| {
        if step.is_multiple_of(2) {
            Bytes::gib(1)
        } else {
            target
        }
    };
    let (requests, last) = requests_to_a_pressed_guest(&Lessons::default(), back);
    assert!((1..=12).contains(&requests), "{requests} requests");
    assert_eq!(last, Reason::Blocked);
}

#[test]
fn turns_under_the_agent_before_count() {
    let lessons = Lessons {
        turns_ms: vec![SAMPLE_MS; 10],
        ..Lessons::default()
    };
    let stays = |target: Bytes, _| target;
    let (requests, last) = requests_to_a_pressed_guest(&lessons, stays);
    assert_eq!((requests, last), (0, Reason::Blocked));
    assert!(requests_to_a_pressed_guest(&Lessons::default(), stays).0 > 0);
}

#[test]
fn limit_of_a_guest_that_was_booted_again_is_taken_away() {
    let config = Config::default();
    let mut memory = PlannerMemory::default();
    let mut limit = None;
    for step in 1..=8 {
        let now_ms = step * SAMPLE_MS;
        let booted = step > 6;
        let target = Bytes::gib(if booted { 0 } else { 4 });
        let mut vm = vm(
            "enforced",
            PriorityClass::Normal,
            sample(now_ms, target, target, Bytes::gib(2)),
        );
        vm.policy.enforce = true;
        vm.in_force.max = limit;
        if booted {
            vm.epoch = 2;
        } else {
            // It claims to have given half of its memory, but occupies nearly all of it.
            vm.sample.as_mut().unwrap().resident = Bytes::gib(7);
        }
        let plan = plan(
            &inventory(now_ms, Bytes::gib(20), vec![vm]),
            &config,
            &memory,
        );
        for action in &plan.actions {
            if let ActionKind::MemoryMax { limit: to } = action.kind {
                limit = to;
            }
        }
        if step == 6 {
            assert!(limit.is_some(), "the liar was not held to anything");
        }
        memory = plan.memory;
    }
    assert_eq!(limit, None);
}

#[test]
fn nobody_is_killed_on_figures_that_are_old() {
    let mut config = Config::default();
    config.last_resort.kill = true;
    let kills = |readable: bool| {
        let mut memory = PlannerMemory::default();
        let mut kills = 0;
        for now_ms in (SAMPLE_MS..120_000).step_by(PLAN_MS as usize) {
            let mut vms = Vec::new();
            for name in ["a", "b", "c"] {
                vms.push(vm(
                    name,
                    PriorityClass::Batch,
                    sample(now_ms, Bytes::ZERO, Bytes::ZERO, Bytes::ZERO),
                ));
            }
            let mut inventory = inventory(now_ms, Bytes::mib(100), vms);
            if !readable {
                inventory.host.at_ms = SAMPLE_MS;
            }
            let plan = plan(&inventory, &config, &memory);
            let killed = |action: &&fleet::planner::Action| action.kind == ActionKind::Kill;
            kills += plan.actions.iter().filter(killed).count();
            memory = plan.memory;
        }
        kills
    };
    assert_eq!(kills(true), 3);
    assert_eq!(kills(false), 1);
}

#[test]
fn guest_whose_statistics_stopped_long_after_the_last_take_gets_its_memory_back() {
    let config = Config::default();
    let mut memory = PlannerMemory::default();
    let mut held = Bytes::gib(2);
    for now_ms in (0..300_000).step_by(PLAN_MS as usize) {
        let at_ms = now_ms / SAMPLE_MS * SAMPLE_MS;
        let mut sample = sample(at_ms, held, held, Bytes::gib(3));
        // The VMM responds, but its guest does not.
        sample.guest.as_mut().unwrap().at_ms = at_ms.min(60_000);
        let vms = vec![vm("silent", PriorityClass::Normal, sample)];
        // Enough memory is free that nothing is taken, but too little to give without need.
        let plan = plan(&inventory(now_ms, Bytes::gib(9), vms), &config, &memory);
        if let Some((_, to)) = asked(&plan, "silent") {
            assert!(now_ms > 60_000 && to < held, "{held} to {to} at {now_ms}");
            held = to;
        }
        memory = plan.memory;
    }
    assert_eq!(held, Bytes::ZERO);
}

#[test]
fn balloon_that_ignores_the_operators_maximum_is_not_asked_at_every_plan() {
    let config = Config::default();
    let mut memory = PlannerMemory::default();
    let mut requests = 0;
    for now_ms in (0..75_000).step_by(PLAN_MS as usize) {
        let unmoved = sample(now_ms, Bytes::ZERO, Bytes::ZERO, Bytes::gib(6));
        let mut vm = vm("large", PriorityClass::Normal, unmoved);
        vm.policy.max = Bytes::gib(4);
        let plan = plan(
            &inventory(now_ms, Bytes::gib(20), vec![vm]),
            &config,
            &memory,
        );
        requests += u32::from(asked(&plan, "large").is_some());
        memory = plan.memory;
    }
    assert!((1..=4).contains(&requests), "{requests} requests");
}
