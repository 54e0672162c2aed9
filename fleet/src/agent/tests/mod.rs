#![allow(clippy::unwrap_used)]
//! Tests the whole agent with fake VMMs on a host simulated by files.

mod chaos;
mod fleet;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use api::ClientError;

use super::clock::Clock;
use super::control::ControlLoop;
use super::event::Event;
use super::fake_vmm::{DEADLINE, FakeVm, Fault, GIB, MIB, World, wait};
use super::launch::{Surroundings, assemble};
use super::rounds::with_threads;
use super::signals::StopFlag;
use super::*;
use crate::agent_config::AgentConfig;
use crate::config::Millis;
use crate::execute::GroupFiles;
use crate::http::{Method, Request};
use crate::model::{Bytes, PriorityClass};
use crate::reservations::ReservationPhase;
use crate::worker::{VmEvent, VmEventKind};

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
        huge_pages: false,
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
        // The published data is updated once per second.
        let shown_taken: u64 = snapshot.status.vms.iter().map(|vm| vm.target.0).sum();
        (snapshot.status.host.state == PublishedState::Green && taken > 0 && shown_taken == taken)
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
        (agent.published().get().status.host.state == PublishedState::Green).then_some(())
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
    // Each of the other VMs received many requests while the first request to the hanging one was still pending.
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
        // Without reclaim-stats, the process's memory is used as resident memory.
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
    // 15 GiB, of which a tenth is kept for existing VMs, so ten VMs of 1.3 GiB fit.
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
                            // More concurrent requests than the socket serves.
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
fn what_a_refused_vm_needs_is_asked_of_idle_guests_until_it_fits() {
    let world = World::new(16 * GIB, 4 * GIB);
    for name in ["a", "b"] {
        world.add(name, FakeVm::new(4 * GIB, 3 * GIB));
    }
    let mut config = agent_config(&world);
    config.planning.host.reserve = crate::model::Amount::Bytes(Bytes::ZERO);
    let agent = start_with(&world, config);
    for name in ["a", "b"] {
        wait_vm(&agent, name, "up", |vm| vm.up);
    }
    // A third of the host is free, so memory is only taken for the refused VM.
    wait("room", || match reserve(&world, "new", 6 * GIB, 5 * GIB) {
        Ok(_) => Some(()),
        Err(ClientError::Server(error)) if error.status == 409 => None,
        Err(error) => panic!("{error:?}"),
    });
    let decisions = &agent.published().get().decisions;
    let asked = |reason| {
        decisions
            .actions
            .contains_key(&("inflate", reason, "ordered"))
    };
    assert!(asked("newcomer") && !asked("shortage"), "{decisions:?}");
}

#[test]
fn vm_that_claims_the_impossible_costs_the_others_no_promise() {
    let world = World::new(16 * GIB, 4 * GIB);
    world.add("giant", FakeVm::new(u64::MAX, GIB));
    let agent = start(&world);
    wait_vm(&agent, "giant", "up", |vm| vm.up);
    wait("a promise", || match reserve(&world, "new", 2 * GIB, GIB) {
        Ok(_) => Some(()),
        Err(ClientError::Server(error)) if error.status == 409 => None,
        Err(error) => panic!("{error:?}"),
    });
}

#[test]
fn refusal_says_what_would_make_it_fit() {
    let world = World::new(16 * GIB, 8 * GIB);
    let _agent = start(&world);
    let Err(ClientError::Server(error)) = reserve(&world, "big", 12 * GIB, 10 * GIB) else {
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
    assert!(shown().contains("step = \"77MiB\""), "{}", shown());
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
                host: None,
                authorization: None,
                body: Vec::new(),
                peer: None,
            },
            agent.published(),
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
    let page: JournalPage = serde_json::from_slice(&ask(Method::Get, "/events.json").body).unwrap();
    assert!(page.entries.iter().any(|entry| entry.vm == "a"), "{page:?}");
}

