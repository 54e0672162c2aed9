#![allow(clippy::unwrap_used)]
//! Tests whole agents that share one in-memory store.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::super::fake_vmm::{DEADLINE, FakeVm, GIB, MIB, World, wait};
use super::super::*;
use crate::admission::Request;
use crate::agent_config::AgentConfig;
use crate::cluster::{FleetPicture, Keys, PlaceError, Placed, Placer, Wanted};
use crate::config::{Config, Millis};
use crate::model::Bytes;
use crate::reservations::ReservationPhase;
use crate::store::{Committed, MemoryStore, Revision, Store, Txn, Write};

const CALL: Duration = Duration::from_secs(2);

fn start(world: &World, store: &Arc<MemoryStore>, host: &str) -> Agent {
    let mut config = AgentConfig::default();
    config.agent.socket = world.path().join("run/agent.sock");
    config.agent.state_dir = world.path().join("state");
    config.agent.scan = Millis(200);
    config.agent.host = Millis(100);
    config.discovery.sockets = vec![format!("{}/vms/*.sock", world.path().display())];
    config.planning.control.sample = Millis(200);
    config.planning.host.reserve = crate::model::Amount::Bytes(Bytes::ZERO);
    config.store.host = Some(host.to_owned());
    config.store.lease = Millis::seconds(3);
    let store: Arc<dyn Store> = Arc::<MemoryStore>::clone(store);
    Agent::start(AgentOptions {
        config,
        file: None,
        host: world.files(),
        store: Some(store),
    })
    .unwrap()
}

fn keys() -> Keys {
    Keys::new("/ch-fleet").unwrap()
}

fn place(store: &MemoryStore, vm: &str, seed: u64) -> Result<Placed, PlaceError> {
    let wanted = Wanted {
        vm: vm.to_owned(),
        request: Request {
            min: Bytes::gib(1),
            max: Bytes::gib(1),
        },
        placer: "test".to_owned(),
    };
    Placer::new(store, keys(), Config::default(), CALL, seed)
        .reserve(&wanted, Instant::now() + DEADLINE)
}

fn picture(store: &MemoryStore) -> FleetPicture {
    FleetPicture::read(store, &keys(), Instant::now() + CALL).unwrap()
}

fn wait_registered(store: &MemoryStore, hosts: usize) {
    wait("the hosts", || {
        let picture = picture(store);
        let there = picture.hosts.iter().filter(|host| host.is_there());
        (there.count() == hosts).then_some(())
    });
}

#[test]
fn promise_from_afar_is_the_hosts_own_until_its_vm_runs() {
    let (world, store) = (World::new(16 * GIB, 0), Arc::<MemoryStore>::default());
    let agent = start(&world, &store, "h1");
    wait_registered(&store, 1);
    let placed = place(&store, "new", 1).unwrap();
    assert_eq!(placed.host, "h1");
    let status = agent.published().get().status.clone();
    assert_eq!(status.reservations.len(), 1);
    assert!(status.reservations[0].reservation.remote);
    assert_eq!(status.reservations[0].reservation.id, placed.id);
    // A client that starts the VM there requests the same reservation and receives it.
    let body = api::to_ascii_json(&ReserveRequest {
        vm: "new".to_owned(),
        memory: Bytes::gib(1),
        min: None,
        huge_pages: false,
        dry_run: false,
    })
    .unwrap();
    let answer = api::Client::new(world.path().join("run/agent.sock"))
        .with_timeout(Some(DEADLINE))
        .put("fleet.reserve", Some(&body))
        .unwrap();
    let answer: ReserveAnswer = serde_json::from_str(&answer.unwrap()).unwrap();
    assert_eq!(answer.reservation.unwrap().id, placed.id);
    // The name is taken, and the response states this.
    let Err(PlaceError::Refused(refusal)) = place(&store, "new", 2) else {
        panic!("the name is taken");
    };
    assert!(
        refusal.said["h1"].contains("has a reservation"),
        "{refusal}"
    );
    world.add("new", FakeVm::new(GIB, 100 * MIB));
    wait("the VM's promise to be its own", || {
        let status = agent.published().get().status.clone();
        let running = status.reservations.first()?.reservation.phase == ReservationPhase::Running;
        let line = picture(&store).holder(&placed.id).is_some();
        (running && !line).then_some(())
    });
    wait("the host in step", || {
        let store = agent.published().get().status.store.clone()?;
        (store.registered && store.up).then_some(())
    });
    drop(agent);
    assert!(picture(&store).hosts.is_empty(), "it left");
}

