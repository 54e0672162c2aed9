#![allow(clippy::unwrap_used)]
//! The whole agent against fake VMMs on a host made of files.

use std::fs;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use api::ClientError;

use super::fake_vmm::{DEADLINE, FakeVm, Fault, GIB, MIB, World, wait};
use super::*;
use crate::agent_config::AgentConfig;
use crate::config::Millis;
use crate::http::{Method, Request, Response};
use crate::model::{Bytes, HostState};
use crate::reservations::ReservationPhase;

fn agent_config(world: &World) -> AgentConfig {
    let mut config = AgentConfig::default();
    config.agent.socket = world.path().join("run/agent.sock");
    config.agent.state_dir = world.path().join("state");
    config.agent.listen = Some("127.0.0.1:0".parse().unwrap());
    config.agent.scan = Millis(200);
    config.agent.host = Millis(100);
    config.discovery.sockets = vec![format!("{}/vms/*.sock", world.path().display())];
    config.planning.control.sample = Millis(200);
    config.planning.control.plan = Millis(200);
    config.planning.control.sample_deadline = Millis(1000);
    config
}

fn start(world: &World) -> Agent {
    start_with(world, agent_config(world))
}

fn start_with(world: &World, config: AgentConfig) -> Agent {
    Agent::start(AgentOptions {
        config,
        file: None,
        host: world.files(),
        store: None,
    })
    .unwrap()
}

fn status_of(agent: &Agent, name: &str) -> Option<VmStatus> {
    let snapshot = agent.published().get();
    snapshot.status.vms.iter().find(|vm| vm.vm == name).cloned()
}

fn wait_vm(agent: &Agent, name: &str, what: &str, is: impl Fn(&VmStatus) -> bool) -> VmStatus {
    wait(&format!("{name}: {what}"), || {
        status_of(agent, name).filter(&is)
    })
}

fn client(world: &World) -> api::Client {
    api::Client::new(world.path().join("run/agent.sock")).with_timeout(Some(DEADLINE))
}

fn reserve(world: &World, vm: &str, memory: u64, min: u64) -> Result<ReserveAnswer, ClientError> {
    let body = api::to_ascii_json(&ReserveRequest {
        vm: vm.to_owned(),
        memory: Bytes(memory),
        min: Some(Bytes(min)),
        dry_run: false,
    })
    .unwrap();
    let answer = client(world).put("fleet.reserve", Some(&body))?;
    Ok(serde_json::from_str(&answer.unwrap()).unwrap())
}

#[test]
fn host_that_is_short_takes_from_the_idle_and_is_short_no_more() {
    let world = World::new(16 * GIB, GIB);
    for name in ["a", "b", "c", "d"] {
        world.add(name, FakeVm::new(4 * GIB, 3500 * MIB));
    }
    let agent = start(&world);
    wait("green again", || {
        let snapshot = agent.published().get();
        let taken: u64 = ["a", "b", "c", "d"]
            .map(|name| world.vm(name).target)
            .iter()
            .sum();
        // What is shown and what was ordered are brought together once a second.
        let shown_taken: u64 = snapshot.status.vms.iter().map(|vm| vm.target.0).sum();
        (snapshot.status.host.state == HostState::Green && taken > 0 && shown_taken == taken)
            .then_some(())
    });
    for name in ["a", "b", "c", "d"] {
        assert!(
            world.vm(name).target <= 2 * GIB,
            "below the minimum of {name}"
        );
    }
    let snapshot = agent.published().get();
    let ordered: u64 = snapshot
        .decisions
        .actions
        .iter()
        .filter(|((action, _, result), _)| *action == "inflate" && *result == "ordered")
        .map(|(_, count)| count)
        .sum();
    assert!(ordered > 0, "{:?}", snapshot.decisions);
}