/// Requests the page with this `Host` and additional headers; returns the status line.
fn ask_page(agent: &Agent, host: &str, headers: &str) -> String {
    let mut stream = TcpStream::connect(agent.page().unwrap()).unwrap();
    write!(
        stream,
        "GET /healthz HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.lines().next().unwrap().to_owned()
}

#[test]
fn page_is_for_clients_that_know_its_name_and_its_token() {
    let world = World::new(16 * GIB, 0);
    let agent = start(&world);
    assert_eq!(ask_page(&agent, "127.0.0.1", ""), "HTTP/1.1 200 OK");
    assert_eq!(ask_page(&agent, "fake:9273", ""), "HTTP/1.1 200 OK");
    let other = ask_page(&agent, "evil.example", "");
    assert_eq!(other, "HTTP/1.1 421 Misdirected Request");
    drop(agent);
    let mut config = agent_config(&world);
    let token = world.path().join("token");
    fs::write(&token, "secret").unwrap();
    config.agent.token_file = Some(token);
    let agent = start_with(&world, config);
    assert_eq!(ask_page(&agent, "fake", ""), "HTTP/1.1 401 Unauthorized");
    let with = ask_page(&agent, "fake", "Authorization: Bearer secret\r\n");
    assert_eq!(with, "HTTP/1.1 200 OK");
}

#[test]
fn socket_for_reading_shows_and_takes_no_orders() {
    let world = World::new(16 * GIB, 0);
    world.add("a", FakeVm::new(4 * GIB, GIB));
    let agent = start(&world);
    wait_vm(&agent, "a", "up", |vm| vm.up);
    let path = world.path().join("run/agent.read.sock");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let reader = api::Client::new(&path).with_timeout(Some(DEADLINE));
    for name in ["fleet.status", "fleet.explain", "fleet.events?since=0"] {
        assert!(reader.get(name).unwrap().is_some(), "{name}");
    }
    let refused = [
        reader.put("fleet.pin", Some(r#"{"vm":"a","pinned":true}"#)),
        reader.put("fleet.reload", None),
        reader.get("fleet.config"),
    ];
    for refused in refused {
        let Err(ClientError::Server(error)) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(error.status, 403);
    }
    let vm = status_of(&agent, "a").unwrap();
    assert_eq!(vm.interlock, None);
}

/// A control loop that the test runs itself.
fn control_loop(
    world: &World,
    config: AgentConfig,
    report: impl Fn(VmEvent) -> bool + Clone + Send + 'static,
) -> ControlLoop {
    let clock = Clock::start();
    let files = world.files();
    let groups = GroupFiles {
        proc: files.proc.clone(),
        cgroup_root: files.cgroup_root.clone(),
    };
    let surroundings = Surroundings {
        files: &files,
        clock,
        serve: with_threads(groups, clock, Arc::default(), report),
        pressed: Box::new(|| {}),
    };
    assemble(config, None, &Arc::default(), surroundings).unwrap()
}

#[test]
fn order_that_ends_as_the_agent_is_asked_to_end_is_not_waited_for() {
    let world = World::new(16 * GIB, GIB);
    set_of(&world, &["a", "b", "c", "d"], 2);
    let mut config = agent_config(&world);
    config.agent.on_stop = crate::agent_config::OnStop::Restore;
    let (events, received) = mpsc::sync_channel(16);
    let stop = StopFlag::default();
    let asking = stop.clone();
    let mut control = control_loop(&world, config, move |event| {
        if matches!(event.kind, VmEventKind::Done(_)) {
            asking.ask();
        }
        events.send(Event::Vm(event)).is_ok()
    });
    control.stop = stop;
    control.run(&received).unwrap();
    for name in ["a", "b", "c", "d"] {
        assert_eq!(world.vm(name).target, 0);
    }
}

#[test]
fn agent_that_shall_end_does_so_after_one_request_however_many_wait() {
    let world = World::new(16 * GIB, 0);
    let (reports, _reported) = mpsc::sync_channel::<VmEvent>(16);
    let mut control = control_loop(&world, agent_config(&world), move |event| {
        reports.send(event).is_ok()
    });
    let (events, received) = mpsc::sync_channel(1000);
    let mut answers = Vec::new();
    let stop = control.stop.clone();
    for number in 0..1000 {
        let (answer, answered) = mpsc::sync_channel(1);
        let request = Request {
            method: Method::Get,
            path: "/api/v1/fleet.config".to_owned(),
            query: String::new(),
            host: None,
            authorization: None,
            body: Vec::new(),
            peer: None,
        };
        events
            .send(Event::Client(Box::new(request), answer))
            .unwrap();
        answers.push(answered);
        if number == 500 {
            stop.ask();
        }
    }
    control.run(&received).unwrap();
    let answered = answers
        .iter()
        .filter(|answered| answered.try_recv().is_ok());
    assert!(answered.count() <= 1);
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
    // The planner trusts a VM from its second sample on.
    wait("plans", || {
        (agent.published().get().decisions.plans > 2).then_some(())
    });
    world.set_others(6 * GIB);
    let begin = Instant::now();
    agent.pressure();
    let at = wait("a balloon", || {
        world.vm("a").resizes.first().map(|(_, at)| *at)
    });
    // Printed only, because on a loaded machine a test cannot check the documented time.
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

fn set_of(world: &World, names: &[&str], level: u8) {
    for name in names {
        let mut vm = FakeVm::new(4 * GIB, 3500 * MIB);
        vm.level = level;
        world.add(name, vm);
    }
}

/// Sets the memory that the kernel's files show for every VMM.
fn tell_of_processes(world: &World, status: &str) {
    let path = format!("proc/{}/status", std::process::id());
    fs::write(world.path().join(path), status).unwrap();
}

fn journal(world: &World) -> Vec<JournalEntry> {
    let page = client(world).get("fleet.events").unwrap().unwrap();
    serde_json::from_str::<JournalPage>(&page).unwrap().entries
}

#[test]
fn memory_that_was_asked_for_without_an_answer_is_given_back_until_that_is_confirmed() {
    let world = World::new(16 * GIB, 0);
    set_of(&world, &["a", "b", "c"], 2);
    let agent = start(&world);
    for name in ["a", "b", "c"] {
        wait_vm(&agent, name, "up", |vm| vm.up);
    }
    wait("plans", || {
        (agent.published().get().decisions.plans > 5).then_some(())
    });
    world.change("a", |vm| vm.fault = Fault::Mute);
    world.set_others(5 * GIB);
    wait("an order that is carried out and not answered", || {
        world
            .vm("a")
            .resizes
            .iter()
            .any(|(to, _)| *to > 0)
            .then_some(())
    });
    // If a guest stops responding after memory was taken, everything is returned, repeatedly until there is a response.
    wait("the rescue, more than once", || {
        let resizes = world.vm("a").resizes;
        (resizes.iter().filter(|(to, _)| *to == 0).count() >= 2).then_some(())
    });
    assert_eq!(world.vm("a").actual, 0);
    world.set_others(0);
    world.change("a", |vm| vm.fault = Fault::None);
    wait_vm(&agent, "a", "in step", |vm| {
        vm.up && vm.target == Bytes::ZERO && vm.actual == Bytes::ZERO
    });
}

/// Agents that may pause VMs of the class batch.
fn pausing(world: &World) -> AgentConfig {
    let mut config = agent_config(world);
    config.planning.last_resort.pause = true;
    config.planning.last_resort.after = Millis(200);
    let policy = |class| crate::config::PolicyConfig {
        class,
        balloon: false,
        ..crate::config::PolicyConfig::default()
    };
    let policies = &mut config.planning.policy;
    policies.insert("default".to_owned(), policy(PriorityClass::High));
    policies.insert("batch".to_owned(), policy(PriorityClass::Batch));
    config
}

fn wait_paused(world: &World, paused: bool) {
    wait(&format!("paused: {paused}"), || {
        (world.vm("batch").paused == paused).then_some(())
    });
}

#[test]
fn vm_that_an_agent_paused_is_resumed_by_the_next_one() {
    let world = World::new(16 * GIB, 11 * GIB);
    set_of(&world, &["batch"], 2);
    let agent = start_with(&world, pausing(&world));
    world.set_others(12 * GIB + 200 * MIB);
    wait_paused(&world, true);
    drop(agent);
    world.set_others(0);
    assert!(world.vm("batch").paused);
    let _next = start_with(&world, pausing(&world));
    wait_paused(&world, false);
}

#[test]
fn resume_that_fails_is_tried_again() {
    let world = World::new(16 * GIB, 11 * GIB);
    set_of(&world, &["batch"], 2);
    let _agent = start_with(&world, pausing(&world));
    world.set_others(12 * GIB + 200 * MIB);
    wait_paused(&world, true);
    world.change("batch", |vm| vm.refusals = 1);
    world.set_others(0);
    wait_paused(&world, false);
    assert_eq!(world.vm("batch").refusals, 0);
}

#[test]
fn paused_vm_that_is_pinned_stays_as_it_is_until_it_is_unpinned() {
    let world = World::new(16 * GIB, 11 * GIB);
    set_of(&world, &["batch"], 2);
    let agent = start_with(&world, pausing(&world));
    world.set_others(12 * GIB + 200 * MIB);
    wait_paused(&world, true);
    let pin = |pinned| {
        let body = format!(r#"{{"vm":"batch","pinned":{pinned}}}"#);
        client(&world).put("fleet.pin", Some(&body)).unwrap();
    };
    pin(true);
    world.set_others(0);
    wait("green", || {
        let state = agent.published().get().status.host.state;
        (state == PublishedState::Green).then_some(())
    });
    let plans = agent.published().get().decisions.plans;
    wait("plans", || {
        (agent.published().get().decisions.plans > plans + 5).then_some(())
    });
    assert!(world.vm("batch").paused);
    pin(false);
    wait_paused(&world, false);
}

#[test]
fn memory_that_cannot_be_read_is_unknown_and_named() {
    let world = World::new(16 * GIB, GIB);
    set_of(&world, &["a"], 0);
    let status = format!("proc/{}/status", std::process::id());
    fs::remove_file(world.path().join(status)).unwrap();
    let agent = start(&world);
    let vm = wait_vm(&agent, "a", "missed", |vm| vm.missed > 0);
    assert_eq!(vm.failure.as_deref(), Some("resident"));
    assert_eq!(vm.sample_age_ms, None);
    let entries = journal(&world);
    let named = entries
        .iter()
        .find(|entry| entry.vm == "a" && entry.text.contains("cannot be read"));
    assert!(named.is_some(), "{entries:?}");
    assert!(world.vm("a").resizes.is_empty());
}

#[test]
fn pool_of_huge_pages_has_books_of_its_own() {
    // The host has 64 GiB, of which 52 are in the pool, 44 of them free; 6 GiB of other memory are available.
    let world = World::new(64 * GIB, 58 * GIB);
    world.set_pool(52 * GIB, 44 * GIB);
    let agent = start(&world);
    wait("the first plan", || {
        (agent.published().get().decisions.plans > 0).then_some(())
    });
    let ask = |vm: &str, memory, huge_pages| {
        let body = api::to_ascii_json(&ReserveRequest {
            vm: vm.to_owned(),
            memory: Bytes(memory),
            min: None,
            huge_pages,
            dry_run: false,
        });
        client(&world).put("fleet.reserve", Some(&body.unwrap()))
    };
    let status = |answer| match answer {
        Ok(_) => 200,
        Err(ClientError::Server(error)) => error.status,
        Err(error) => panic!("{error:?}"),
    };
    // A request larger than all other memory fits, a second one of that size does not, and 60 GiB exceed the pool.
    assert_eq!(status(ask("large", 40 * GIB, true)), 200);
    assert_eq!(status(ask("second", 8 * GIB, true)), 409);
    assert_eq!(status(ask("giant", 60 * GIB, true)), 422);
    assert_eq!(status(ask("third", 4 * GIB, true)), 200);
    assert_eq!(status(ask("fourth", GIB, true)), 409);
    // Reservations from the pool do not reduce other memory.
    assert_eq!(status(ask("small", 2 * GIB, false)), 200);
    let host = agent.published().get().status.host.clone();
    assert_eq!(host.state, PublishedState::Green);
    assert_eq!(host.facts.total, Bytes::gib(12));
    let pool = PoolStatus {
        total: Bytes::gib(52),
        free: Bytes::gib(44),
        held: Bytes::ZERO,
        promised: Bytes::gib(44),
    };
    assert_eq!(host.pool, pool);
}

#[test]
fn vm_in_huge_pages_without_a_word_of_it_is_booked_by_what_it_holds() {
    let world = World::new(64 * GIB, GIB);
    world.set_pool(32 * GIB, 24 * GIB);
    let mut vm = FakeVm::new(8 * GIB, 8 * GIB);
    vm.level = 0;
    world.add("a", vm);
    tell_of_processes(&world, "RssAnon: 65536 kB\nHugetlbPages: 8388608 kB\n");
    let agent = start(&world);
    let vm = wait_vm(&agent, "a", "up", |vm| vm.up);
    assert_eq!(vm.interlock.as_deref(), Some("huge-pages"));
    assert_eq!(vm.pool_held, Bytes::gib(8));
    assert!(vm.explanation.contains("it holds 8"), "{}", vm.explanation);
    wait("the books", || {
        let host = agent.published().get().status.host.clone();
        (host.pool.held == Bytes::gib(8) && host.ledger.callable_liability == Bytes::ZERO)
            .then_some(())
    });
}

#[test]
fn huge_pages_that_a_vm_may_still_take_are_promised_to_nobody_else() {
    // Of the 24 GiB that are free, a VM may take 16 that it has not touched and that its VMM has not reserved.
    let world = World::new(64 * GIB, GIB);
    world.set_pool(32 * GIB, 24 * GIB);
    let mut vm = FakeVm::new(16 * GIB, 0);
    vm.huge = true;
    world.add("a", vm);
    tell_of_processes(&world, "RssAnon: 65536 kB\n");
    let agent = start(&world);
    wait_vm(&agent, "a", "up", |vm| vm.up);
    wait("the first plan", || {
        (agent.published().get().decisions.plans > 0).then_some(())
    });
    let ask = |vm: &str, memory| -> Result<ReserveAnswer, ClientError> {
        let body = api::to_ascii_json(&ReserveRequest {
            vm: vm.to_owned(),
            memory: Bytes(memory),
            min: None,
            huge_pages: true,
            dry_run: false,
        });
        let answer = client(&world).put("fleet.reserve", Some(&body.unwrap()))?;
        Ok(serde_json::from_str(&answer.unwrap()).unwrap())
    };
    assert!(ask("large", 10 * GIB).is_err());
    // A repeated request gets the same response.
    for _ in 0..2 {
        let answer = ask("small", 6 * GIB).unwrap();
        assert_eq!(answer.firm_free_after, Bytes::gib(2));
    }
}

#[test]
fn vm_in_huge_pages_is_left_alone() {
    let world = World::new(16 * GIB, GIB);
    set_of(&world, &["a", "b", "c", "huge"], 2);
    world.change("huge", |vm| vm.huge = true);
    // The VMM's own memory, not guest memory.
    tell_of_processes(&world, "RssAnon: 65536 kB\n");
    let agent = start(&world);
    let vm = wait_vm(&agent, "huge", "known", |vm| vm.interlock.is_some());
    assert_eq!(vm.interlock.as_deref(), Some("huge-pages"));
    assert!(vm.explanation.contains("huge pages"), "{}", vm.explanation);
    wait("the others give", || {
        (world.vm("a").target > 0).then_some(())
    });
    assert!(world.vm("huge").resizes.is_empty());
}

#[test]
fn host_that_cannot_be_read_is_unknown_and_promises_nothing() {
    let world = World::new(16 * GIB, 0);
    let mut config = agent_config(&world);
    config.planning.admission.facts_age_max = Millis(500);
    let agent = start_with(&world, config);
    reserve(&world, "a", GIB, GIB).unwrap();
    fs::rename(
        world.path().join("proc/meminfo"),
        world.path().join("meminfo"),
    )
    .unwrap();
    wait("unknown", || {
        let state = agent.published().get().status.host.state;
        (state == PublishedState::Unknown).then_some(())
    });
    let Err(ClientError::Server(error)) = reserve(&world, "b", GIB, GIB) else {
        panic!("promised");
    };
    let chain: Vec<&str> = error.chain().collect();
    assert_eq!(error.status, 409);
    assert!(chain[1].contains("could not be read"), "{chain:?}");
    fs::rename(
        world.path().join("meminfo"),
        world.path().join("proc/meminfo"),
    )
    .unwrap();
    reserve(&world, "b", GIB, GIB).unwrap();
}

#[test]
fn guest_that_falls_silent_while_it_is_pressed_gets_its_memory_back() {
    let world = World::new(16 * GIB, GIB);
    set_of(&world, &["a", "b", "c", "d"], 1);
    let mut config = agent_config(&world);
    config.planning.control.sample_age_max = Millis::seconds(2);
    let agent = start_with(&world, config);
    wait("a balloon", || (world.vm("a").target > 0).then_some(()));
    world.change("a", |vm| vm.talks = false);
    wait("memory given back", || {
        (world.vm("a").target == 0).then_some(())
    });
    let vm = wait_vm(&agent, "a", "still level 1", |vm| vm.target == Bytes::ZERO);
    assert_eq!(vm.level, 1);
    assert!(vm.up);
}

#[test]
fn second_agent_with_the_same_folder_is_refused_by_name() {
    let world = World::new(16 * GIB, 0);
    let _first = start(&world);
    let mut config = agent_config(&world);
    config.agent.socket = world.path().join("run/second.sock");
    let second = Agent::start(AgentOptions {
        config,
        file: None,
        host: world.files(),
        store: None,
    });
    assert!(
        matches!(second, Err(AgentError::Taken { .. })),
        "{second:?}"
    );
}

#[test]
fn vm_that_another_agent_serves_is_left_to_it() {
    let world = World::new(16 * GIB, 0);
    set_of(&world, &["a"], 2);
    let first = start(&world);
    wait_vm(&first, "a", "up", |vm| vm.up);
    let mut config = agent_config(&world);
    config.agent.socket = world.path().join("run/second.sock");
    config.agent.state_dir = world.path().join("second");
    let second = start_with(&world, config);
    let other = api::Client::new(world.path().join("run/second.sock")).with_timeout(Some(DEADLINE));
    wait("refusal", || {
        let page = other.get("fleet.events").unwrap().unwrap();
        page.contains("another agent serves it already")
            .then_some(())
    });
    assert!(status_of(&second, "a").is_none());
    drop(first);
    wait_vm(&second, "a", "taken over", |vm| vm.up);
}

#[test]
fn nothing_is_promised_before_every_vm_is_known_and_the_answer_says_when() {
    let world = World::new(16 * GIB, 0);
    set_of(&world, &["a"], 2);
    world.change("a", |vm| vm.fault = Fault::Hang);
    let mut config = agent_config(&world);
    config.planning.control.sample_deadline = Millis::seconds(5);
    config.planning.control.sample = Millis::seconds(1);
    let agent = start_with(&world, config);
    wait_vm(&agent, "a", "found", |vm| vm.missed == 0);
    let Err(ClientError::Server(error)) = reserve(&world, "b", GIB, GIB) else {
        panic!("promised");
    };
    let chain: Vec<&str> = error.chain().collect();
    assert!(chain[1].contains("retry in"), "{chain:?}");
    wait_vm(&agent, "a", "missed", |vm| vm.missed > 0);
    wait("a promise", || reserve(&world, "b", GIB, GIB).ok());
}

#[test]
fn what_can_never_fit_is_refused_for_good() {
    let world = World::new(16 * GIB, 0);
    let _agent = start(&world);
    let Err(ClientError::Server(error)) = reserve(&world, "big", 99 * GIB, 99 * GIB) else {
        panic!("promised");
    };
    assert_eq!(error.status, 422);
}

#[test]
fn agent_that_leaves_memory_taken_does_not_end_well() {
    for refuses in [false, true] {
        let world = World::new(16 * GIB, GIB);
        set_of(&world, &["a", "b", "c", "d"], 2);
        let mut config = agent_config(&world);
        config.agent.on_stop = crate::agent_config::OnStop::Restore;
        let agent = start_with(&world, config);
        wait("a balloon", || (world.vm("a").target > 0).then_some(()));
        world.change("a", |vm| vm.refuses_balloon = refuses);
        match agent.stop() {
            Err(StopError::NotRestored { vms }) => assert!(refuses && vms == ["a"], "{vms:?}"),
            ended => assert!(!refuses, "{ended:?}"),
        }
        for name in ["b", "c", "d"] {
            assert_eq!(world.vm(name).target, 0);
        }
    }
}

#[test]
fn limit_of_the_group_that_vmms_are_in_bounds_promises_without_being_named() {
    let world = World::new(16 * GIB, 0);
    set_of(&world, &["a"], 2);
    world.change("a", |vm| vm.resident = 512 * MIB);
    let pid = std::process::id();
    let group = world.path().join("cgroup/vms");
    fs::create_dir_all(group.join("a")).unwrap();
    for (file, text) in [
        ("memory.max", format!("{}\n", 2 * GIB)),
        ("memory.current", format!("{}\n", 512 * MIB)),
        ("memory.stat", "inactive_file 0\n".to_owned()),
        ("a/memory.max", "max\n".to_owned()),
        ("a/cgroup.procs", format!("{pid}\n")),
    ] {
        fs::write(group.join(file), text).unwrap();
    }
    let process = world.path().join(format!("proc/{pid}/cgroup"));
    fs::write(process, "0::/vms/a\n").unwrap();
    let agent = start(&world);
    wait("the group", || {
        let facts = agent.published().get().status.host.facts;
        facts
            .cgroup
            .map(|group| assert_eq!(group.limit, Bytes(2 * GIB)))
    });
    let Err(ClientError::Server(error)) = reserve(&world, "large", 8 * GIB, 8 * GIB) else {
        panic!("promised");
    };
    assert_eq!(error.status, 422);
    reserve(&world, "small", GIB, GIB / 2).unwrap();
}

#[test]
fn pin_holds_for_the_next_agent() {
    let world = World::new(16 * GIB, 0);
    set_of(&world, &["a", "b"], 2);
    let agent = start(&world);
    wait_vm(&agent, "a", "up", |vm| vm.up);
    client(&world)
        .put("fleet.pin", Some(r#"{"vm":"a","pinned":true}"#))
        .unwrap();
    drop(agent);
    world.set_others(8 * GIB);
    let agent = start(&world);
    let pinned = |vm: &VmStatus| vm.interlock.as_deref() == Some("pinned");
    wait_vm(&agent, "a", "pinned", pinned);
    wait("the other gives", || {
        (world.vm("b").target > 0).then_some(())
    });
    assert!(world.vm("a").resizes.is_empty());
    client(&world)
        .put("fleet.pin", Some(r#"{"vm":"a","pinned":false}"#))
        .unwrap();
    wait_vm(&agent, "a", "unpinned", |vm| !pinned(vm));
}

#[test]
fn agent_that_restores_leaves_alone_what_is_pinned() {
    let world = World::new(16 * GIB, GIB);
    set_of(&world, &["a", "b", "c", "d"], 2);
    let mut config = agent_config(&world);
    config.agent.on_stop = crate::agent_config::OnStop::Restore;
    let agent = start_with(&world, config);
    wait("balloons", || {
        (world.vm("a").target > 0 && world.vm("b").target > 0).then_some(())
    });
    client(&world)
        .put("fleet.pin", Some(r#"{"vm":"a","pinned":true}"#))
        .unwrap();
    wait_vm(&agent, "a", "pinned", |vm| {
        vm.interlock.as_deref() == Some("pinned") && vm.target.0 == world.vm("a").target
    });
    let held = world.vm("a").target;
    agent.stop().unwrap();
    assert_eq!((world.vm("a").target, world.vm("b").target), (held, 0));
}
