#![allow(clippy::unwrap_used)]
//! Tests hosts and placers with an in-memory store that simulates cluster failures.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::admission::{HostHeadroom, Request};
use crate::config::Config;
use crate::model::{Bytes, Ledger};
use crate::placement::HostRefusal;
use crate::store::{Fault, MemoryStore};

const LEASE: Duration = Duration::from_secs(10);
const CALL: Duration = Duration::from_secs(2);
const SIZE: Bytes = Bytes::gib(1);

/// A generous deadline, because test machines are shared.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn keys() -> Keys {
    Keys::new("/fleet").unwrap()
}

/// A host with `places` for VMs of [`SIZE`].
struct Host {
    member: Member,
    places: u64,
    held: Vec<HeldReservation>,
    said_no: usize,
    silent: bool,
    learning: bool,
}

impl Host {
    fn new(name: &str, places: u64) -> Self {
        Self {
            member: member(name, name),
            places,
            held: Vec::new(),
            said_no: 0,
            silent: false,
            learning: false,
        }
    }

    fn account(&mut self, view: StoreView) -> HostReport {
        if let Some(lines) = &view.lines {
            self.held
                .retain(|held| held.starting || lines.contains(&held.id));
        }
        let mut account = HostReport {
            ready: !self.learning,
            ..HostReport::default()
        };
        for entry in view.asked {
            if self.held.iter().any(|held| held.id == entry.id) {
                continue;
            }
            if self.held.len() as u64 >= self.places {
                self.said_no += 1;
                account.refused.insert(entry.id, "full".to_owned());
                continue;
            }
            self.held.push(HeldReservation {
                id: entry.id,
                vm: entry.vm,
                max: entry.max,
                promise: entry.promise,
                starting: false,
            });
        }
        account.held.clone_from(&self.held);
        account.headroom = headroom(self.places, self.held.len() as u64);
        account
    }

    fn round(&mut self, store: &MemoryStore) -> Result<Round, MemberError> {
        let mut member = std::mem::replace(&mut self.member, member("", ""));
        let result = member.round(store, &mut |view| {
            (!self.silent).then(|| self.account(view))
        });
        self.member = member;
        result
    }
}

fn member(name: &str, instance: &str) -> Member {
    Member::new(
        keys(),
        (name.to_owned(), instance.to_owned()),
        (LEASE, CALL, Duration::from_secs(15)),
    )
}

fn headroom(places: u64, held: u64) -> HostHeadroom {
    let usable = Bytes::gib(100);
    // Admission keeps a tenth free.
    let firm_free = Bytes::gib(10 + places - held);
    HostHeadroom {
        ledger: Ledger {
            usable,
            available: firm_free,
            promised: Bytes::gib(held),
            firm_free,
            ..Ledger::default()
        },
        ..HostHeadroom::default()
    }
}

fn placer(store: &MemoryStore, seed: u64) -> Placer<'_> {
    Placer::new(store, keys(), Config::default(), CALL, seed)
}

fn wanted(vm: &str) -> Wanted {
    Wanted {
        vm: vm.to_owned(),
        request: Request {
            min: SIZE,
            max: SIZE,
        },
        placer: "test".to_owned(),
    }
}

/// Runs the hosts' rounds until `done`, while `others` run; returns the hosts.
fn with_hosts<T>(
    store: &MemoryStore,
    hosts: Vec<Host>,
    others: impl FnOnce() -> T,
) -> (Vec<Host>, T) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let running: Vec<_> = hosts
            .into_iter()
            .map(|mut host| {
                let done = &done;
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        // A failed round is followed by the next one.
                        let _ = host.round(store);
                        thread::yield_now();
                    }
                    host
                })
            })
            .collect();
        let result = others();
        done.store(true, Ordering::Relaxed);
        let hosts = running
            .into_iter()
            .map(|host| host.join().unwrap())
            .collect();
        (hosts, result)
    })
}