#[test]
fn agent_works_on_without_its_store_and_is_back_with_its_promises() {
    let (world, store) = (World::new(16 * GIB, 0), Arc::<MemoryStore>::default());
    let agent = start(&world, &store, "h1");
    wait_registered(&store, 1);
    let placed = place(&store, "new", 1).unwrap();
    store.set_down(true);
    wait("the fault to be seen", || {
        let store = agent.published().get().status.store.clone()?;
        (!store.up && store.error.is_some()).then_some(())
    });
    let before = agent.published().get().decisions.plans;
    wait("plans without a store", || {
        (agent.published().get().decisions.plans > before).then_some(())
    });
    assert_eq!(agent.published().get().status.reservations.len(), 1);
    store.advance(Duration::from_secs(60));
    store.set_down(false);
    wait("the promise in the store again", || {
        (picture(&store).holder(&placed.id)?.host == "h1").then_some(())
    });
    let store_status = wait("health", || {
        let store = agent.published().get().status.store.clone()?;
        (store.up && store.leases == 2).then_some(store)
    });
    assert_eq!(store_status.leases_lost, 1);
    Placer::new(&*store, keys(), Config::default(), CALL, 5)
        .release(&placed.id, Instant::now() + DEADLINE)
        .unwrap();
    wait("the promise to be given back", || {
        let status = agent.published().get().status.clone();
        status.reservations.is_empty().then_some(())
    });
}

#[test]
fn promises_at_the_socket_and_from_afar_come_out_of_one_ledger() {
    // A tenth is kept free, so 9 VMs fit on each host.
    let worlds = [World::new(10 * GIB, 0), World::new(10 * GIB, 0)];
    let store = Arc::<MemoryStore>::default();
    let agents = [
        start(&worlds[0], &store, "h1"),
        start(&worlds[1], &store, "h2"),
    ];
    wait_registered(&store, 2);
    let got: Vec<bool> = thread::scope(|scope| {
        let far = (0..20u64).map(|n| {
            let store = &store;
            scope.spawn(move || place(store, &format!("far-{n}"), n * 7919 + 1).is_ok())
        });
        let near = (0..20).map(|n| {
            let socket = worlds[n % 2].path().join("run/agent.sock");
            scope.spawn(move || {
                let body = api::to_ascii_json(&ReserveRequest {
                    vm: format!("near-{n}"),
                    memory: Bytes::gib(1),
                    min: Some(Bytes::gib(1)),
                    huge_pages: false,
                    dry_run: false,
                })
                .unwrap();
                api::Client::new(socket)
                    .with_timeout(Some(DEADLINE))
                    .put("fleet.reserve", Some(&body))
                    .is_ok()
            })
        });
        let all: Vec<_> = far.chain(near).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let sold = got.iter().filter(|got| **got).count();
    let held: usize = agents
        .iter()
        .map(|agent| agent.published().get().status.reservations.len())
        .sum();
    assert_eq!((sold, held), (18, 18));
}

/// Writes a line into a host's book, as any client with access to the store can.
fn write_line(store: &MemoryStore, host: &str, line: &serde_json::Value) {
    let key = keys().book(host);
    wait("the book stays as it is for a moment", || {
        let until = Instant::now() + CALL;
        let found = store.list(&key, until).unwrap().pairs.pop();
        let mut book: serde_json::Value = match &found {
            Some(pair) => serde_json::from_slice(&pair.value).unwrap(),
            None => serde_json::json!({ "entries": [] }),
        };
        book["entries"].as_array_mut().unwrap().push(line.clone());
        let txn = Txn {
            expect: vec![(key.clone(), found.map_or(Revision(0), |pair| pair.changed))],
            writes: vec![Write::Put {
                key: key.clone(),
                value: serde_json::to_vec(&book).unwrap(),
                lease: None,
            }],
        };
        match store.commit(&txn, until).unwrap() {
            Committed::Yes(_) => Some(()),
            Committed::Conflict => None,
        }
    });
}

#[test]
fn line_with_the_id_of_another_reservation_gets_a_no() {
    let (world, store) = (World::new(16 * GIB, 0), Arc::<MemoryStore>::default());
    let agent = start(&world, &store, "h1");
    wait_registered(&store, 1);
    let remote = place(&store, "placed", 1).unwrap().id;
    let body = r#"{"vm":"local","memory":"1GiB"}"#;
    let socket = world.path().join("run/agent.sock");
    let answer = api::Client::new(socket).put("fleet.reserve", Some(body));
    let answer: ReserveAnswer = serde_json::from_str(&answer.unwrap().unwrap()).unwrap();
    let local = answer.reservation.unwrap().id;
    let before = agent.published().get().status.reservations.len();
    for (id, vm) in [(&local, "thief"), (&local, "local"), (&remote, "thief")] {
        let line = serde_json::json!({
            "id": id, "vm": vm, "min": "8GiB", "max": "8GiB", "promise": "8GiB", "placer": vm,
            "answer": { "is": "asked" },
        });
        write_line(&store, "h1", &line);
        wait("a no", || {
            let key = keys().book("h1");
            let pair = store
                .list(&key, Instant::now() + CALL)
                .unwrap()
                .pairs
                .pop()?;
            let book: serde_json::Value = serde_json::from_slice(&pair.value).unwrap();
            let mut lines = book["entries"].as_array().unwrap().iter();
            let answer = &lines.find(|line| line["placer"] == vm && line["id"] == **id)?["answer"];
            (answer["is"] == "refused").then(|| {
                assert!(
                    answer["because"]
                        .to_string()
                        .contains("is already in use on this host"),
                    "{answer}"
                );
            })
        });
    }
    let status = agent.published().get().status.clone();
    assert_eq!(status.reservations.len(), before);
    let most = status
        .reservations
        .iter()
        .map(|held| held.reservation.configured)
        .max();
    assert_eq!(most, Some(Bytes::gib(1)));
}
