//! Tests placement and advice on small fleets.

use super::*;
use crate::admission::Request;
use crate::config::{Config, Millis};
use crate::model::{HostState, Ledger, PriorityClass, VmId};

fn host(id: &str, free_gib: u64) -> HostCapacity {
    HostCapacity {
        id: id.to_owned(),
        at_ms: 1000,
        schema: HostCapacity::SCHEMA,
        draining: false,
        headroom: HostHeadroom {
            ledger: Ledger {
                usable: Bytes::gib(100),
                available: Bytes::gib(free_gib),
                firm_free: Bytes::gib(free_gib),
                configured: Bytes::gib(100),
                ..Ledger::default()
            },
            ..HostHeadroom::default()
        },
    }
}

fn vm(id: &str, resident_gib: u64) -> MovableVm {
    MovableVm {
        id: VmId::from(id),
        min: Bytes::gib(1),
        max: Bytes::gib(32),
        resident: Bytes::gib(resident_gib),
        class: PriorityClass::Normal,
        movable: true,
        obstacle: None,
        moved: None,
    }
}

const REQUEST: Request = Request {
    min: Bytes::gib(4),
    max: Bytes::gib(8),
};

fn ids(moves: &Moves) -> Vec<(&str, &str)> {
    let pairs = moves.moves.iter();
    pairs.map(|m| (m.vm.as_str(), m.to.as_str())).collect()
}

#[test]
fn emptiest_of_the_fitting_hosts_comes_first() {
    let hosts = [host("a", 30), host("b", 60), host("c", 12)];
    let placement = place(&REQUEST, &hosts, 1000, 0, &Config::default());
    let order: Vec<usize> = placement.candidates.iter().map(|c| c.index).collect();
    assert_eq!(order, [1, 0]);
    assert_eq!(placement.refused[&HostRefusal::Short], 1);
}

#[test]
fn stale_draining_tight_and_foreign_hosts_are_no_candidates() {
    let mut hosts = [host("a", 60), host("b", 60), host("c", 60), host("d", 60)];
    hosts[0].at_ms = 0;
    hosts[1].draining = true;
    hosts[2].headroom.state = HostState::Red;
    hosts[3].schema = 2;
    for host in &mut hosts[1..] {
        host.at_ms = 16_000;
    }
    let placement = place(&REQUEST, &hosts, 15_001, 0, &Config::default());
    assert_eq!(placement.fitting, 0);
    assert_eq!(placement.refused.len(), 4);
}

#[test]
fn many_callers_do_not_choose_one_host() {
    let hosts: Vec<HostCapacity> = (0..50).map(|n| host(&n.to_string(), 40 + n % 2)).collect();
    let chosen: std::collections::BTreeSet<usize> = (0..100)
        .map(|random| place(&REQUEST, &hosts, 1000, random, &Config::default()).candidates[0].index)
        .collect();
    assert!(chosen.len() > 15, "only {} hosts chosen", chosen.len());
}

#[test]
fn drain_moves_everything_that_fits_the_largest_first() {
    let vms = [vm("small", 2), vm("large", 25), vm("fixed", 2)];
    let mut vms = vms;
    vms[2].movable = false;
    vms[2].obstacle = Some("why".to_owned());
    let moves = drain(
        &vms,
        &[host("a", 40), host("b", 38)],
        1000,
        &Config::default(),
    );
    assert_eq!(ids(&moves), [("large", "a"), ("small", "b")]);
    assert_eq!(
        moves.stay,
        [(VmId::from("fixed"), StayReason::Fixed("why".to_owned()))]
    );
}

#[test]
fn drain_does_not_promise_the_same_memory_twice() {
    let vms = [vm("one", 20), vm("two", 20)];
    let moves = drain(&vms, &[host("a", 35)], 1000, &Config::default());
    assert_eq!(moves.moves.len(), 1);
    assert_eq!(moves.stay, [(VmId::from("two"), StayReason::NoHost)]);
}

#[test]
fn rebalance_moves_the_smallest_vm_that_suffices() {
    let mut hot = host("hot", 9);
    hot.headroom.state = HostState::Orange;
    let vms = [vm("huge", 20), vm("right", 7), vm("tiny", 1)];
    let moves = rebalance(&hot, &vms, &[host("cool", 60)], 1000, &Config::default());
    assert_eq!(ids(&moves), [("right", "cool")]);
}

#[test]
fn rebalance_lets_yellow_hosts_and_resting_vms_alone() {
    let mut hot = host("hot", 9);
    let mut vms = [vm("one", 7)];
    hot.headroom.state = HostState::Yellow;
    let advise = |hot: &HostCapacity, vms: &[MovableVm], now_ms| {
        let mut cool = host("cool", 60);
        cool.at_ms = now_ms;
        rebalance(hot, vms, &[cool], now_ms, &Config::default())
    };
    assert!(advise(&hot, &vms, 1000).moves.is_empty());
    hot.headroom.state = HostState::Orange;
    vms[0].moved = Some(MoveHistory {
        at_ms: 0,
        duration_ms: 1000,
        times: 2,
    });
    let rested = 30 * 60 * 1000;
    assert_eq!(
        advise(&hot, &vms, rested - 1).stay[0].1,
        StayReason::Rests(rested)
    );
    assert_eq!(advise(&hot, &vms, rested).moves.len(), 1);
}

#[test]
fn rest_doubles_up_to_six_hours() {
    let rest = |times| {
        cool_down(&MoveHistory {
            at_ms: 0,
            duration_ms: 0,
            times,
        })
    };
    assert_eq!(rest(1), Millis::seconds(900));
    assert_eq!(rest(3), Millis::seconds(3600));
    assert_eq!(rest(30), Millis::seconds(6 * 3600));
}
