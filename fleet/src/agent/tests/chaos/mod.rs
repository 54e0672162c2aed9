//! An hour of continuous faults, in virtual time and from a seed: the real control loop with its ledger, acts and
//! files, with scripted VMs.
//!
//! Only threads and clocks are replaced. VMs hang, reject requests, send false data, stop responding, respond late or
//! with garbage, reboot, die and return as other machines. Files of the host vanish; the wall clock jumps; the agent is
//! killed between any two events and restarted on the same folder. `bin/ch-fleet/tests/chaos.rs` does the same with
//! real processes and sockets.

mod machine;

use std::fs;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

use strum::VariantArray as _;
use tempfile::TempDir;

use crate::agent::clock::script::ScriptedTime;
use crate::agent::control::ControlLoop;
use crate::agent::event::Event;
use crate::agent::launch::{Surroundings, assemble};
use crate::agent::no_harm::{Actual, Harm, Turns, left_behind};
use crate::agent::rounds::Serve;
use crate::agent::{Published, ReserveAnswer};
use crate::agent_config::{AgentConfig, VmRule};
use crate::config::PolicyConfig;
use crate::execute::Addressed;
use crate::host::HostFiles;
use crate::http::{Method, Peer, Request, Response};
use crate::model::{Bytes, FeatureLevel, PriorityClass};
use crate::placement::SplitMix64;
use crate::worker::VmWorker;
use machine::{Character, Fault, Machine};

const GIB: u64 = 1 << 30;
const TICK_MS: u64 = 250;
const SECOND_MS: u64 = 1000;
const HOUR_MS: u64 = 3_600_000;
/// Maximum time until everything has recovered after the last fault.
const SETTLE_MS: u64 = 15 * 60_000;
const HOST: u64 = 24 * GIB;
const VMS_MAX: usize = 8;
/// An unconfirmed reservation ends after this time (`admission.reservation`).
const HOLD_MS: u64 = 60_000;
/// Maximum delay for a due reservation, if an agent has just started or was late.
const SLACK_MS: u64 = 5000;

/// Deliberate bugs, to check that they are detected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Canary {
    None,
    /// Each agent loses its predecessor's acts on VMs.
    ForgetsActs,
    /// Each agent loses what its predecessor learned.
    ForgetsLessons,
    /// Each agent loses the reservations.
    ForgetsPromises,
}

/// An agent that runs.
struct Running {
    control: ControlLoop,
    published: Arc<Published>,
    served: Receiver<(String, u64, Receiver<Addressed>)>,
    since_ms: u64,
}

/// A reservation as its client knows it.
#[derive(Debug)]
struct Reserved {
    id: String,
    vm: String,
    bytes: u64,
    until_ms: u64,
    /// When its VM starts, if it ever does, and whether it did.
    starts_ms: Option<u64>,
    runs: bool,
}

/// The result of a run.
#[derive(Debug, Default)]
struct Outcome {
    harms: Vec<Harm>,
    kills: u32,
    plans: u64,
    promises: u32,
    faults: u32,
    turns_worst: usize,
}

struct Chaos {
    canary: Canary,
    time: &'static ScriptedTime,
    random: SplitMix64,
    folder: TempDir,
    machines: Vec<Machine>,
    pids: i32,
    /// Machines that return: time, name, size.
    absent: Vec<(u64, String, u64)>,
    others: u64,
    others_goal: u64,
    files_back_ms: Option<u64>,
    agent: Option<Running>,
    agent_back_ms: u64,
    reserved: Vec<Reserved>,
    outcome: Outcome,
}