#[test]
fn guest_that_suffers_gets_its_memory_back() {
    let world = World::new(16 * GIB, GIB);
    for name in ["a", "b", "c", "d"] {
        world.add(name, FakeVm::new(4 * GIB, 3500 * MIB));
    }
    let agent = start(&world);
    wait("a balloon", || {
        (world.vm("a").actual > 256 * MIB).then_some(())
    });
    wait("ease", || {
        (agent.published().get().status.host.state == HostState::Green).then_some(())
    });
    world.change("a", |vm| {
        vm.available = 8 * MIB;
        vm.stalls += 1000;
    });
    let before = world.vm("a").actual;
    wait("memory given back", || {
        (world.vm("a").actual < before).then_some(())
    });
}

#[test]
fn vmm_that_hangs_delays_nobody() {
    let world = World::new(16 * GIB, GIB);
    for name in ["a", "b", "c", "wedged"] {
        world.add(name, FakeVm::new(4 * GIB, 3500 * MIB));
    }
    world.change("wedged", |vm| vm.fault = Fault::Hang);
    let agent = start(&world);
    wait_vm(&agent, "wedged", "missed", |vm| vm.missed >= 2);
    let failure = status_of(&agent, "wedged").unwrap().failure;
    assert_eq!(failure.as_deref(), Some("timeout"));
    // Each of the others was asked many times while the first request to the wedged one was still waiting.
    for name in ["a", "b", "c"] {
        let requests = world.vm(name).requests;
        assert!(requests >= 8, "{name} was asked {requests} times");
        assert!(status_of(&agent, name).unwrap().up);
    }
    wait("the others give", || {
        (world.vm("a").target > 0).then_some(())
    });
    assert_eq!(world.vm("wedged").target, 0);
}

#[test]
fn vmm_that_answers_badly_is_told_and_taken_back_when_it_answers_well() {
    let world = World::new(16 * GIB, GIB);
    world.add("a", FakeVm::new(4 * GIB, GIB));
    let agent = start(&world);
    wait_vm(&agent, "a", "up", |vm| vm.up);
    for (fault, word) in [
        (Fault::Half, "wire"),
        (Fault::Status500, "status"),
        (Fault::Garbage, "wire"),
        (Fault::Hang, "timeout"),
    ] {
        world.change("a", |vm| vm.fault = fault);
        let vm = wait_vm(&agent, "a", word, |vm| !vm.up);
        assert_eq!(vm.failure.as_deref(), Some(word), "{fault:?}");
        world.change("a", |vm| vm.fault = Fault::None);
        wait_vm(&agent, "a", "up again", |vm| vm.up);
    }
}

#[test]
fn levels_follow_what_each_vmm_can_answer() {
    let world = World::new(16 * GIB, GIB);
    for level in 0..=2 {
        let mut vm = FakeVm::new(4 * GIB, GIB);
        vm.level = level;
        world.add(&format!("l{level}"), vm);
    }
    let agent = start(&world);
    for level in 0..=2 {
        let vm = wait_vm(&agent, &format!("l{level}"), "up", |vm| vm.up);
        assert_eq!(vm.level, level);
        // Without reclaim-stats the memory of the process stands for what is resident.
        let resident = if level == 2 { GIB } else { 512 * MIB };
        assert_eq!(vm.resident, Bytes(resident), "level {level}");
        assert_eq!(vm.guest_available.is_some(), level > 0);
    }
}

#[test]
fn vm_that_is_replaced_or_gone_is_noticed() {
    let world = World::new(16 * GIB, GIB);
    world.add("a", FakeVm::new(4 * GIB, GIB));
    let agent = start(&world);
    let first = wait_vm(&agent, "a", "up", |vm| vm.up);
    world.add("a", FakeVm::new(2 * GIB, GIB));
    let second = wait_vm(&agent, "a", "replaced", |vm| {
        vm.configured == Bytes(2 * GIB)
    });
    assert_ne!(first.epoch, second.epoch);
    world.remove("a");
    wait("gone", || status_of(&agent, "a").is_none().then_some(()));
}

