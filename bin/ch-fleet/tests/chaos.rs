#![allow(clippy::unwrap_used)]
//! Fault injection for half a minute, with the real agent as a process that is killed at random and restarted on the
//! same folder. `cargo xtask fleet-chaos --minutes 10` is the long version.
//!
//! VMMs hang, reject requests, and return garbage or truncated responses. They execute requests without a response, and
//! confirm requests without executing them. They report wrong figures, stop responding, and return as other machines. A
//! file of the host disappears and reappears. Jumps of the wall clock, which cannot be simulated for a single process,
//! are part of the version on virtual time (`fleet/src/agent/tests/chaos`).

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use fleet::agent::fake_vmm::{FakeVm, Fault, GIB, World, wait};
use fleet::agent::no_harm::{Actual, Harm, Turns, left_behind};
use fleet::agent::{ReserveAnswer, ReserveRequest, Status};
use fleet::model::Bytes;

const HOST: u64 = 24 * GIB;
const VM: u64 = 4 * GIB;
const NAMES: [&str; 6] = ["a", "b", "c", "d", "batch-1", "batch-2"];
/// Time between two steps of the script.
const STEP: Duration = Duration::from_millis(100);
/// Time limit for recovery after the last fault.
const SETTLE: Duration = Duration::from_secs(180);
const HOLD: Duration = Duration::from_secs(10);

/// Pseudo-random numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    /// True once per `seconds` on average.
    fn once_in(&mut self, seconds: u64) -> bool {
        self.below(seconds * 10) == 0
    }

    fn part(&mut self) -> f64 {
        self.below(1000) as f64 / 1000.0
    }
}

struct Reserved {
    id: String,
    vm: String,
    bytes: u64,
    until: Instant,
}

struct Chaos {
    world: World,
    begin: Instant,
    random: Random,
    forgets: bool,
    settle: Duration,
    child: Option<Child>,
    up_since: Option<Instant>,
    back: Instant,
    others: u64,
    file_back: Option<Instant>,
    healed: BTreeMap<String, Instant>,
    turns: BTreeMap<String, Turns>,
    seen: BTreeMap<String, usize>,
    reserved: Vec<Reserved>,
    harms: Vec<Harm>,
    kills: u32,
    faults: u32,
    promises: u32,
    pauses: u32,
    limits: u32,
}

impl Chaos {
    fn new(seed: u64, forgets: bool) -> Self {
        let world = World::new(HOST, 0);
        let pid = std::process::id();
        // All fake VMMs are in one process, so they share one control group.
        let group = world.path().join("cgroup/vms/fake");
        fs::create_dir_all(&group).unwrap();
        fs::write(group.join("cgroup.procs"), format!("{pid}\n")).unwrap();
        for (file, text) in UNLIMITED {
            fs::write(group.join(file), text).unwrap();
        }
        for (number, name) in NAMES.into_iter().enumerate() {
            let mut vm = FakeVm::new(VM, VM / 2);
            vm.level = (number % 3) as u8;
            world.add(name, vm);
        }
        let process = world.path().join(format!("proc/{pid}/cgroup"));
        fs::write(process, "0::/vms/fake\n").unwrap();
        let here = world.path().display();
        let config = format!(
            "[agent]\nsocket = '{here}/run/agent.sock'\nstate_dir = '{here}/state'\nscan = '200ms'\nhost = '100ms'\n\
             [discovery]\nsockets = ['{here}/vms/*.sock']\nany_program = true\n\
             [control]\nplan = '500ms'\nsample = '500ms'\nsample_deadline = '500ms'\nsample_age_max = '3s'\n\
             [admission]\nreservation = '{}s'\n\
             [last_resort]\nafter = '1s'\nmemory_high = true\nswap = true\npause = true\n\
             [policy.default]\nenforce = true\n[policy.batch]\nclass = 'batch'\nenforce = true\n\
             [[vm]]\nname = 'batch-*'\npolicy = 'batch'\n",
            HOLD.as_secs()
        );
        fs::write(world.path().join("agent.toml"), config).unwrap();
        Self {
            world,
            begin: Instant::now(),
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            forgets,
            settle: SETTLE,
            child: None,
            up_since: None,
            back: Instant::now(),
            others: 0,
            file_back: None,
            healed: BTreeMap::new(),
            turns: BTreeMap::new(),
            seen: BTreeMap::new(),
            reserved: Vec::new(),
            harms: Vec::new(),
            kills: 0,
            faults: 0,
            promises: 0,
            pauses: 0,
            limits: 0,
        }
    }

