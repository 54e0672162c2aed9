#![allow(clippy::unwrap_used)]
//! Tests the steps alone, and with a fake VMM.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use api::ClientError;
use rustix::fs::{FlockOperation, flock};
use strum::VariantArray as _;

use super::step::{EndOrder, Save, SeenVm, Sight, Step};
use crate::agent::fake_vmm::{DEADLINE, FakeVm, Fault, GIB, World, wait};
use crate::agent::{Agent, AgentOptions, StandbyStatus, WakeAnswer};
use crate::agent_config::{AgentConfig, VmRule};
use crate::config::{Millis, PolicyConfig};
use crate::standby::Phase;

/// Every combination of what a step depends on.
fn each(check: impl Fn(&Sight<'_>, &Step)) {
    let saves = [
        Save::Unknown,
        Save::Ordered,
        Save::Ended(Ok(())),
        Save::Ended(Err("disk full".to_owned())),
    ];
    let bools = [false, true];
    let ends = [
        EndOrder::Unknown,
        EndOrder::InProgress,
        EndOrder::Paused,
        EndOrder::Resumed,
    ];
    let vm = |bits: u8| SeenVm {
        runs: bits & 1 != 0,
        is_paused: bits & 2 != 0,
        is_busy: bits & 4 != 0,
    };
    let vms: Vec<Option<SeenVm>> = [None]
        .into_iter()
        .chain((0..8).map(|bits| Some(vm(bits))))
        .collect();
    for &phase in Phase::VARIANTS {
        for save in &saves {
            for bits in 0..64_u8 {
                for vm in &vms {
                    for (age_ms, tried_ms_ago) in
                        [(0, None), (60_000, Some(0)), (60_000, Some(60_000))]
                    {
                        let bit = |at: u8| bools[usize::from(bits >> at & 1)];
                        let sight = Sight {
                            phase,
                            age_ms,
                            save,
                            end: ends[usize::from(bits >> 4)],
                            tried_ms_ago,
                            has_ended: bit(0),
                            is_complete: bit(1),
                            is_locked: bit(2),
                            is_abandoned: bit(3),
                            vm: *vm,
                        };
                        check(&sight, &sight.step());
                    }
                }
            }
        }
    }
}

/// Whether the VM is the folder.
fn is_folder(phase: Phase) -> bool {
    matches!(phase, Phase::Ending | Phase::Standby | Phase::Waking)
}

#[test]
fn process_is_ended_only_if_the_folder_is_the_vm_and_resumed_only_if_it_is_not() {
    each(|sight, step| match step {
        Step::End | Step::Kill => {
            assert_eq!(sight.phase, Phase::Ending, "{sight:?}");
            assert!(!sight.vm.is_some_and(|vm| vm.runs), "{sight:?}");
            assert!(
                *step == Step::End || sight.end == EndOrder::Paused,
                "{sight:?}"
            );
        }
        Step::Resume => assert_eq!(sight.phase, Phase::Running, "{sight:?}"),
        _ => {}
    });
}

#[test]
fn folder_is_removed_only_if_the_process_is_the_vm() {
    each(|sight, step| {
        if let Step::Remove(_) = step {
            assert!(!is_folder(sight.phase), "{sight:?}");
            let runs = sight.vm.is_some_and(|vm| vm.runs);
            assert!(
                sight.has_ended || sight.phase == Phase::Running && runs,
                "{sight:?}"
            );
        }
    });
}

#[test]
fn folder_becomes_the_vm_only_when_it_is_complete_and_the_process_cannot_have_run_since() {
    each(|sight, step| {
        if let Step::Become(phase, _) = step
            && is_folder(*phase)
            && !is_folder(sight.phase)
        {
            assert_eq!(sight.phase, Phase::Saving, "{sight:?}");
            assert_eq!(*phase, Phase::Ending, "{sight:?}");
            assert_eq!(*sight.save, Save::Ended(Ok(())), "{sight:?}");
        }
    });
}

#[test]
fn vm_is_in_standby_only_if_this_agent_found_it_paused_and_ended_it() {
    each(|sight, step| {
        if let Step::Become(Phase::Standby, _) = step
            && sight.phase != Phase::Waking
        {
            assert_eq!(sight.phase, Phase::Ending, "{sight:?}");
            assert_eq!(sight.end, EndOrder::Paused, "{sight:?}");
            assert!(sight.has_ended, "{sight:?}");
            assert!(!sight.vm.is_some_and(|vm| vm.runs), "{sight:?}");
        }
    });
}

#[test]
fn folder_of_a_vm_that_was_resumed_is_outdated_even_if_the_vm_has_ended() {
    each(|sight, step| {
        let runs = sight.vm.is_some_and(|vm| vm.runs);
        if sight.phase == Phase::Ending && (sight.end == EndOrder::Resumed || runs) {
            assert!(matches!(step, Step::Become(Phase::Running, _)), "{sight:?}");
        }
    });
}

#[test]
fn every_phase_but_standby_comes_to_an_end() {
    // A VMM that responds, and one that has ended.
    each(|sight, step| {
        let rests =
            sight.phase == Phase::Standby || sight.phase == Phase::Waking && sight.is_locked;
        let is_ending = sight.phase == Phase::Ending && sight.end == EndOrder::InProgress;
        let waits = *sight.save == Save::Ordered && sight.phase == Phase::Saving
            || is_ending && sight.tried_ms_ago == Some(0);
        if sight.has_ended && !rests && !waits {
            let ends = matches!(step, Step::Become(..) | Step::Remove(_) | Step::GiveUp(_));
            assert!(ends, "{sight:?}: {step:?}");
        }
        // A VMM that does not respond any more.
        let was_paused = sight.phase == Phase::Ending && sight.end == EndOrder::Paused;
        if was_paused && sight.tried_ms_ago == Some(60_000) {
            assert_ne!(*step, Step::Wait, "{sight:?}");
        }
    });
}

fn config(world: &World) -> AgentConfig {
    let mut config = AgentConfig::default();
    config.agent.socket = world.path().join("run/agent.sock");
    config.agent.state_dir = world.path().join("state");
    config.agent.standby_dir = Some(world.path().join("standby"));
    config.agent.scan = Millis(100);
    config.agent.host = Millis(50);
    config.discovery.sockets = vec![format!("{}/vms/*.sock", world.path().display())];
    config.planning.control.sample = Millis(100);
    config
}

fn start(world: &World) -> Agent {
    start_with(world, config(world))
}

fn start_with(world: &World, config: AgentConfig) -> Agent {
    let agent = Agent::start(AgentOptions {
        config,
        file: None,
        host: world.files(),
        store: None,
    });
    agent.unwrap()
}

fn ask(world: &World, name: &str, body: &str) -> Result<Option<String>, ClientError> {
    let client = api::Client::new(world.path().join("run/agent.sock"));
    client.with_timeout(Some(DEADLINE)).put(name, Some(body))
}

/// The status of a refusal and its chain.
fn refused(answer: Result<Option<String>, ClientError>) -> (u16, String) {
    match answer {
        Err(ClientError::Server(error)) => {
            let chain: Vec<&str> = error.chain().collect();
            (error.status, chain.join(": "))
        }
        other => panic!("{other:?}"),
    }
}

fn wait_up(agent: &Agent, name: &str) {
    wait("a sample", || {
        let snapshot = agent.published().get();
        let mut vms = snapshot.status.vms.iter();
        vms.any(|vm| vm.vm == name && vm.up && snapshot.decisions.plans > 0)
            .then_some(())
    });
}

fn entry(agent: &Agent) -> Option<StandbyStatus> {
    agent.published().get().status.standby.first().cloned()
}

fn wait_phase(agent: &Agent, phase: Option<Phase>) {
    wait(&format!("{phase:?}"), || {
        let now = entry(agent).map(|entry| entry.phase);
        (now == phase.map(Some)).then_some(())
    });
}

fn last_text(agent: &Agent) -> String {
    agent.published().journal.last_of("standby").unwrap()
}

const VM: &str = r#"{"vm":"a"}"#;

#[test]
fn saved_vm_leaves_the_books_and_its_name_is_taken() {
    let world = World::new(16 * GIB, 0);
    let agent = awake(&world);
    ask(&world, "fleet.standby", VM).unwrap();
    wait_phase(&agent, Some(Phase::Standby));
    let entry = entry(&agent).unwrap();
    assert_eq!((entry.memory.0, entry.fault), (4 * GIB, None));
    assert!(entry.disk.0 > 0);
    wait("the VM gone", || {
        let status = &agent.published().get().status;
        (status.vms.is_empty() && status.reservations.is_empty()).then_some(())
    });
    let again = r#"{"vm":"a","memory":1073741824}"#;
    let (status, text) = refused(ask(&world, "fleet.reserve", again));
    assert_eq!(status, 409);
    assert!(text.contains("is in standby: wake or discard it"), "{text}");
    // The next agent knows it, too.
    drop(agent);
    let agent = start(&world);
    wait_phase(&agent, Some(Phase::Standby));
    ask(&world, "fleet.discard", VM).unwrap();
    wait_phase(&agent, None);
    assert_eq!(refused(ask(&world, "fleet.discard", VM)).0, 404);
}

#[test]
fn vm_that_cannot_be_saved_runs_again_and_leaves_no_folder() {
    let world = World::new(16 * GIB, 0);
    let vm = FakeVm::new(4 * GIB, GIB);
    world.add(
        "a",
        FakeVm {
            refuses_snapshot: true,
            refusals: 2,
            ..vm
        },
    );
    let agent = start(&world);
    wait_up(&agent, "a");
    ask(&world, "fleet.standby", VM).unwrap();
    wait("the end of it", || {
        let is_over = entry(&agent).is_none() && !world.vm("a").paused;
        is_over.then_some(())
    });
    assert_eq!(last_text(&agent), "snapshot removed: the VM runs");
    let left = fs::read_dir(world.path().join("standby")).unwrap();
    let left = left.filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        !name.to_string_lossy().starts_with('.')
    });
    assert_eq!(left.count(), 0);
    // Nothing else is left: the agent manages it again.
    wait("no interlock", || {
        let snapshot = agent.published().get();
        snapshot.status.vms[0].interlock.is_none().then_some(())
    });
}