#[test]
fn hundred_at_once_for_ten_places_are_ten() {
    let world = World::new(16 * GIB, 0);
    let mut config = agent_config(&world);
    config.planning.host.reserve = crate::model::Amount::Bytes(Bytes(GIB));
    let _agent = start_with(&world, config);
    wait("agent", || client(&world).get("fleet.status").ok());
    // 15 GiB, of which a tenth is kept for those that are there: room for ten of 1.3 GiB.
    let barrier = Barrier::new(100);
    let admitted: Vec<bool> = thread::scope(|scope| {
        let asks: Vec<_> = (0..100)
            .map(|number| {
                let (world, barrier) = (&world, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    loop {
                        match reserve(world, &format!("vm{number}"), 2 * GIB, 1331 * MIB) {
                            Ok(_) => return true,
                            Err(ClientError::Server(error)) if error.status == 409 => return false,
                            // More at once than the socket serves.
                            Err(_) => thread::sleep(Duration::from_millis(20)),
                        }
                    }
                })
            })
            .collect();
        asks.into_iter().map(|ask| ask.join().unwrap()).collect()
    });
    assert_eq!(admitted.iter().filter(|admitted| **admitted).count(), 10);
}

#[test]
fn refusal_says_what_would_make_it_fit() {
    let world = World::new(16 * GIB, 0);
    let _agent = start(&world);
    let Err(ClientError::Server(error)) = reserve(&world, "big", 15 * GIB, 15 * GIB) else {
        panic!("admitted");
    };
    let chain: Vec<&str> = error.chain().collect();
    assert_eq!(error.status, 409);
    assert!(chain[1].contains("To make it fit: "), "{chain:?}");
}

