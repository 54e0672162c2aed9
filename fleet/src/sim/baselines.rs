//! Other memory managers for comparison, implemented from descriptions of their rules, with their defaults.
//!
//! - MOM: the ballooning rules of oVirt's Memory Overcommitment Manager. While the mean of the host's free memory is
//!   below 20 %, all guests shrink by at most 5 %; otherwise all grow by at most 5 %. Page cache counts as used.
//! - Proxmox VE's automatic ballooning: keeps the host at 80 %, and moves at most 100 MiB per guest and round. The
//!   surplus over the minimum is distributed by shares. Guests' free memory only decides the order.
//! - xapi's squeezed: memory over the minimum is distributed in proportion to the range, from memory that domains do
//!   not own. Domains that shrink go first; others grow when the shrinking is done. A domain that does not move is
//!   ignored.
//!
//! Each gets free page reporting as well, even if its own system lacks it, so that only the rules differ.

use std::collections::VecDeque;

use crate::model::{Bytes, Inventory, VmFacts};

use super::manager::{Manager, Order};

/// Interval of decisions of all three, ms.
const INTERVAL_MS: u64 = 10_000;

fn current(vm: &VmFacts) -> Bytes {
    vm.configured - vm.sample.map_or(Bytes::ZERO, |sample| sample.ballooned)
}

fn free(vm: &VmFacts) -> Option<Bytes> {
    vm.sample?.guest.map(|guest| guest.free)
}

/// Requests that a guest's memory becomes `size`.
fn resize(place: usize, vm: &VmFacts, size: Bytes, orders: &mut Vec<Order>) {
    let size = size.max(vm.policy.min).min(vm.policy.max);
    orders.push(Order::Balloon(place, vm.configured - size));
}

/// oVirt MOM.
#[derive(Default)]
pub(super) struct Mom {
    host_free: VecDeque<f64>,
}

/// Fraction of the host's memory that is kept free, and of a guest's memory once the host has reached that.
const MOM_FREE: f64 = 0.20;
/// Below this fraction, guests are forced to swap.
const MOM_HARD: f64 = 0.05;
/// Maximum change at once.
const MOM_STEP: f64 = 0.05;
/// Minimum change, as a fraction.
const MOM_DEAD_BAND: f64 = 0.0025;
/// Number of samples in its history.
const MOM_HISTORY: usize = 10;

impl Manager for Mom {
    fn interval_ms(&self) -> u64 {
        INTERVAL_MS
    }

    fn act(&mut self, inventory: &mut Inventory, orders: &mut Vec<Order>) {
        if self.host_free.len() == MOM_HISTORY {
            self.host_free.pop_front();
        }
        let host = &inventory.host;
        self.host_free.push_back(host.available.ratio(host.total));
        let p = self.host_free.iter().sum::<f64>() / self.host_free.len() as f64;
        for (place, vm) in inventory.vms.iter().enumerate() {
            let Some(free) = free(vm) else {
                continue;
            };
            let now = current(vm);
            let used = now - free;
            let size = if p < MOM_FREE {
                let part = if p <= MOM_HARD { p - MOM_HARD } else { p };
                let wanted = Bytes((used.0 as f64 + part * now.0 as f64).max(0.0) as u64);
                now.scale(1.0 - MOM_STEP).max(vm.policy.min.max(wanted))
            } else {
                let wanted = used + now.scale(MOM_FREE);
                vm.policy.max.min(now.scale(1.0 + MOM_STEP).max(wanted))
            };
            let shrinks_but_would_grow = p < MOM_FREE && size > now;
            if now.distance(size).ratio(now) > MOM_DEAD_BAND && !shrinks_but_would_grow {
                resize(place, vm, size, orders);
            }
        }
    }
}

/// Proxmox VE.
pub(super) struct Proxmox;

/// Target for the host's use.
const PVE_TARGET: f64 = 0.80;
/// Smaller differences are ignored.
const PVE_DEAD_BAND: Bytes = Bytes::mib(10);
/// Maximum change at once.
const PVE_STEP: Bytes = Bytes::mib(100);
/// Fraction of the minimum below which a guest counts as short of memory.
const PVE_SHORT: f64 = 0.25;

impl Manager for Proxmox {
    fn interval_ms(&self) -> u64 {
        INTERVAL_MS
    }

    fn act(&mut self, inventory: &mut Inventory, orders: &mut Vec<Order>) {
        let host = &inventory.host;
        let (target, used) = (host.total.scale(PVE_TARGET), host.total - host.available);
        let grow = target > used;
        let goal = target.distance(used);
        if goal <= PVE_DEAD_BAND {
            return;
        }
        let short =
            |vm: &VmFacts| free(vm).is_some_and(|free| free <= vm.policy.min.scale(PVE_SHORT));
        let all: Vec<usize> = (0..inventory.vms.len())
            .filter(|&place| {
                inventory.vms[place].sample.is_some() && inventory.vms[place].policy.shares > 0
            })
            .collect();
        let first: Vec<usize> = all
            .iter()
            .copied()
            .filter(|&place| short(&inventory.vms[place]) == grow)
            .collect();
        if !pve_share(&first, inventory, goal, grow, orders) {
            pve_share(&all, inventory, goal, grow, orders);
        }
    }
}