fn start(store: &MemoryStore, places: &[u64]) -> Vec<Host> {
    let names = ["a", "b", "c", "d", "e"];
    let hosts = names.iter().zip(places);
    hosts
        .map(|(name, places)| {
            let mut host = Host::new(name, *places);
            assert!(host.round(store).unwrap().registered);
            host
        })
        .collect()
}

fn place_many(store: &MemoryStore, count: u64) -> Vec<Result<Placed, PlaceError>> {
    thread::scope(|scope| {
        let placers: Vec<_> = (0..count)
            .map(|n| {
                let seed = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                scope
                    .spawn(move || placer(store, seed).reserve(&wanted(&format!("vm-{n}")), soon()))
            })
            .collect();
        placers
            .into_iter()
            .map(|placer| placer.join().unwrap())
            .collect()
    })
}

#[test]
fn hundred_placers_for_ten_places_get_exactly_ten() {
    let store = MemoryStore::default();
    let hosts = start(&store, &[2, 2, 2, 2, 2]);
    let (hosts, results) = with_hosts(&store, hosts, || place_many(&store, 100));
    let placed = results.iter().filter(|result| result.is_ok()).count();
    let refused = results
        .iter()
        .filter(|result| matches!(result, Err(PlaceError::Refused(_))))
        .count();
    assert_eq!((placed, refused), (10, 90));
    for host in &hosts {
        assert_eq!(host.held.len(), 2, "a place was left empty");
        assert_eq!(host.said_no, 0, "the store let somebody through");
    }
}

#[test]
fn faulty_store_sells_nothing_twice_and_leaks_nothing() {
    for seed in 1..=4 {
        let store = MemoryStore::default();
        let hosts = start(&store, &[3, 2, 3]);
        store.fail_by_lot(seed, 4);
        let (mut hosts, results) = with_hosts(&store, hosts, || {
            let done = AtomicBool::new(false);
            thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        store.deliver();
                        thread::yield_now();
                    }
                });
                let results = place_many(&store, 30);
                done.store(true, Ordering::Relaxed);
                results
            })
        });
        store.fail_by_lot(seed, 0);
        store.deliver();
        for host in &mut hosts {
            host.round(&store).unwrap();
        }
        let mut placed: Vec<&str> = results
            .iter()
            .filter_map(|result| result.as_ref().ok())
            .map(|placed| placed.id.as_str())
            .collect();
        placed.sort_unstable();
        let mut held: Vec<&str> = hosts
            .iter()
            .flat_map(|host| &host.held)
            .map(|held| held.id.as_str())
            .collect();
        held.sort_unstable();
        assert_eq!(held, placed, "seed {seed}: {results:?}");
        assert!(placed.len() <= 8);
    }
}

#[test]
fn lease_that_ends_takes_the_host_and_a_return_brings_its_promises() {
    let store = MemoryStore::default();
    let hosts = start(&store, &[2]);
    let (mut hosts, placed) = with_hosts(&store, hosts, || {
        placer(&store, 1).reserve(&wanted("v"), soon()).unwrap()
    });
    store.advance(LEASE);
    let picture = placer(&store, 2).picture(soon()).unwrap();
    assert!(picture.hosts.is_empty(), "{picture:?}");
    let refused = placer(&store, 3).reserve(&wanted("w"), soon());
    assert!(
        matches!(refused, Err(PlaceError::Refused(_))),
        "{refused:?}"
    );
    // The host does not know the reservation yet. It reads it again later.
    hosts[0].member.kept = None;
    assert!(hosts[0].round(&store).unwrap().registered);
    assert_eq!(hosts[0].member.counts().leases_lost, 1);
    let picture = placer(&store, 4).picture(soon()).unwrap();
    assert_eq!(picture.holder(&placed.id).unwrap().host, "a");
}

#[test]
fn host_that_does_not_answer_loses_the_line_and_the_next_one_gets_it() {
    let store = MemoryStore::default();
    let mut hosts = start(&store, &[9, 2]);
    // The emptier host is tried first, and does not respond.
    let deaf = hosts.remove(0);
    let (hosts, placed) = with_hosts(&store, hosts, || {
        let until = Instant::now() + Duration::from_secs(30);
        placer(&store, 7).reserve(&wanted("v"), until).unwrap()
    });
    assert_eq!(placed.host, "b");
    assert_eq!(hosts[0].held.len(), 1);
    let picture = placer(&store, 8).picture(soon()).unwrap();
    let book = picture.find("a").unwrap().book.clone().unwrap();
    assert!(book.entries.is_empty(), "{book:?}");
    drop(deaf);
}