    fn client(&self) -> api::Client {
        api::Client::new(self.world.path().join("run/agent.sock"))
            .with_timeout(Some(Duration::from_secs(5)))
    }

    fn status(&self) -> Option<Status> {
        let text = self.client().get("fleet.status").ok()??;
        Some(serde_json::from_str(&text).unwrap())
    }

    /// Starts the agent if it is not running, as a service manager does.
    fn supervise(&mut self) {
        if let Some(child) = &mut self.child
            && let Some(ended) = child.try_wait().unwrap()
        {
            // The agent cannot start without the host's files.
            let log = fs::read_to_string(self.world.path().join("log")).unwrap();
            assert!(
                ended.code() == Some(1) && !log.contains("panicked"),
                "{ended}: {log}"
            );
            assert!(log.contains("Cannot read the state of the host"), "{log}");
            self.child = None;
            self.back = Instant::now() + Duration::from_millis(500);
        }
        if self.child.is_none() && Instant::now() >= self.back {
            let log = fs::File::create(self.world.path().join("log")).unwrap();
            let child = Command::new(env!("CARGO_BIN_EXE_ch-fleet"))
                .args(["agent", "--config"])
                .arg(self.world.path().join("agent.toml"))
                .arg("--proc")
                .arg(self.world.path().join("proc"))
                .arg("--cgroup-root")
                .arg(self.world.path().join("cgroup"))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .unwrap();
            self.child = Some(child);
            self.up_since = Some(Instant::now());
        }
    }