/// Distributes the surplus among these guests; false if nothing could be moved.
fn pve_share(
    places: &[usize],
    inventory: &Inventory,
    goal: Bytes,
    grow: bool,
    orders: &mut Vec<Order>,
) -> bool {
    let surplus: Bytes = places
        .iter()
        .map(|&place| current(&inventory.vms[place]) - inventory.vms[place].policy.min)
        .sum();
    let mut rest = if grow { surplus + goal } else { surplus - goal };
    let mut open: Vec<usize> = places.to_vec();
    let mut desired = vec![Bytes::ZERO; inventory.vms.len()];
    // Guests that reach a limit stay there, and the rest is distributed among the others.
    while !open.is_empty() {
        let shares: f64 = open
            .iter()
            .map(|&place| f64::from(inventory.vms[place].policy.shares))
            .sum();
        let mut still = Vec::new();
        let mut fixed = Bytes::ZERO;
        for &place in &open {
            let policy = &inventory.vms[place].policy;
            let part = rest.scale(f64::from(policy.shares) / shares);
            desired[place] = (policy.min + part).min(policy.max);
            if policy.min + part > policy.max {
                fixed += policy.max - policy.min;
            } else {
                still.push(place);
            }
        }
        if still.len() == open.len() {
            break;
        }
        rest -= fixed;
        open = still;
    }
    let mut left = goal;
    for &place in places {
        let vm = &inventory.vms[place];
        let now = current(vm);
        let change = if grow {
            desired[place] - now
        } else {
            now - desired[place]
        };
        let change = change.min(PVE_STEP).min(left);
        if change > Bytes::ZERO {
            left -= change;
            let size = if grow { now + change } else { now - change };
            resize(place, vm, size, orders);
        }
    }
    left < goal
}

/// xapi's squeezed.
#[derive(Default)]
pub(super) struct Squeezed {
    /// By guest: its last memory, and when that last changed.
    progress: Vec<(Bytes, u64)>,
}

/// Memory of the host that is not distributed.
const SQUEEZED_HOST: Bytes = Bytes::mib(72);
/// A domain that does not move for this long is ignored, ms. Evaluated in the next round.
const SQUEEZED_STUCK_MS: u64 = 5000;

impl Manager for Squeezed {
    fn interval_ms(&self) -> u64 {
        INTERVAL_MS
    }

    fn act(&mut self, inventory: &mut Inventory, orders: &mut Vec<Order>) {
        self.progress
            .resize(inventory.vms.len(), (Bytes::ZERO, inventory.now_ms));
        let owned: Bytes = inventory.vms.iter().map(current).sum();
        // Under Xen, a domain owns its memory, touched or not.
        let host = inventory.host.total - owned;
        let mut over_min = Bytes::ZERO;
        let mut range = Bytes::ZERO;
        let mut active = vec![false; inventory.vms.len()];
        for (place, vm) in inventory.vms.iter().enumerate() {
            let now = current(vm);
            let (before, since_ms) = &mut self.progress[place];
            let arrived = vm
                .sample
                .is_some_and(|s| s.balloon_target.distance(s.ballooned) < Bytes::mib(4));
            if *before != now || arrived {
                (*before, *since_ms) = (now, inventory.now_ms);
            }
            active[place] = vm.sample.is_some()
                && inventory.now_ms - *since_ms <= SQUEEZED_STUCK_MS + INTERVAL_MS;
            if active[place] {
                over_min += now - vm.policy.min;
                range += vm.policy.max - vm.policy.min;
            }
        }
        let gamma = (host + over_min - SQUEEZED_HOST).ratio(range).min(1.0);
        let wanted = |vm: &VmFacts| vm.policy.min + (vm.policy.max - vm.policy.min).scale(gamma);
        let shrinking = |(place, vm): &(usize, &VmFacts)| {
            active[*place] && wanted(vm) + Bytes::mib(4) < current(vm)
        };
        let shrink: Vec<usize> = inventory
            .vms
            .iter()
            .enumerate()
            .filter(shrinking)
            .map(|(p, _)| p)
            .collect();
        for (place, vm) in inventory.vms.iter().enumerate() {
            // Domains that shrink go first; growing ones wait until the shrinking is done.
            if active[place] && (shrink.is_empty() || shrink.contains(&place)) {
                resize(place, vm, wanted(vm), orders);
            }
        }
    }
}
