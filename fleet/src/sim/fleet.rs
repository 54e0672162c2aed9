//! Simulates many hosts with a shared store. VMs arrive and are placed. Hosts fail, and their VMs are placed again. The
//! store stalls, so that no data is updated.
//!
//! Hosts run independently between two exchanges. At an exchange, each host publishes its data, unless the store
//! stalls. Then waiting VMs are placed by the published data. The chosen host's agent decides again by its current
//! data, and if it refuses, the next candidate is tried. The real agents work the same way.

use std::collections::VecDeque;

use rayon::prelude::*;
use serde::Serialize;

use crate::admission::{Request, admit};
use crate::config::Millis;
use crate::model::Bytes;
use crate::placement::{HostCapacity, SplitMix64, place};

use super::host::Host;
use super::outcome::{Outcome, Run};
use super::scenario::{ManagerKind, Scenario};

/// Time between two exchanges.
const EXCHANGE: Millis = Millis::seconds(10);
/// A dead host's lease ends after this time.
const LEASE: Millis = Millis::seconds(10);
/// Time from admission until a VM has touched its minimum, for which its reservation counts.
const START: Millis = Millis::seconds(60);
/// Maximum number of placements per exchange; the rest waits for the next one.
const PLACEMENTS_MAX: usize = 2000;

/// Events between hosts.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct FleetOutcome {
    /// Number of hosts at the start.
    pub hosts: u32,
    /// Number of VMs at the start.
    pub vms: u64,
    /// Number of failed hosts.
    pub died: u32,
    /// Number of VMs to place: new ones and those of failed hosts.
    pub wanted: u64,
    /// Number of VMs placed.
    pub placed: u64,
    /// Number of refusals by a host's agent although the VM fit by the published data.
    pub refused_by_agent: u64,
    /// Number of times that no host was a candidate.
    pub no_candidate: u64,
    /// Number of VMs waiting at the end.
    pub waiting: u64,
    /// Maximum wait of a VM that was placed, s.
    pub waited_s_max: u64,
}

/// A run with its events between hosts.
pub(super) struct FleetRun {
    pub(super) run: Run,
    pub(super) outcome: FleetOutcome,
}

/// Whether the scenario has events between hosts.
pub(super) fn wanted(scenario: &Scenario) -> bool {
    let trouble = &scenario.trouble;
    trouble.hosts_die.0 > 0.0
        || trouble.arrivals_per_min.0 > 0.0
        || !trouble.store_stalls.is_empty()
}

/// A VM that waits for a host.
struct Waiting {
    group: u16,
    since_ms: u64,
    not_before_ms: u64,
}

struct Fleet<'a> {
    scenario: &'a Scenario,
    hosts: Vec<Host>,
    published: Vec<HostCapacity>,
    /// Each host's reservations, and their end.
    promises: Vec<VecDeque<(u64, Bytes)>>,
    waiting: VecDeque<Waiting>,
    random: SplitMix64,
    outcome: FleetOutcome,
    /// Arrivals that are due, as a fractional number of VMs.
    arrivals: f64,
}

/// Runs this project's manager on all hosts together.
pub(super) fn run(scenario: &Scenario) -> FleetRun {
    let hosts: Vec<Host> = (0..u64::from(scenario.hosts.count))
        .into_par_iter()
        .map(|number| Host::new(scenario, ManagerKind::Ours, number))
        .collect();
    let mut fleet = Fleet {
        published: vec![HostCapacity::default(); hosts.len()],
        promises: vec![VecDeque::new(); hosts.len()],
        waiting: VecDeque::new(),
        random: SplitMix64(scenario.seed),
        outcome: FleetOutcome {
            hosts: scenario.hosts.count,
            vms: hosts.iter().map(|host| host.guests.len() as u64).sum(),
            ..FleetOutcome::default()
        },
        arrivals: 0.0,
        scenario,
        hosts,
    };
    let mut now_ms = 0;
    while now_ms < scenario.lasts.0 {
        now_ms = (now_ms + EXCHANGE.0).min(scenario.lasts.0);
        fleet.hosts.par_iter_mut().for_each(|host| host.run(now_ms));
        fleet.exchange(now_ms);
    }
    fleet.finish()
}