#[test]
fn reservations_outlive_the_agent_and_follow_their_vms() {
    let world = World::new(16 * GIB, 0);
    let agent = start(&world);
    let made = reserve(&world, "a", 4 * GIB, 3 * GIB)
        .unwrap()
        .reservation
        .unwrap();
    drop(agent);
    let agent = start(&world);
    let held = |agent: &Agent| agent.published().get().status.reservations.clone();
    wait("reservation after the restart", || {
        (held(&agent).len() == 1).then_some(())
    });
    assert_eq!(held(&agent)[0].reservation.id, made.id);
    assert_eq!(held(&agent)[0].outstanding, Bytes(3 * GIB));
    world.add("a", FakeVm::new(4 * GIB, GIB));
    wait("running", || {
        let held = held(&agent);
        (held[0].reservation.phase == ReservationPhase::Running
            && held[0].outstanding == Bytes(2 * GIB))
        .then_some(())
    });
    let body = format!(r#"{{"reservation":"{}"}}"#, made.id);
    client(&world).put("fleet.release", Some(&body)).unwrap();
    assert!(held(&agent).is_empty());
}

#[test]
fn reload_takes_good_settings_and_keeps_the_old_for_bad_ones() {
    let world = World::new(16 * GIB, 0);
    let file = world.path().join("agent.toml");
    fs::write(&file, agent_config(&world).to_toml()).unwrap();
    let agent = Agent::start(AgentOptions {
        config: agent_config(&world),
        file: Some((file.clone(), true)),
        host: world.files(),
        store: None,
    })
    .unwrap();
    let shown = || client(&world).get("fleet.config").unwrap().unwrap();
    fs::write(&file, "[control]\nplam = '1s'\n").unwrap();
    agent.reload();
    wait("refusal", || {
        (!agent.published().get().status.reload_ok).then_some(())
    });
    let mut better = agent_config(&world);
    better.planning.control.step = Bytes(77 * MIB);
    fs::write(&file, better.to_toml()).unwrap();
    client(&world).put("fleet.reload", None).unwrap();
    assert!(
        shown().contains(&format!("step = {}", 77 * MIB)),
        "{}",
        shown()
    );
    assert!(agent.published().get().status.reload_ok);
}

#[test]
fn dry_run_tells_and_does_nothing() {
    let world = World::new(16 * GIB, GIB);
    for name in ["a", "b", "c", "d"] {
        world.add(name, FakeVm::new(4 * GIB, 3500 * MIB));
    }
    let mut config = agent_config(&world);
    config.agent.dry_run = true;
    let _agent = start_with(&world, config);
    wait("telling", || {
        let page = client(&world).get("fleet.events").unwrap().unwrap();
        let page: JournalPage = serde_json::from_str(&page).unwrap();
        page.entries
            .iter()
            .any(|entry| entry.text.starts_with("would balloon"))
            .then_some(())
    });
    for name in ["a", "b", "c", "d"] {
        assert!(world.vm(name).resizes.is_empty());
    }
}

#[test]
fn pinned_vm_is_left_as_it_is() {
    let world = World::new(16 * GIB, 0);
    world.add("a", FakeVm::new(4 * GIB, 3500 * MIB));
    world.add("b", FakeVm::new(4 * GIB, 3500 * MIB));
    let agent = start(&world);
    wait_vm(&agent, "a", "up", |vm| vm.up);
    client(&world)
        .put("fleet.pin", Some(r#"{"vm":"a","pinned":true}"#))
        .unwrap();
    wait_vm(&agent, "a", "pinned", |vm| {
        vm.interlock.as_deref() == Some("pinned")
    });
    let asked = world.vm("a").resizes.len();
    world.set_others(8 * GIB);
    wait("the other gives", || {
        (world.vm("b").target > 0).then_some(())
    });
    assert_eq!(world.vm("a").resizes.len(), asked);
}

#[test]
fn page_and_metrics_come_from_what_is_published_and_change_nothing() {
    let world = World::new(16 * GIB, 0);
    world.add("a", FakeVm::new(4 * GIB, GIB));
    let agent = start(&world);
    wait_vm(&agent, "a", "up", |vm| vm.up);
    let ask = |method: Method, path: &str| {
        handle_page(
            &Request {
                method,
                path: path.to_owned(),
                query: String::new(),
                body: Vec::new(),
                peer: None,
            },
            agent.published(),
            |_| Response::done(),
        )
    };
    let metrics = String::from_utf8(ask(Method::Get, "/metrics").body).unwrap();
    assert!(
        metrics.contains(r#"ch_vm_up{host="fake",vm="a"} 1"#),
        "{metrics}"
    );
    let status: Status = serde_json::from_slice(&ask(Method::Get, "/status.json").body).unwrap();
    assert_eq!(status.vms[0].socket, "");
    assert_eq!(ask(Method::Put, "/status.json").status, 400);
    assert_eq!(ask(Method::Get, "/api/v1/fleet.reserve").status, 404);
}

#[test]
fn pressure_reaches_a_guest_without_waiting_for_the_next_plan() {
    let world = World::new(16 * GIB, 0);
    for name in ["a", "b", "c"] {
        world.add(name, FakeVm::new(4 * GIB, 3 * GIB));
    }
    let mut config = agent_config(&world);
    config.planning.control.plan = Millis::seconds(1);
    let agent = start_with(&world, config);
    for name in ["a", "b", "c"] {
        wait("two samples", || {
            (world.vm(name).requests >= 6).then_some(())
        });
    }
    // The planner believes a VM from the second sample on that it saw.
    wait("plans", || {
        (agent.published().get().decisions.plans > 2).then_some(())
    });
    world.set_others(6 * GIB);
    let begin = Instant::now();
    agent.pressure();
    let at = wait("a balloon", || {
        world.vm("a").resizes.first().map(|(_, at)| *at)
    });
    // For people: the figure is a promise, but a loaded machine is no place to hold a test to it.
    println!(
        "from pressure to the request: {:?}",
        at.saturating_duration_since(begin)
    );
}

#[test]
fn hundreds_of_vms_are_all_known_and_planned_for() {
    let world = World::new(1024 * GIB, 0);
    let mut config = agent_config(&world);
    config.planning.control.sample = Millis::seconds(5);
    for number in 0..200 {
        world.add(&format!("vm{number}"), FakeVm::new(2 * GIB, GIB));
    }
    for number in (0..200).step_by(20) {
        world.change(&format!("vm{number}"), |vm| vm.fault = Fault::Hang);
    }
    let agent = start_with(&world, config);
    wait("all sampled", || {
        let snapshot = agent.published().get();
        let up = snapshot.status.vms.iter().filter(|vm| vm.up).count();
        (up == 190 && snapshot.plan.explanations.len() == 190).then_some(())
    });
}
