//! One simulated host in a closed loop: guests change, are sampled, and a manager acts on the samples.

use crate::config::Config;
use crate::model::{
    Bytes, FeatureLevel, GuestClaims, HostFacts, InForce, Inventory, Lessons, Pressure,
    ReclaimFigures, VmFacts, VmId, VmPolicy, VmSample,
};
use crate::placement::SplitMix64;
use crate::planner::Plan;

use super::guests::{Guests, bytes, mib};
use super::manager::{Manager, Order};
use super::managers;
use super::outcome::{Outcome, Point};
use super::scenario::{Character, GuestGroup, ManagerKind, Scenario};

/// Lack of memory, as a fraction of the host's, that stalls every guest continuously.
const STARVED_FULL: f32 = 0.01;
/// Lack of memory from which the kernel kills.
const KILL_BEYOND: f32 = 0.03;
/// Free memory below which tasks begin to wait, as a fraction of the host's.
const PRESSED_BELOW: f32 = 0.02;
/// Interval of the recorded points, ms.
const RECORD_MS: u64 = 10_000;
/// Assumed completion time of guest reports, µs; the simulation does not model it.
const REPORT_US: u64 = 100;

/// A host.
pub(super) struct Host {
    kinds: Vec<GuestGroup>,
    pub(super) guests: Guests,
    inventory: Inventory,
    manager: Box<dyn Manager>,
    orders: Vec<Order>,
    reporting: bool,
    memory: f32,
    overhead: f32,
    tick_ms: u64,
    sample_ms: u64,
    settle_ms: u64,
    next_plan_ms: u64,
    next_record_ms: u64,
    pressure: f64,
    lost: f64,
    random: SplitMix64,
    /// The last direction of each balloon, and the number of changes of direction.
    turns: Vec<(i8, u16)>,
    pub(super) outcome: Outcome,
    /// Dead hosts do nothing.
    pub(super) alive: bool,
}