#[test]
fn line_that_is_taken_out_is_given_back_by_the_host() {
    let store = MemoryStore::default();
    let hosts = start(&store, &[1]);
    let (mut hosts, placed) = with_hosts(&store, hosts, || {
        placer(&store, 1).reserve(&wanted("v"), soon()).unwrap()
    });
    store.inject(Fault::LostAnswer);
    let released = placer(&store, 2).release(&placed.id, soon()).unwrap();
    assert_eq!(released.vm, "v");
    assert_eq!(hosts[0].held.len(), 1, "the host does not know yet");
    hosts[0].round(&store).unwrap();
    assert!(hosts[0].held.is_empty());
    let again = placer(&store, 3).release(&placed.id, soon());
    assert!(matches!(again, Err(PlaceError::NoReservation(_))));
}

#[test]
fn promise_of_a_vm_that_is_being_started_is_not_taken_back() {
    let store = MemoryStore::default();
    let hosts = start(&store, &[1]);
    let (mut hosts, placed) = with_hosts(&store, hosts, || {
        placer(&store, 1).reserve(&wanted("v"), soon()).unwrap()
    });
    hosts[0].held[0].starting = true;
    hosts[0].round(&store).unwrap();
    let released = placer(&store, 2).release(&placed.id, soon());
    assert!(
        matches!(released, Err(PlaceError::Starting(_))),
        "{released:?}"
    );
    // When its VM runs, the line is removed automatically.
    hosts[0].held.clear();
    hosts[0].round(&store).unwrap();
    let picture = placer(&store, 3).picture(soon()).unwrap();
    assert!(picture.holder(&placed.id).is_none());
}

#[test]
fn change_whose_fate_is_unknown_is_made_once() {
    for fault in [Fault::Late, Fault::LostAnswer, Fault::LostRequest] {
        let store = MemoryStore::default();
        let hosts = start(&store, &[5]);
        store.inject(fault);
        let until = soon();
        let (mut hosts, placed) = thread::scope(|scope| {
            let placing = scope.spawn(|| placer(&store, 1).reserve(&wanted("v"), until));
            let mut hosts = hosts;
            while !placing.is_finished() {
                // The placer's change comes first, because the host writes only if there is a line.
                let picture = placer(&store, 9).picture(soon()).unwrap();
                let book = picture.hosts[0].book.clone().unwrap();
                if !book.entries.is_empty() {
                    hosts[0].round(&store).unwrap();
                }
                thread::yield_now();
            }
            (hosts, placing.join().unwrap().unwrap())
        });
        store.deliver();
        hosts[0].round(&store).unwrap();
        assert_eq!(hosts[0].held.len(), 1, "{fault:?}");
        assert_eq!(hosts[0].held[0].id, placed.id);
    }
}

#[test]
fn host_in_doubt_about_its_own_change_reads_and_goes_on() {
    for fault in [Fault::Late, Fault::LostAnswer, Fault::LostRequest] {
        let store = MemoryStore::default();
        let mut host = Host::new("a", 1);
        store.inject(fault);
        assert!(matches!(host.round(&store), Err(MemberError::Store(_))));
        assert!(host.round(&store).unwrap().registered, "{fault:?}");
        store.deliver();
        let picture = placer(&store, 1).picture(soon()).unwrap();
        let record = picture.hosts[0].record.clone().unwrap();
        assert_eq!(record.generation, 2, "{fault:?}");
    }
}