    fn kill_agent(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
            self.kills += 1;
            let log = fs::read_to_string(self.world.path().join("log")).unwrap();
            assert!(!log.contains("panicked"), "{log}");
        }
        if self.forgets {
            // The file may not exist yet.
            let _ = fs::remove_file(self.world.path().join("state/acts.json"));
        }
        self.back = Instant::now() + Duration::from_millis(self.random.below(3000));
    }

    fn limited(&self) -> bool {
        let group = self.world.path().join("cgroup/vms/fake");
        UNLIMITED
            .iter()
            .any(|(file, text)| fs::read_to_string(group.join(file)).unwrap().trim() != *text)
    }

    /// Applies the requests to every balloon.
    fn watch(&mut self) {
        self.limits += u32::from(self.limited());
        for name in NAMES {
            let vm = self.world.vm(name);
            self.pauses += u32::from(vm.paused);
            let seen = self.seen.entry(name.to_owned()).or_default();
            let turns = self.turns.entry(name.to_owned()).or_default();
            for (target, at) in vm.resizes.iter().skip(*seen) {
                let at_ms = at.saturating_duration_since(self.begin).as_millis() as u64;
                turns.asked(*target, at_ms);
            }
            *seen = vm.resizes.len();
        }
    }

    fn judge_turns(&mut self, name: &str) {
        let turns = self.turns.remove(name).unwrap_or_default();
        self.harms.extend(turns.check(name).err());
        self.seen.remove(name);
    }

    fn disturb(&mut self) {
        let now = Instant::now();
        for name in NAMES {
            if self.healed.get(name).is_some_and(|at| now >= *at) {
                self.healed.remove(name);
                self.world.change(name, heal);
            }
            if self.random.once_in(8) {
                self.faults += 1;
                let kind = self.random.below(10);
                self.world.change(name, |vm| fail(vm, kind));
                let heals = now + Duration::from_millis(500 + self.random.below(8000));
                self.healed.insert(name.to_owned(), heals);
            }
            if self.random.once_in(5) {
                let (part, stalls) = (self.random.part(), self.random.below(2));
                self.world.change(name, |vm| {
                    let has = vm.configured - vm.actual;
                    vm.available = (has as f64 * part) as u64;
                    vm.resident = has - vm.available / 2;
                    vm.stalls += stalls;
                });
            }
            if self.random.once_in(120) {
                self.watch();
                self.judge_turns(name);
                let mut vm = FakeVm::new(VM, VM / 2);
                vm.level = self.random.below(3) as u8;
                self.world.add(name, vm);
            }
        }
        if self.random.once_in(10) {
            // Together with the VMs, this sometimes exceeds the host's memory.
            self.others = self.random.below(18) * GIB;
            self.world.set_others(self.others);
        }
        let (file, aside) = ("proc/vmstat", "vmstat");
        if self.file_back.is_some_and(|at| now >= at) {
            self.file_back = None;
            fs::rename(self.world.path().join(aside), self.world.path().join(file)).unwrap();
        } else if self.file_back.is_none() && self.random.once_in(30) {
            fs::rename(self.world.path().join(file), self.world.path().join(aside)).unwrap();
            self.file_back = Some(now + Duration::from_millis(self.random.below(10_000)));
        }
        if self.random.once_in(2) {
            self.reserve();
        }
        if self.child.is_some() && self.random.once_in(4) {
            self.kill_agent();
        }
    }

    fn available(&self) -> u64 {
        let resident: u64 = NAMES.iter().map(|name| self.world.vm(name).resident).sum();
        HOST.saturating_sub(resident + self.others)
    }

    fn reserve(&mut self) {
        let bytes = (1 + self.random.below(3)) * GIB;
        let vm = format!("new-{}", self.promises);
        let request = ReserveRequest {
            vm: vm.clone(),
            memory: Bytes(bytes),
            min: Some(Bytes(bytes)),
            huge_pages: false,
            dry_run: false,
        };
        let asked = Instant::now();
        let body = api::to_ascii_json(&request).unwrap();
        let Ok(Some(answer)) = self.client().put("fleet.reserve", Some(&body)) else {
            return;
        };
        self.promises += 1;
        let answer: ReserveAnswer = serde_json::from_str(&answer).unwrap();
        self.reserved.retain(|reserved| asked < reserved.until);
        self.reserved.push(Reserved {
            id: answer.reservation.unwrap().id,
            vm,
            bytes,
            until: asked + HOLD,
        });
        let promised = self.reserved.iter().map(|reserved| reserved.bytes).sum();
        let there = self.available();
        if promised > there {
            self.harms.push(Harm::Oversold {
                promised: Bytes(promised),
                there: Bytes(there),
            });
        }
    }

    /// Checks that every granted reservation is honoured by whichever agent instance runs.
    fn check_promises(&mut self) {
        let Some(status) = self.status() else {
            return;
        };
        let now = Instant::now();
        let listed = |id: &str| {
            let mut reservations = status.reservations.iter();
            reservations.any(|entry| entry.reservation.id == id)
        };
        let lost = self.reserved.iter().filter(|reserved| {
            now + Duration::from_secs(1) < reserved.until && !listed(&reserved.id)
        });
        self.harms.extend(lost.map(|reserved| Harm::Lost {
            id: reserved.id.clone(),
            vm: reserved.vm.clone(),
        }));
        self.reserved.retain(|reserved| listed(&reserved.id));
    }

    fn calm(&mut self) {
        if self.file_back.take().is_some() {
            let path = self.world.path();
            fs::rename(path.join("vmstat"), path.join("proc/vmstat")).unwrap();
        }
        self.world.set_others(0);
        for name in NAMES {
            self.world.change(name, |vm| {
                heal(vm);
                vm.available = (vm.configured - vm.actual) / 2;
                vm.resident = (vm.configured - vm.actual).min(GIB);
            });
        }
    }

    fn left(&self) -> Vec<Harm> {
        let Some(status) = self.status() else {
            return vec![Harm::Silent];
        };
        let limited = self.limited();
        let vms: Vec<Actual> = NAMES
            .iter()
            .map(|name| {
                let vm = self.world.vm(name);
                Actual {
                    vm: (*name).to_owned(),
                    paused: vm.paused,
                    limited,
                    target: vm.target,
                }
            })
            .collect();
        left_behind(&status, &vms)
    }

    fn run(mut self, span: Duration) -> Vec<Harm> {
        while self.begin.elapsed() < span {
            self.supervise();
            self.disturb();
            self.watch();
            self.check_promises();
            thread::sleep(STEP);
        }
        self.calm();
        let until = Instant::now() + self.settle;
        let settling = Instant::now();
        let mut left = self.left();
        while !left.is_empty() && Instant::now() < until {
            self.supervise();
            self.watch();
            thread::sleep(STEP);
            left = self.left();
        }
        let settled = settling.elapsed();
        self.harms.extend(left);
        let worst = self.turns.values().map(Turns::worst).max().unwrap_or(0);
        for name in NAMES {
            self.judge_turns(name);
        }
        println!(
            "{} s: {} kills, {} faults, {} promises, {} steps with a VM paused, {} with a limit, at most {worst} turns, settled in {} s; {:?}",
            span.as_secs(),
            self.kills,
            self.faults,
            self.promises,
            self.pauses,
            self.limits,
            settled.as_secs(),
            self.harms
        );
        assert!(self.kills > 0 && self.faults > 0);
        std::mem::take(&mut self.harms)
    }
}