impl Chaos {
    fn new(seed: u64, canary: Canary) -> Self {
        // In memory, to avoid waiting for a disk.
        let folder = TempDir::new_in("/dev/shm").unwrap();
        for name in ["vms", "proc/pressure", "proc/sys/kernel", "state"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        fs::write(folder.path().join("proc/vmstat"), "pswpin 0\npswpout 0\n").unwrap();
        let mut chaos = Self {
            canary,
            time: ScriptedTime::begin(),
            random: SplitMix64(seed),
            folder,
            machines: Vec::new(),
            pids: 1000,
            absent: Vec::new(),
            others: GIB,
            others_goal: GIB,
            files_back_ms: None,
            agent: None,
            agent_back_ms: 0,
            reserved: Vec::new(),
            outcome: Outcome::default(),
        };
        for name in ["a", "b", "c", "batch-1", "batch-2", "d"] {
            chaos.add(name, 4 * GIB);
        }
        chaos.write_host();
        chaos
    }

    /// True once per this many seconds on average.
    fn once_in(&mut self, seconds: u64) -> bool {
        self.random
            .next()
            .is_multiple_of(seconds * SECOND_MS / TICK_MS)
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.random.next() % (high - low + 1)
    }

    fn add(&mut self, name: &str, configured: u64) {
        self.pids += 1;
        let level = match self.random.next() % 4 {
            0 => FeatureLevel::L0,
            1 => FeatureLevel::L1,
            _ => FeatureLevel::L2,
        };
        let wedges = self.random.next().is_multiple_of(4);
        let character = Character { level, wedges };
        let machine = Machine::start(self.folder.path(), name, self.pids, character, configured);
        self.machines.push(machine);
    }

    fn remove(&mut self, index: usize) {
        let machine = self.machines.remove(index);
        self.judge(&machine.name, &machine.turns);
        machine.end();
    }

    fn judge(&mut self, vm: &str, turns: &Turns) {
        self.outcome.turns_worst = self.outcome.turns_worst.max(turns.worst());
        self.outcome.harms.extend(turns.check(vm).err());
    }

    fn config(&self) -> AgentConfig {
        let mut config = AgentConfig::default();
        let here = self.folder.path();
        config.agent.state_dir = here.join("state");
        config.discovery.sockets = vec![format!("{}/vms/*.sock", here.display())];
        let policy = |class| PolicyConfig {
            class,
            enforce: true,
            ..PolicyConfig::default()
        };
        let planning = &mut config.planning;
        planning
            .policy
            .insert("default".to_owned(), policy(PriorityClass::Normal));
        planning
            .policy
            .insert("batch".to_owned(), policy(PriorityClass::Batch));
        config.vms = vec![VmRule {
            name: "batch-*".to_owned(),
            policy: "batch".to_owned(),
        }];
        let resort = &mut planning.last_resort;
        (resort.memory_high, resort.swap, resort.pause, resort.kill) = (true, true, true, true);
        config
    }

    fn start_agent(&mut self) {
        let (serves, served) = mpsc::channel();
        let serve: Serve = Box::new(move |found, number, _| {
            let (orders, received) = mpsc::channel();
            // The receiver lives as long as the agent.
            let _ = serves.send((found.name.clone(), number, received));
            Ok(VmWorker::new(orders, number))
        });
        let here = self.folder.path();
        let files = HostFiles {
            proc: here.join("proc"),
            cgroup_root: here.join("cgroup"),
            cgroup: None,
        };
        let published: Arc<Published> = Arc::default();
        let surroundings = Surroundings {
            files: &files,
            clock: self.time.clock(),
            serve,
            pressed: Box::new(|| {}),
        };
        let now_ms = self.time.ms();
        match assemble(self.config(), None, &published, surroundings) {
            Ok(control) => {
                self.agent = Some(Running {
                    control,
                    published,
                    served,
                    since_ms: now_ms,
                });
            }
            // Restarted by the service manager, until the host can be read.
            Err(error) => {
                assert!(self.files_back_ms.is_some(), "{error:?}");
                self.agent_back_ms = now_ms + 2000;
            }
        }
    }

    fn kill_agent(&mut self) {
        let now_ms = self.time.ms();
        if let Some(running) = self.agent.take() {
            self.outcome.kills += 1;
            self.outcome.plans += running.control.rounds.decisions().plans;
            for machine in &mut self.machines {
                machine.abandon(now_ms, &mut self.random);
            }
        }
        self.agent_back_ms = now_ms + self.between(0, 15_000);
        let state = self.folder.path().join("state");
        let forgotten = match self.canary {
            Canary::ForgetsActs => "acts.json",
            Canary::ForgetsLessons => "lessons.json",
            Canary::ForgetsPromises => "reservations.json",
            Canary::None => return,
        };
        // The file may not exist yet.
        let _ = fs::remove_file(state.join(forgotten));
    }

    fn available(&self) -> u64 {
        let resident: u64 = self.machines.iter().map(Machine::resident).sum();
        HOST.saturating_sub(resident + self.others)
    }

    fn write_host(&self) {
        if self.files_back_ms.is_some() {
            return;
        }
        let proc = self.folder.path().join("proc");
        let available = self.available();
        let text = format!(
            "MemTotal: {} kB\nMemAvailable: {} kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n",
            HOST >> 10,
            available >> 10
        );
        fs::write(proc.join("meminfo"), text).unwrap();
        let some = if available < HOST / 50 { 30 } else { 0 };
        let line = |name: &str| format!("{name} avg10={some}.00 avg60=0.00 avg300=0.00 total=0\n");
        let text = line("some") + &line("full");
        fs::write(proc.join("pressure/memory"), text).unwrap();
    }

    fn tick(&mut self) {
        self.time.pass(TICK_MS);
        let now_ms = self.time.ms();
        let step = (self.others_goal.abs_diff(self.others)).min(128 << 20);
        if self.others_goal > self.others {
            self.others += step.min(self.available());
        } else {
            self.others -= step;
        }
        let mut free = self.available();
        for machine in &mut self.machines {
            machine.live(now_ms, &mut free);
        }
        if self.files_back_ms.is_some_and(|back_ms| now_ms >= back_ms) {
            self.files_back_ms = None;
            self.write_host();
        }
        if now_ms.is_multiple_of(SECOND_MS) {
            self.write_host();
        }
        if self.agent.is_none() && now_ms >= self.agent_back_ms {
            self.start_agent();
        }
        self.run_agent(None);
        while let Some(dead) = self.machines.iter().position(|machine| machine.killed) {
            let name = self.machines[dead].name.clone();
            self.remove(dead);
            self.absent.push((now_ms + 10_000, name, 4 * GIB));
        }
        while let Some(due) = self.absent.iter().position(|(at_ms, ..)| now_ms >= *at_ms) {
            let (_, name, configured) = self.absent.remove(due);
            self.add(&name, configured);
        }
        if now_ms.is_multiple_of(SECOND_MS) {
            self.check_promises();
        }
    }

    /// Delivers events of the VMs and runs what is due; or delivers only some of them, before it is killed.
    fn run_agent(&mut self, killed_after: Option<usize>) {
        let now_ms = self.time.ms();
        let Some(running) = &mut self.agent else {
            return;
        };
        for (name, number, orders) in running.served.try_iter() {
            let found = self
                .machines
                .iter_mut()
                .find(|machine| machine.name == name);
            if let Some(machine) = found {
                machine.serve(orders, number, now_ms);
            }
        }
        let mut events = Vec::new();
        for machine in &mut self.machines {
            events.extend(machine.talk(now_ms, &mut self.random));
        }
        let all = killed_after.unwrap_or(events.len());
        for event in events.into_iter().take(all) {
            running.control.handle(Event::Vm(event));
        }
        if killed_after.is_none() {
            running.control.do_due();
        }
    }

    /// Sends the agent a request, if it runs.
    fn ask(&mut self, name: &str, body: String) -> Option<Response> {
        let running = self.agent.as_mut()?;
        let (answer, answered) = mpsc::sync_channel(1);
        let request = Request {
            method: Method::Put,
            path: format!("{}{name}", api::API_PREFIX),
            query: String::new(),
            body: body.into_bytes(),
            host: None,
            authorization: None,
            peer: Some(Peer { pid: 1, uid: 0 }),
        };
        running
            .control
            .handle(Event::Client(Box::new(request), answer));
        answered.try_recv().ok()
    }

    fn reserve(&mut self) {
        let now_ms = self.time.ms();
        let vm = format!("n{}", self.outcome.promises);
        let bytes = self.between(1, 4) * GIB;
        self.write_host();
        let body = format!(r#"{{"vm":"{vm}","memory":{bytes},"min":{bytes}}}"#);
        let Some(response) = self.ask("fleet.reserve", body) else {
            return;
        };
        if response.status != 200 {
            return;
        }
        self.outcome.promises += 1;
        let answer: ReserveAnswer = serde_json::from_slice(&response.body).unwrap();
        let starts = self.random.next().is_multiple_of(2);
        let starts_ms = starts.then(|| now_ms + self.between(2000, 20_000));
        self.reserved.push(Reserved {
            id: answer.reservation.unwrap().id,
            vm,
            bytes,
            until_ms: now_ms + HOLD_MS,
            starts_ms,
            runs: false,
        });
        let promised = self.outstanding();
        let reserve = self.config().planning.reserve(Bytes(HOST)).0;
        let there = self.available().saturating_sub(reserve);
        if promised > there {
            self.outcome.harms.push(Harm::Oversold {
                promised: Bytes(promised),
                there: Bytes(there),
            });
        }
    }

    /// The memory required for unused reservations.
    fn outstanding(&self) -> u64 {
        let now_ms = self.time.ms();
        let reserved = self
            .reserved
            .iter()
            .filter(|reserved| now_ms < reserved.until_ms);
        reserved
            .map(|reserved| {
                let machine = self
                    .machines
                    .iter()
                    .find(|machine| machine.name == reserved.vm);
                reserved
                    .bytes
                    .saturating_sub(machine.map_or(0, Machine::resident))
            })
            .sum()
    }

    fn start_promised(&mut self) {
        let now_ms = self.time.ms();
        let due = |reserved: &Reserved| {
            !reserved.runs && reserved.starts_ms.is_some_and(|at_ms| now_ms >= at_ms)
        };
        let Some(index) = self.reserved.iter().position(due) else {
            return;
        };
        let id = self.reserved[index].id.clone();
        let confirmed = self.ask("fleet.confirm", format!(r#"{{"reservation":"{id}"}}"#));
        if confirmed.is_none_or(|response| response.status != 200) {
            // Retried as long as the reservation holds.
            if now_ms >= self.reserved[index].until_ms {
                self.reserved[index].starts_ms = None;
            }
            return;
        }
        if self.machines.len() >= VMS_MAX {
            let goes = self.between(0, self.machines.len() as u64 - 1) as usize;
            self.remove(goes);
        }
        let (vm, bytes) = (self.reserved[index].vm.clone(), self.reserved[index].bytes);
        self.add(&vm, bytes);
        let reserved = &mut self.reserved[index];
        (reserved.runs, reserved.until_ms) = (true, now_ms + HOLD_MS);
    }

    fn check_promises(&mut self) {
        let now_ms = self.time.ms();
        let Some(running) = &self.agent else {
            return;
        };
        let status = &running.published.get().status;
        let on_book = |reserved: &Reserved| {
            let mut book = status.reservations.iter();
            book.any(|entry| entry.reservation.id == reserved.id)
        };
        let settled = now_ms > running.since_ms + SLACK_MS;
        let mut harms = Vec::new();
        self.reserved.retain(|reserved| {
            let (id, vm) = (reserved.id.clone(), reserved.vm.clone());
            let listed = on_book(reserved);
            if !listed && now_ms + SECOND_MS < reserved.until_ms && !reserved.runs {
                harms.push(Harm::Lost { id, vm });
                return false;
            }
            if listed && settled && now_ms > reserved.until_ms + SLACK_MS && !reserved.runs {
                harms.push(Harm::Overdue { id, vm });
                return false;
            }
            now_ms <= reserved.until_ms + 2 * SLACK_MS
        });
        self.outcome.harms.extend(harms);
    }

    /// Causes a fault or a change.
    fn disturb(&mut self) {
        let now_ms = self.time.ms();
        for index in 0..self.machines.len() {
            if self.once_in(80) {
                let until_ms = now_ms + self.between(3000, 60_000);
                let fault = Fault::VARIANTS[self.random.next() as usize % Fault::VARIANTS.len()];
                self.machines[index].fail(Some(fault), until_ms);
                self.outcome.faults += 1;
            }
            if self.once_in(60) {
                let part = self.between(10, 90) as f64 / 100.0;
                self.machines[index].want(part);
            }
            if self.once_in(900) {
                self.machines[index].reboot();
            }
        }
        if self.once_in(200) && !self.machines.is_empty() {
            let index = self.between(0, self.machines.len() as u64 - 1) as usize;
            let name = self.machines[index].name.clone();
            self.remove(index);
            let back_ms = now_ms + self.between(0, 10_000);
            self.absent.push((back_ms, name, 4 * GIB));
        }
        if self.once_in(45) {
            self.others_goal = self.between(0, 14) * GIB;
        }
        if self.once_in(200) && self.files_back_ms.is_none() {
            self.files_back_ms = Some(now_ms + self.between(2000, 40_000));
            fs::remove_file(self.folder.path().join("proc/meminfo")).unwrap();
        }
        if self.once_in(120) {
            let hour = HOUR_MS.cast_signed();
            let by_ms = [hour, -hour, hour / 60, -hour / 60][self.random.next() as usize % 4];
            self.time.jump(by_ms);
        }
        if self.once_in(15) {
            self.reserve();
        }
        self.start_promised();
        if self.agent.is_some() && self.once_in(120) {
            let after = self.between(0, 4) as usize;
            self.run_agent(Some(after));
            self.kill_agent();
        }
    }

    fn calm(&mut self) {
        for machine in &mut self.machines {
            machine.fail(None, 0);
            machine.want(0.1);
        }
        self.others_goal = 0;
        self.files_back_ms = None;
    }

    fn run(mut self, hours: u64) -> Outcome {
        while self.time.ms() < hours * HOUR_MS {
            self.tick();
            self.disturb();
        }
        let end_ms = self.time.ms() + SETTLE_MS;
        while self.time.ms() < end_ms {
            self.calm();
            self.tick();
            self.start_promised();
        }
        let running = self.agent.as_ref().unwrap();
        let status = running.published.get().status.clone();
        let vms: Vec<Actual> = self.machines.iter().map(actual).collect();
        for harm in left_behind(&status, &vms) {
            println!("{harm}; the host is {}", status.host.state);
            self.outcome.harms.push(harm);
        }
        while !self.machines.is_empty() {
            self.remove(0);
        }
        self.outcome
    }
}

fn actual(machine: &Machine) -> Actual {
    Actual {
        vm: machine.name.clone(),
        paused: machine.paused,
        limited: machine.is_limited(),
        target: machine.target,
    }
}

fn run(seed: u64, canary: Canary) -> Outcome {
    let outcome = Chaos::new(seed, canary).run(1);
    println!("seed {seed}: {outcome:?}");
    outcome
}

/// `SEED` replays one.
fn seeds() -> Vec<u64> {
    match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (1..=4).collect(),
    }
}

#[test]
fn hour_of_chaos_does_no_harm() {
    let mut promises = 0;
    for seed in seeds() {
        let outcome = run(seed, Canary::None);
        assert_eq!(outcome.harms, [], "seed {seed}");
        // Checks that the run really had faults and kills.
        assert!(outcome.kills > 10 && outcome.faults > 100, "{outcome:?}");
        promises += outcome.promises;
    }
    assert!(promises > 0);
}

#[test]
fn agents_that_forget_do_harm_that_is_noticed() {
    let harms = |canary| {
        let mut seeds = seeds().into_iter();
        seeds.find_map(|seed| {
            let harms = run(seed, canary).harms;
            (!harms.is_empty()).then_some(harms)
        })
    };
    let acts = harms(Canary::ForgetsActs).unwrap();
    let left = |harm: &Harm| matches!(harm, Harm::Paused { .. } | Harm::Limited { .. });
    assert!(acts.iter().any(left), "{acts:?}");
    let lessons = harms(Canary::ForgetsLessons).unwrap();
    let turned = |harm: &Harm| matches!(harm, Harm::Turned { .. });
    assert!(lessons.iter().any(turned), "{lessons:?}");
    let promises = harms(Canary::ForgetsPromises).unwrap();
    let lost = |harm: &Harm| matches!(harm, Harm::Lost { .. });
    assert!(promises.iter().any(lost), "{promises:?}");
}

#[test]
fn same_seed_of_chaos_gives_the_same_hour() {
    let told = || format!("{:?}", Chaos::new(7, Canary::None).run(1));
    assert_eq!(told(), told());
}