#[test]
fn silent_or_stale_host_lets_its_lease_end() {
    let store = MemoryStore::default();
    let mut host = start(&store, &[1]).remove(0);
    host.silent = true;
    assert!(matches!(host.round(&store), Err(MemberError::Silent)));
    let stale = host.member.round(&store, &mut |_| {
        Some(HostReport {
            ready: true,
            facts_age_ms: 16_000,
            ..HostReport::default()
        })
    });
    assert!(matches!(stale, Err(MemberError::Stale(16_000))));
    store.advance(LEASE);
    assert!(placer(&store, 1).picture(soon()).unwrap().hosts.is_empty());
}

#[test]
fn host_joins_when_it_knows_its_vms_and_stays_while_it_learns_of_a_new_one() {
    let store = MemoryStore::default();
    let mut host = Host::new("a", 1);
    host.learning = true;
    assert!(!host.round(&store).unwrap().registered);
    host.learning = false;
    assert!(host.round(&store).unwrap().registered);
    host.learning = true;
    for _ in 0..3 {
        store.advance(LEASE / 2);
        host.member.kept = None;
        assert!(host.round(&store).unwrap().registered);
    }
    assert_eq!(host.member.counts().leases, 1);
}

#[test]
fn second_machine_of_a_name_stays_out_and_a_restarted_one_does_not() {
    let store = MemoryStore::default();
    let _host = start(&store, &[1]);
    let mut other = Host::new("a", 9);
    other.member = member("a", "another machine");
    assert!(matches!(
        other.round(&store),
        Err(MemberError::NameTaken(_))
    ));
    let mut restarted = Host::new("a", 1);
    assert!(restarted.round(&store).unwrap().registered);
}

#[test]
fn drained_host_gets_nothing_new_until_the_mark_is_taken_away() {
    let store = MemoryStore::default();
    let hosts = start(&store, &[1]);
    let operator = placer(&store, 1);
    store.inject(Fault::LostRequest);
    operator
        .mark("a", Some(&DrainMark::default()), soon())
        .unwrap();
    let Err(PlaceError::Refused(refusal)) = operator.reserve(&wanted("v"), soon()) else {
        panic!("nothing new may go there");
    };
    assert_eq!(refusal.hosts[&HostRefusal::Draining], 1);
    operator.mark("a", None, soon()).unwrap();
    let (_, placed) = with_hosts(&store, hosts, || operator.reserve(&wanted("v"), soon()));
    assert_eq!(placed.unwrap().host, "a");
}

#[test]
fn placer_gives_up_in_time_when_the_store_is_down() {
    let store = MemoryStore::default();
    let _hosts = start(&store, &[1]);
    store.set_down(true);
    let until = Instant::now() + Duration::from_millis(300);
    let failed = placer(&store, 1).reserve(&wanted("v"), until);
    assert!(matches!(failed, Err(PlaceError::Store(_))), "{failed:?}");
}

#[test]
fn host_of_another_version_is_no_candidate_and_harms_nobody() {
    let store = MemoryStore::default();
    let hosts = start(&store, &[1]);
    for (name, text) in [("x", "{\"schema\":99,\"new\":[]}"), ("y", "nonsense")] {
        let txn = crate::store::Txn {
            expect: Vec::new(),
            writes: vec![crate::store::Write::Put {
                key: keys().record(name),
                value: text.into(),
                lease: None,
            }],
        };
        crate::store::Store::commit(&store, &txn, soon()).unwrap();
    }
    let (_, placed) = with_hosts(&store, hosts, || {
        placer(&store, 1).reserve(&wanted("v"), soon())
    });
    assert_eq!(placed.unwrap().host, "a");
    let Err(PlaceError::Refused(refusal)) = placer(&store, 2).reserve(&wanted("w"), soon()) else {
        panic!("the only place is taken");
    };
    assert_eq!(refusal.hosts[&HostRefusal::Schema], 2);
}

#[test]
fn names_that_would_reach_other_keys_are_refused() {
    for bad in ["", "a/b", "ä", "a b", &"x".repeat(254)] {
        assert!(Keys::check_host(bad).is_err(), "{bad}");
    }
    Keys::check_host("node-1.example_net").unwrap();
    for bad in ["", "/", "fleet", "/fleet/", "/a\n"] {
        assert!(Keys::new(bad).is_err(), "{bad}");
    }
}