impl Fleet<'_> {
    fn exchange(&mut self, now_ms: u64) {
        let stalled = self.store_stalled(now_ms);
        self.expire_promises(now_ms);
        if !stalled {
            self.publish(now_ms);
        }
        self.let_hosts_die(now_ms);
        self.let_vms_arrive(now_ms);
        // Without the store, no reservation on another host is possible.
        if !stalled {
            self.place_waiting(now_ms);
        }
    }

    fn store_stalled(&self, now_ms: u64) -> bool {
        let trouble = &self.scenario.trouble;
        let mut stalls = trouble.store_stalls.iter();
        stalls.any(|at| (at.0..at.0 + trouble.store_stall_lasts.0).contains(&now_ms))
    }

    fn expire_promises(&mut self, now_ms: u64) {
        for (host, promises) in self.hosts.iter_mut().zip(&mut self.promises) {
            if promises.is_empty() {
                continue;
            }
            while promises
                .front()
                .is_some_and(|(until_ms, _)| *until_ms <= now_ms)
            {
                promises.pop_front();
            }
            host.promise(promises.iter().map(|(_, bytes)| *bytes).sum());
        }
    }

    fn publish(&mut self, now_ms: u64) {
        for (number, (host, published)) in self.hosts.iter().zip(&mut self.published).enumerate() {
            let Some(plan) = host.plan().filter(|_| host.alive) else {
                continue;
            };
            if published.id.is_empty() {
                published.id = format!("host{number:05}");
                published.schema = HostCapacity::SCHEMA;
            }
            published.at_ms = now_ms;
            published.headroom = plan.headroom();
        }
    }

    fn let_hosts_die(&mut self, now_ms: u64) {
        let all = self.scenario.hosts.count;
        let part = now_ms as f64 / self.scenario.lasts.0 as f64;
        let due = (self.scenario.trouble.hosts_die.0 * f64::from(all) * part) as u32;
        while self.outcome.died < due {
            let number = (self.random.next() % u64::from(all)) as usize;
            let host = &mut self.hosts[number];
            if !host.alive {
                continue;
            }
            host.alive = false;
            self.outcome.died += 1;
            for &group in &host.guests.group {
                self.waiting.push_back(Waiting {
                    group,
                    since_ms: now_ms,
                    not_before_ms: now_ms + LEASE.0,
                });
                self.outcome.wanted += 1;
            }
        }
    }

    fn let_vms_arrive(&mut self, now_ms: u64) {
        let minutes = EXCHANGE.0 as f64 / 60_000.0;
        self.arrivals +=
            self.scenario.trouble.arrivals_per_min.0 * self.outcome.vms as f64 * minutes;
        while self.arrivals >= 1.0 {
            self.arrivals -= 1.0;
            let group = (self.random.next() % self.scenario.guests.len() as u64) as u16;
            self.waiting.push_back(Waiting {
                group,
                since_ms: now_ms,
                not_before_ms: now_ms,
            });
            self.outcome.wanted += 1;
        }
    }

    fn place_waiting(&mut self, now_ms: u64) {
        for _ in 0..self.waiting.len().min(PLACEMENTS_MAX) {
            let Some(vm) = self.waiting.pop_front() else {
                return;
            };
            if vm.not_before_ms <= now_ms && self.place_one(&vm, now_ms) {
                self.outcome.placed += 1;
                let waited_s = (now_ms - vm.since_ms) / 1000;
                self.outcome.waited_s_max = self.outcome.waited_s_max.max(waited_s);
            } else {
                self.waiting.push_back(vm);
            }
        }
    }

    fn place_one(&mut self, vm: &Waiting, now_ms: u64) -> bool {
        let config = &self.scenario.config;
        let kind = &self.scenario.guests[usize::from(vm.group)];
        let request = Request {
            min: kind.memory.part(kind.min),
            max: kind.memory,
        };
        let placement = place(
            &request,
            &self.published,
            now_ms,
            self.random.next(),
            config,
        );
        if placement.candidates.is_empty() {
            self.outcome.no_candidate += 1;
        }
        for candidate in &placement.candidates {
            let number = candidate.index;
            let host = &mut self.hosts[number];
            let promised: Bytes = self.promises[number].iter().map(|(_, bytes)| *bytes).sum();
            let answer = host.plan().filter(|_| host.alive).and_then(|plan| {
                let mut headroom = plan.headroom();
                // Reservations made since that plan count as well.
                headroom.ledger.firm_free -= promised - headroom.ledger.promised;
                headroom.ledger.promised = promised;
                admit(&request, &headroom, config).ok()
            });
            let Some(admission) = answer else {
                self.outcome.refused_by_agent += 1;
                continue;
            };
            self.promises[number].push_back((now_ms + START.0, admission.promise));
            host.promise(promised + admission.promise);
            host.add(vm.group, 1.0, &mut self.random, config);
            self.published[number].book(admission.promise);
            return true;
        }
        false
    }

    fn finish(mut self) -> FleetRun {
        let mut outcome = Outcome::default();
        for host in &self.hosts {
            outcome.add(&host.outcome);
        }
        self.outcome.waiting = self.waiting.len() as u64;
        FleetRun {
            run: Run {
                manager: ManagerKind::Ours,
                guests: self.scenario.guests_per_host(),
                outcome,
            },
            outcome: self.outcome,
        }
    }
}