#[test]
fn vm_whose_agent_ended_while_it_was_saved_runs_again() {
    let world = World::new(16 * GIB, 0);
    let agent = saving(&world);
    assert_eq!(entry(&agent).unwrap().phase, Some(Phase::Saving));
    drop(agent);
    world.change("a", |vm| {
        vm.fault = Fault::None;
        vm.paused = true;
    });
    let agent = start(&world);
    wait("it runs", || {
        (!world.vm("a").paused && entry(&agent).is_none()).then_some(())
    });
}

#[test]
fn requests_that_make_no_sense_are_refused_by_name() {
    let world = World::new(16 * GIB, 0);
    let agent = awake(&world);
    let standby = |name: &str| {
        refused(ask(
            &world,
            "fleet.standby",
            &format!("{{\"vm\":{name:?}}}"),
        ))
    };
    assert_eq!(standby("b"), (404, "There is no VM \"b\"".to_owned()));
    let (status, text) = standby("../a");
    assert_eq!(status, 400);
    assert!(text.contains("plain file name"), "{text}");
    assert_eq!(refused(ask(&world, "fleet.standby", "{}")).0, 400);
    assert_eq!(refused(ask(&world, "fleet.wake", VM)).0, 404);
    assert_eq!(
        refused(ask(&world, "fleet.woken", r#"{"vm":"a","pid":1}"#)).0,
        404
    );
    world.change("a", |vm| vm.paused = true);
    wait("the pause", || {
        let snapshot = agent.published().get();
        snapshot.status.vms[0].interlock.is_some().then_some(())
    });
    let (status, text) = standby("a");
    assert_eq!((status, text.contains("paused")), (409, true), "{text}");
    drop(agent);
    let mut off = config(&world);
    off.agent.standby_dir = None;
    let _agent = start_with(&world, off);
    let (status, text) = standby("a");
    assert_eq!(status, 400);
    assert!(text.contains("agent.standby_dir"), "{text}");
}

#[test]
fn second_agent_with_the_same_standby_folder_is_refused_by_name() {
    let world = World::new(16 * GIB, 0);
    let _first = start(&world);
    let mut config = config(&world);
    config.agent.socket = world.path().join("run/second.sock");
    config.agent.state_dir = world.path().join("second");
    let second = Agent::start(AgentOptions {
        config,
        file: None,
        host: world.files(),
        store: None,
    });
    let text = second.unwrap_err().to_string();
    assert!(text.contains("standby is used by another agent"), "{text}");
}

/// An agent that manages a VM.
fn awake(world: &World) -> Agent {
    world.add("a", FakeVm::new(4 * GIB, GIB));
    let agent = start(world);
    wait_up(&agent, "a");
    agent
}

/// An agent that saves a VM which does not respond.
fn saving(world: &World) -> Agent {
    let agent = awake(world);
    world.change("a", |vm| vm.fault = Fault::Mute);
    ask(world, "fleet.standby", VM).unwrap();
    agent
}

/// An agent with a VM in standby.
fn asleep(world: &World) -> Agent {
    let agent = awake(world);
    ask(world, "fleet.standby", VM).unwrap();
    wait_phase(&agent, Some(Phase::Standby));
    wait("the VM gone", || {
        let is_gone = agent.published().get().status.vms.is_empty();
        is_gone.then_some(())
    });
    agent
}

fn lock_of(world: &World) -> PathBuf {
    world.path().join("standby/a/lock")
}

#[test]
fn vm_is_woken_once_and_sleeps_on_if_the_attempt_ends() {
    let world = World::new(16 * GIB, 0);
    let agent = asleep(&world);
    let (status, text) = refused(ask(&world, "fleet.wake", VM));
    assert_eq!((status, text.contains("Lock ")), (409, true), "{text}");
    let lock = fs::File::options()
        .write(true)
        .open(lock_of(&world))
        .unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    let answer = ask(&world, "fleet.wake", VM).unwrap().unwrap();
    let answer: WakeAnswer = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer.reservation.configured.0, 4 * GIB);
    assert_eq!(answer.snapshot, world.path().join("standby/a/snapshot"));
    assert_eq!(answer.command, ["cloud-hypervisor"]);
    for name in ["fleet.wake", "fleet.discard", "fleet.standby"] {
        let (status, text) = refused(ask(&world, name, VM));
        assert_eq!(
            (status, text.contains("waking")),
            (409, true),
            "{name}: {text}"
        );
    }
    let (status, text) = refused(ask(&world, "fleet.woken", r#"{"vm":"a","pid":1}"#));
    assert_eq!(
        (status, text.contains("did not inherit")),
        (409, true),
        "{text}"
    );
    drop(lock);
    wait_phase(&agent, Some(Phase::Standby));
    wait("the reservation released", || {
        let status = &agent.published().get().status;
        status.reservations.is_empty().then_some(())
    });
}

#[test]
fn vm_that_no_longer_fits_sleeps_on() {
    let world = World::new(16 * GIB, 0);
    let agent = asleep(&world);
    world.set_others(15 * GIB);
    let lock = fs::File::options()
        .write(true)
        .open(lock_of(&world))
        .unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    let (status, text) = refused(ask(&world, "fleet.wake", VM));
    assert_eq!((status, text.contains("refused")), (409, true), "{text}");
    assert_eq!(entry(&agent).unwrap().phase, Some(Phase::Standby));
    assert!(agent.published().get().status.reservations.is_empty());
}

#[test]
fn unusable_folder_is_shown_and_can_only_be_discarded() {
    let world = World::new(16 * GIB, 0);
    drop(asleep(&world));
    let record = world.path().join("standby/a/record.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, &text[..text.len() / 2]).unwrap();
    let agent = start(&world);
    let fault = wait("the fault", || entry(&agent)?.fault);
    assert!(fault.contains("record.json is not a record"), "{fault}");
    let lock = fs::File::options()
        .write(true)
        .open(lock_of(&world))
        .unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    let (status, text) = refused(ask(&world, "fleet.wake", VM));
    assert_eq!(
        (status, text.contains("is not a record")),
        (409, true),
        "{text}"
    );
    drop(lock);
    ask(&world, "fleet.discard", VM).unwrap();
    wait_phase(&agent, None);
}

#[test]
fn vm_that_is_idle_goes_to_standby_if_its_policy_says_so_and_no_other() {
    let world = World::new(16 * GIB, 0);
    let vm = FakeVm::new(GIB, GIB / 2);
    world.add(
        "busy",
        FakeVm {
            works: 1 << 20,
            ..vm.clone()
        },
    );
    world.add("idle-1", vm.clone());
    world.add("kept", vm);
    let mut config = config(&world);
    let policy = PolicyConfig {
        idle_standby: Millis(1000),
        ..PolicyConfig::default()
    };
    config.planning.policy.insert("sandbox".to_owned(), policy);
    config.vms = ["idle-*", "busy"]
        .map(|name| VmRule {
            name: name.to_owned(),
            policy: "sandbox".to_owned(),
        })
        .into();
    let agent = start_with(&world, config);
    wait_phase(&agent, Some(Phase::Standby));
    assert_eq!(entry(&agent).unwrap().vm, "idle-1");
    let entries = agent.published().journal.since(0).entries;
    assert!(
        entries
            .iter()
            .any(|entry| entry.vm == "idle-1" && entry.text.starts_with("idle for "))
    );
    // Their process has ended with that VM, as far as the fake host shows, but both still respond.
    let status = agent.published().get().status.clone();
    assert_eq!(status.standby.len(), 1, "{status:?}");
}

#[test]
fn vm_whose_client_kills_the_vmm_does_not_become_its_process() {
    each(|sight, step| {
        if sight.phase == Phase::Waking && sight.is_abandoned {
            let runs = matches!(step, Step::Become(Phase::Running, _));
            assert!(!runs, "{sight:?}");
        }
    });
    let failed = r#"{"vm":"a","pid":1,"failed":true}"#;
    let world = World::new(16 * GIB, 0);
    let agent = asleep(&world);
    let lock = fs::File::options()
        .write(true)
        .open(lock_of(&world))
        .unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    ask(&world, "fleet.wake", VM).unwrap();
    ask(&world, "fleet.woken", failed).unwrap();
    drop(agent);
    // The VM is its process, so it must not be killed.
    change_record(&world, |record| {
        record["phase"] = "running".into();
        record["process"]["start_ticks"] = 78.into();
    });
    let agent = start(&world);
    wait_phase(&agent, Some(Phase::Running));
    let (status, text) = refused(ask(&world, "fleet.woken", failed));
    assert_eq!(
        (status, text.contains("must not be killed")),
        (409, true),
        "{text}"
    );
    // As after the folder was removed.
    let unknown = r#"{"vm":"b","pid":1,"failed":true}"#;
    assert_eq!(refused(ask(&world, "fleet.woken", unknown)).0, 404);
}

/// Changes the record of an agent that has ended.
fn change_record(world: &World, change: impl FnOnce(&mut serde_json::Value)) {
    let path = world.path().join("standby/a/record.json");
    let mut record = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut record);
    fs::write(path, record.to_string()).unwrap();
}

#[test]
fn vm_that_ended_after_another_agent_had_saved_it_is_left_to_the_operator() {
    let world = World::new(16 * GIB, 0);
    drop(asleep(&world));
    change_record(&world, |record| record["phase"] = "ending".into());
    let agent = start(&world);
    let fault = wait("the fault", || entry(&agent)?.fault);
    assert!(fault.contains("may have run"), "{fault}");
    assert_eq!(entry(&agent).unwrap().phase, Some(Phase::Ending));
    let _lock = locked(&world);
    let (status, text) = refused(ask(&world, "fleet.wake", VM));
    assert_eq!((status, text.contains("--force")), (409, true), "{text}");
    ask(&world, "fleet.wake", FORCED).unwrap();
    wait_phase(&agent, Some(Phase::Waking));
    assert_eq!(entry(&agent).unwrap().fault, None);
}

const FORCED: &str = r#"{"vm":"a","force":true}"#;

fn locked(world: &World) -> fs::File {
    let lock = fs::File::options()
        .write(true)
        .open(lock_of(world))
        .unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    lock
}

#[test]
fn vm_whose_disk_was_changed_is_woken_by_force_alone() {
    let world = World::new(16 * GIB, 0);
    let disk = world.path().join("disk.raw");
    fs::write(&disk, "before").unwrap();
    world.add(
        "a",
        FakeVm {
            disk: Some(disk.clone()),
            ..FakeVm::new(4 * GIB, GIB)
        },
    );
    let agent = start(&world);
    wait_up(&agent, "a");
    ask(&world, "fleet.standby", VM).unwrap();
    wait_phase(&agent, Some(Phase::Standby));
    fs::write(&disk, "changed").unwrap();
    let _lock = locked(&world);
    let (status, text) = refused(ask(&world, "fleet.wake", VM));
    let is_named = text.contains("disk.raw was changed") && text.contains("--force");
    assert_eq!((status, is_named), (409, true), "{text}");
    ask(&world, "fleet.wake", FORCED).unwrap();
}

#[test]
fn vm_whose_snapshot_cannot_be_used_runs_again_while_its_vmm_lives() {
    each(|sight, step| {
        let is_known = sight.end == EndOrder::Unknown && !sight.has_ended;
        if sight.phase == Phase::Ending && is_known && !sight.is_complete {
            assert!(matches!(step, Step::Become(Phase::Running, _)), "{sight:?}");
        }
    });
}

#[test]
fn snapshot_that_could_not_be_read_for_a_while_is_used_again() {
    let world = World::new(16 * GIB, 0);
    drop(asleep(&world));
    let (there, away) = (
        world.path().join("standby/a/snapshot"),
        world.path().join("away"),
    );
    fs::rename(&there, &away).unwrap();
    let agent = start(&world);
    wait("the fault", || entry(&agent)?.fault);
    fs::rename(&away, &there).unwrap();
    wait("its end", || entry(&agent)?.fault.is_none().then_some(()));
}

/// Whether a VM that is in `ending` when an agent starts is ended.
fn is_ended_by_next_agent(paused: bool) -> bool {
    let world = World::new(16 * GIB, 0);
    let agent = saving(&world);
    drop(agent);
    for name in ["config.json", "state.json"] {
        fs::write(world.path().join("standby/a/snapshot").join(name), "{}").unwrap();
    }
    change_record(&world, |record| record["phase"] = "ending".into());
    world.change("a", |vm| {
        vm.fault = Fault::None;
        vm.paused = paused;
    });
    let agent = start(&world);
    wait("the end", || {
        let text = agent.published().journal.last_of("standby")?;
        let removed = text.starts_with("snapshot removed: the VM runs");
        (removed || text.starts_with("in standby")).then_some(!removed)
    })
}

#[test]
fn next_agent_ends_a_paused_vm_and_leaves_one_that_was_resumed() {
    assert!(is_ended_by_next_agent(true));
    assert!(!is_ended_by_next_agent(false));
}

fn start_error(config: AgentConfig, world: &World) -> String {
    let agent = Agent::start(AgentOptions {
        config,
        file: None,
        host: world.files(),
        store: None,
    });
    let error = agent.unwrap_err();
    api::error_line(&error)
}

#[test]
fn folder_that_other_users_may_write_to_is_rejected() {
    let world = World::new(16 * GIB, 0);
    drop(start(&world));
    for mode in [0o771, 0o713] {
        let dir = world.path().join("standby");
        fs::set_permissions(dir, fs::Permissions::from_mode(mode)).unwrap();
        let text = start_error(config(&world), &world);
        assert!(text.contains("only they may write"), "{mode:o}: {text}");
    }
}

#[test]
fn process_of_another_boot_has_ended() {
    let world = World::new(16 * GIB, 0);
    let agent = saving(&world);
    drop(agent);
    world.change("a", |vm| vm.fault = Fault::None);
    change_record(&world, |record| {
        record["phase"] = "ending".into();
        record["boot_id"] = "other".into();
    });
    let agent = start(&world);
    let fault = wait("the fault", || entry(&agent)?.fault);
    assert!(fault.contains("may have run"), "{fault}");
    assert!(!world.vm("a").ended);
}

#[test]
fn agent_with_dry_run_takes_no_step() {
    let world = World::new(16 * GIB, 0);
    drop(asleep(&world));
    change_record(&world, |record| record["phase"] = "running".into());
    let mut config = config(&world);
    config.agent.dry_run = true;
    let agent = start_with(&world, config);
    wait_phase(&agent, Some(Phase::Running));
    for name in ["fleet.wake", "fleet.discard"] {
        let (status, text) = refused(ask(&world, name, VM));
        assert_eq!((status, text.contains("dry_run")), (409, true), "{text}");
    }
    assert!(lock_of(&world).exists());
}

#[test]
fn socket_of_a_killed_vmm_is_not_in_the_way() {
    let world = World::new(16 * GIB, 0);
    let agent = asleep(&world);
    drop(UnixListener::bind(world.socket_of("a")).unwrap());
    wait("the socket", || {
        let status = &agent.published().get().status;
        status.vms.first().filter(|vm| !vm.up).map(|_| ())
    });
    let lock = fs::File::options()
        .write(true)
        .open(lock_of(&world))
        .unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    ask(&world, "fleet.wake", VM).unwrap();
}