impl Host {
    pub(super) fn new(scenario: &Scenario, kind: ManagerKind, number: u64) -> Self {
        let mut random = SplitMix64(scenario.seed ^ number.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let mut host = Self {
            kinds: scenario.guests.clone(),
            guests: Guests::default(),
            inventory: Inventory::default(),
            manager: managers::new(kind, &scenario.time, &scenario.config),
            orders: Vec::new(),
            reporting: true,
            memory: mib(scenario.hosts.memory.0),
            overhead: mib(scenario.hosts.overhead.0),
            tick_ms: scenario.time.tick.0,
            sample_ms: scenario.time.sample.0,
            settle_ms: scenario.settle.0,
            next_plan_ms: 0,
            next_record_ms: 0,
            pressure: 0.0,
            lost: scenario.trouble.samples_lost.0,
            turns: Vec::new(),
            outcome: Outcome::default(),
            alive: true,
            random: SplitMix64(random.next()),
        };
        for (group, guests) in scenario.guests.iter().enumerate() {
            for n in 0..guests.count {
                let down_ms = guests.start.0 + u64::from(n) * guests.stagger.0;
                host.add(
                    group as u16,
                    down_ms as f32 / 1000.0,
                    &mut random,
                    &scenario.config,
                );
                if kind == ManagerKind::Squeezed {
                    // A domain is built with its minimum.
                    let i = host.guests.len() - 1;
                    let size = host.guests.configured[i];
                    let balloon = size - size * guests.min.0 as f32;
                    (host.guests.balloon[i], host.guests.target[i]) = (balloon, balloon);
                }
            }
        }
        host
    }

    /// Adds a guest to the host.
    pub(super) fn add(
        &mut self,
        group: u16,
        down_s: f32,
        random: &mut SplitMix64,
        config: &Config,
    ) {
        let kind = &self.kinds[usize::from(group)];
        let place = self.guests.len();
        self.guests.push(group, kind, down_s, random);
        self.turns.push((0, 0));
        let mut policy: VmPolicy = config.vm_policy("default", kind.memory);
        policy.min = kind.memory.part(kind.min);
        policy.class = kind.class;
        self.inventory.vms.push(VmFacts {
            // Names are in the order of indices, so that no sorting is needed.
            id: VmId::from(format!("vm{place:06}")),
            epoch: 1,
            level: FeatureLevel::L2,
            configured: kind.memory,
            has_balloon: true,
            policy,
            interlock: None,
            in_force: InForce::default(),
            lessons: Lessons::default(),
            sample: None,
            missed_samples: 0,
        });
    }

    /// Runs until `until_ms`.
    pub(super) fn run(&mut self, until_ms: u64) {
        while self.alive && self.inventory.now_ms < until_ms {
            self.tick();
        }
    }

    pub(super) fn plan(&self) -> Option<&Plan> {
        self.manager.plan()
    }

    /// Sets the memory reserved for VMs that have not started yet.
    pub(super) fn promise(&mut self, promised: Bytes) {
        self.inventory.promised = promised;
    }

    fn tick(&mut self) {
        let now_ms = self.inventory.now_ms + self.tick_ms;
        self.inventory.now_ms = now_ms;
        let (t, dt) = (now_ms as f32 / 1000.0, self.tick_ms as f32 / 1000.0);
        let resident: f32 = (0..self.guests.len())
            .map(|i| self.guests.resident(i))
            .sum();
        let missing = (self.overhead + resident - self.memory).max(0.0);
        let starved = (missing / (STARVED_FULL * self.memory)).min(1.0);
        for i in 0..self.guests.len() {
            let kind = &self.kinds[usize::from(self.guests.group[i])];
            self.guests.tick(i, kind, t, dt, starved, self.reporting);
        }
        if missing > KILL_BEYOND * self.memory {
            self.kill_largest();
        }
        self.read_host(dt, starved);
        self.sample(now_ms);
        if now_ms >= self.next_plan_ms {
            self.next_plan_ms = now_ms.saturating_add(self.manager.interval_ms());
            self.act();
        }
        if now_ms >= self.settle_ms {
            self.count(dt, starved);
        }
        if now_ms >= self.next_record_ms {
            self.next_record_ms += RECORD_MS;
            self.record(now_ms);
        }
    }

    fn kill_largest(&mut self) {
        let largest = (0..self.guests.len())
            .max_by(|&a, &b| self.guests.resident(a).total_cmp(&self.guests.resident(b)));
        if let Some(i) = largest {
            self.guests.kill(i);
            self.outcome.killed += u64::from(self.inventory.now_ms >= self.settle_ms);
        }
    }

    fn read_host(&mut self, dt: f32, starved: f32) {
        let resident: f32 = (0..self.guests.len())
            .map(|i| self.guests.resident(i))
            .sum();
        let available = (self.memory - self.overhead - resident).max(0.0);
        let pressed = 1.0 - available / (PRESSED_BELOW * self.memory);
        let now = f64::from(starved.max(pressed.max(0.0) * 0.3)) * 100.0;
        self.pressure += (now - self.pressure) * (1.0 - (-f64::from(dt) / 10.0).exp());
        self.inventory.host = HostFacts {
            at_ms: self.inventory.now_ms,
            total: bytes(self.memory),
            available: bytes(available),
            pressure: Pressure {
                some_avg10: self.pressure,
                ..Pressure::default()
            },
            ..HostFacts::default()
        };
    }

    /// Samples the guests whose turn it is.
    fn sample(&mut self, now_ms: u64) {
        let rounds = (self.sample_ms / self.tick_ms).max(1);
        let turn = now_ms / self.tick_ms % rounds;
        for i in (turn as usize..self.guests.len()).step_by(rounds as usize) {
            let character = self.kinds[usize::from(self.guests.group[i])].character;
            let lost = self.lost > 0.0 && (self.random.next() as f64 / u64::MAX as f64) < self.lost;
            let wedged = character == Character::Wedging
                && self.guests.stalling[i] > 0.0
                && self.guests.balloon[i] > 0.0;
            let vm = &mut self.inventory.vms[i];
            vm.epoch = u64::from(self.guests.epoch[i]);
            if !self.guests.running(i) {
                vm.sample = None;
                vm.missed_samples = 0;
            } else if lost || wedged {
                vm.missed_samples += 1;
            } else {
                vm.missed_samples = 0;
                vm.sample = Some(sample_of(&self.guests, i, character, now_ms));
            }
        }
    }

    fn act(&mut self) {
        let mut orders = std::mem::take(&mut self.orders);
        orders.clear();
        self.manager.act(&mut self.inventory, &mut orders);
        for order in &orders {
            self.carry_out(*order);
        }
        self.orders = orders;
    }

    fn carry_out(&mut self, order: Order) {
        let guests = &mut self.guests;
        match order {
            Order::Balloon(i, to) => {
                let to = mib(to.0);
                let way = if to > guests.target[i] { 1 } else { -1 };
                if to != guests.target[i] && self.inventory.now_ms >= self.settle_ms {
                    let turn = &mut self.turns[i];
                    turn.1 += u16::from(turn.0 == -way);
                    turn.0 = way;
                    self.outcome.requests += 1;
                }
                guests.target[i] = to;
            }
            Order::Eager(i, eager) => guests.eager[i] = eager,
            Order::Limit(i, limit) => {
                guests.limit[i] = limit.map_or(f32::INFINITY, |limit| mib(limit.0));
            }
            Order::Pause(i) => guests.paused[i] = true,
            Order::Resume(i) => guests.paused[i] = false,
            Order::Kill(i) => {
                guests.kill(i);
                self.outcome.sacrificed += 1;
            }
        }
    }

    fn count(&mut self, dt: f32, starved: f32) {
        let stalled: f32 = self.guests.stalling.iter().sum();
        let outcome = &mut self.outcome;
        outcome.stalled_s += f64::from(stalled * dt);
        outcome.starved_s += f64::from(starved * dt) * self.guests.len() as f64;
        outcome.guest_s += f64::from(dt) * self.guests.len() as f64;
        outcome.seconds += f64::from(dt);
        outcome.state_s[self.manager.state() as usize] += f64::from(dt);
        let turns = self.turns.iter().map(|turn| turn.1).max().unwrap_or(0);
        outcome.reversals_worst = outcome.reversals_worst.max(u64::from(turns));
        let configured: f32 = self.guests.configured.iter().sum();
        let balloon: f32 = self.guests.balloon.iter().sum();
        outcome.ballooned_peak = outcome
            .ballooned_peak
            .max(f64::from(balloon / configured.max(1.0)));
        outcome.used_sum += f64::from(dt)
            * (1.0
                - self
                    .inventory
                    .host
                    .available
                    .ratio(self.inventory.host.total));
    }

    fn record(&mut self, now_ms: u64) {
        let sum = |column: &[f32]| f64::from(column.iter().sum::<f32>()) / 1024.0;
        self.outcome.points.push(Point {
            at_s: now_ms / 1000,
            resident_gib: (0..self.guests.len())
                .map(|i| f64::from(self.guests.resident(i)))
                .sum::<f64>()
                / 1024.0,
            ballooned_gib: sum(&self.guests.balloon),
            stalled: f64::from(self.guests.stalling.iter().sum::<f32>())
                / self.guests.len().max(1) as f64,
            state: self.manager.state(),
        });
    }
}

fn sample_of(guests: &Guests, i: usize, character: Character, now_ms: u64) -> VmSample {
    let claimed = guests.claimed(i, character);
    let has = guests.configured[i] - claimed;
    let (free, cache) = if character == Character::Lying {
        // It always reports enough available memory, regardless of its use.
        (has * 0.5, 0.0)
    } else {
        let free = (has - guests.used[i] - guests.cache[i]).max(0.0);
        (free, guests.cache[i])
    };
    VmSample {
        at_ms: now_ms,
        balloon_target: bytes(guests.target[i]),
        ballooned: bytes(claimed),
        resident: bytes(guests.resident(i)),
        swapped: Bytes::ZERO,
        obtainable: Bytes::ZERO,
        guest: Some(GuestClaims {
            at_ms: now_ms,
            free: bytes(free),
            available: bytes(free + cache * 0.9),
            alloc_stalls: Some(u64::from(guests.stall_events[i])),
            major_faults: None,
            swap_in: None,
            oom_kills: Some(0),
        }),
        reclaim: Some(ReclaimFigures {
            reporting_active: character != Character::Hardened,
            inhibited: false,
            policy_in_effect: true,
            reported: bytes(guests.discarded[i]),
            discarded: bytes(guests.discarded[i]),
            repopulated: bytes(guests.repopulated[i]),
            skipped: Bytes::ZERO,
            report_p99_us: REPORT_US,
        }),
    }
}