impl Drop for Chaos {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The files of a control group without limits.
const UNLIMITED: [(&str, &str); 3] = [
    ("memory.max", "max"),
    ("memory.high", "max"),
    ("memory.swap.max", "0"),
];

fn fail(vm: &mut FakeVm, kind: u64) {
    match kind {
        0 => vm.fault = Fault::Hang,
        1 => vm.fault = Fault::Half,
        2 => vm.fault = Fault::Status500,
        3 => vm.fault = Fault::Garbage,
        4 => vm.fault = Fault::Mute,
        5 => vm.refuses_balloon = true,
        6 => vm.follows = false,
        7 => vm.talks = false,
        8 => vm.lies = true,
        _ => vm.refusals = 3,
    }
}

fn heal(vm: &mut FakeVm) {
    vm.fault = Fault::None;
    (vm.refuses_balloon, vm.follows, vm.talks, vm.lies) = (false, true, true, false);
    vm.refusals = 0;
    vm.settle();
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn agent_that_is_killed_again_and_again_does_no_harm() {
    let seconds = from_environment("FLEET_CHAOS_MINUTES").map_or(30, |minutes| minutes * 60);
    let seed = from_environment("SEED").unwrap_or(1);
    println!("SEED={seed}");
    let harms = Chaos::new(seed, false).run(Duration::from_secs(seconds));
    assert_eq!(harms, []);
}

/// The check can fail: it detects agents that forget their changes to VMs.
#[test]
fn agents_that_forget_what_they_did_are_noticed() {
    let noticed = (1..=5).any(|seed| {
        let mut chaos = Chaos::new(seed, true);
        chaos.settle = Duration::from_secs(10);
        let harms = chaos.run(Duration::from_secs(20));
        let left = |harm: &Harm| matches!(harm, Harm::Paused { .. } | Harm::Limited { .. });
        harms.iter().any(left)
    });
    assert!(noticed);
}

#[test]
fn vm_that_a_killed_agent_left_paused_is_resumed_by_the_next_one() {
    let mut chaos = Chaos::new(1, false);
    chaos.world.set_others(HOST);
    wait("a VM that is paused", || {
        chaos.supervise();
        chaos.world.vm("batch-1").paused.then_some(())
    });
    chaos.kill_agent();
    chaos.world.set_others(0);
    assert!(chaos.world.vm("batch-1").paused);
    wait("a VM that runs", || {
        chaos.supervise();
        (!chaos.world.vm("batch-1").paused && !chaos.limited()).then_some(())
    });
}
