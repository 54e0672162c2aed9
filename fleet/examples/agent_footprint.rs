#![allow(clippy::unwrap_used)]
//! Measures the cost of an agent: `agent_footprint CH_FLEET [VMS [SECONDS]]`, started by `cargo xtask fleet-bench`.
//!
//! CH_FLEET is the agent's program. Its VMs are fakes in this process, a third on each level, some with faults. The
//! host is short of memory, so that the agent has decisions to make. A scrape every 15 seconds is part of the load. The
//! result is printed as one JSON object.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use fleet::agent::Status;
use fleet::agent::fake_vmm::{FakeVm, Fault, GIB, MIB, World, wait_within};

/// Prometheus's default interval.
const SCRAPE: Duration = Duration::from_secs(15);
/// Guests that begin to suffer during the measurement.
const SUFFERERS: usize = 10;
/// Maximum wait for one of them.
const REACTION_MAX: Duration = Duration::from_secs(30);
/// Initial host memory of each VM.
const RESIDENT: u64 = 3 * GIB;
const DEADLINE: Duration = Duration::from_secs(120);
/// `sysconf(_SC_CLK_TCK)` of every Linux that runs VMs.
const TICKS_PER_S: f64 = 100.0;

struct Agent {
    child: Child,
    address: String,
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(program) = arguments.next() else {
        eprintln!("usage: agent_footprint CH_FLEET [VMS [SECONDS]]");
        return ExitCode::from(2);
    };
    let vms: usize = arguments.next().map_or(500, |text| text.parse().unwrap());
    let seconds: u64 = arguments.next().map_or(120, |text| text.parse().unwrap());
    let world = world(vms);
    let agent = start(PathBuf::from(program), &world);
    wait_within(DEADLINE, "all VMs that answer", || {
        let status = status(&agent);
        let up = status.vms.iter().filter(|vm| vm.up).count();
        let healthy = (0..vms).filter(|number| fault(*number) == Fault::None);
        (up == healthy.count()).then_some(())
    });
    measure(&world, &agent, vms, Duration::from_secs(seconds));
    ExitCode::SUCCESS
}

fn name(number: usize) -> String {
    format!("vm-{number}")
}

/// One in fifty has a fault.
fn fault(number: usize) -> Fault {
    match number % 200 {
        49 => Fault::Hang,
        99 => Fault::Half,
        149 => Fault::Status500,
        199 => Fault::Garbage,
        _ => Fault::None,
    }
}

fn world(vms: usize) -> World {
    // Initially an eighth of it is free, so memory is short until balloons have grown.
    let world = World::new(vms as u64 * RESIDENT * 8 / 7, 0);
    for number in 0..vms {
        let mut vm = FakeVm::new(4 * GIB, RESIDENT);
        vm.level = (number % 3) as u8;
        vm.fault = fault(number);
        world.add(&name(number), vm);
    }
    world
}

fn start(program: PathBuf, world: &World) -> Agent {
    let here = world.path().display();
    let (file, log) = (world.path().join("agent.toml"), world.path().join("log"));
    let config = format!(
        "[agent]\nsocket = '{here}/agent.sock'\nstate_dir = '{here}/state'\nlisten = '127.0.0.1:0'\n\
         [discovery]\nsockets = ['{here}/vms/*.sock']\nany_program = true\n[host]\nreserve = '0B'\n"
    );
    fs::write(&file, config).unwrap();
    let child = Command::new(program)
        .args(["agent", "--config"])
        .arg(file)
        .arg("--proc")
        .arg(world.path().join("proc"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let address = wait_within(DEADLINE, "the page", || {
        let log = fs::read_to_string(&log).unwrap();
        let (_, rest) = log.split_once("page and metrics at http://")?;
        Some(rest.split_once('/')?.0.to_owned())
    });
    Agent { child, address }
}

fn measure(world: &World, agent: &Agent, vms: usize, span: Duration) {
    let (begin, ticks, plans) = (Instant::now(), ticks(agent), plans(agent));
    let mut age_ms_max = 0;
    let mut reactions_ms = Vec::new();
    let mut next_scrape = begin;
    let pause = span / (SUFFERERS as u32 + 1);
    while begin.elapsed() < span {
        if Instant::now() >= next_scrape {
            next_scrape += SCRAPE;
            let _ = get(agent, "/metrics");
        }
        if reactions_ms.len() < SUFFERERS
            && begin.elapsed() > pause * (reactions_ms.len() as u32 + 1)
        {
            reactions_ms.extend(reaction_ms(world, reactions_ms.len()));
        }
        thread::sleep(Duration::from_millis(20));
    }
    let elapsed_s = begin.elapsed().as_secs_f64();
    let cpu = (self::ticks(agent) - ticks) / TICKS_PER_S / elapsed_s * 100.0;
    let planned = self::plans(agent) - plans;
    let ages = status(agent).vms.into_iter().filter(|vm| vm.up);
    for vm in ages {
        age_ms_max = age_ms_max.max(vm.sample_age_ms.unwrap_or(0));
    }
    let of = |name: &str| field(&format!("/proc/{}/status", agent.child.id()), name);
    println!(
        "{}",
        serde_json::json!({
            "vms": vms,
            "seconds": elapsed_s.round(),
            "cpu_percent_of_a_core": (cpu * 100.0).round() / 100.0,
            "rss_mib": of("VmRSS:") / 1024,
            "rss_peak_mib": of("VmHWM:") / 1024,
            "rss_own_mib": of("RssAnon:") / 1024,
            "threads": of("Threads:"),
            "plans": planned,
            "plans_due": (elapsed_s / 2.0).floor(),
            "sample_age_ms_max": age_ms_max,
            "reaction_ms": reactions_ms,
        })
    );
}

/// Makes a guest suffer, and measures the time until its balloon is asked to shrink, ms; `None` without a balloon.
fn reaction_ms(world: &World, round: usize) -> Option<u128> {
    // Of the guests on level 2, a different one each time.
    let name = name(2 + 3 * 5 * round);
    let before = world.vm(&name).target;
    if before == 0 {
        return None;
    }
    world.change(&name, |vm| {
        vm.available = 16 * MIB;
        vm.stalls += 1000;
    });
    let begin = Instant::now();
    while world.vm(&name).target >= before {
        if begin.elapsed() > REACTION_MAX {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    Some(begin.elapsed().as_millis())
}

fn get(agent: &Agent, path: &str) -> String {
    let mut stream = TcpStream::connect(&agent.address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}

fn status(agent: &Agent) -> Status {
    serde_json::from_str(&get(agent, "/status.json")).unwrap()
}

fn plans(agent: &Agent) -> u64 {
    let text = get(agent, "/metrics");
    let line = text
        .lines()
        .find(|line| line.starts_with("ch_plans_total"))
        .unwrap();
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

/// Processor time of the agent so far.
fn ticks(agent: &Agent) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", agent.child.id())).unwrap();
    let rest = &stat[stat.rfind(')').unwrap() + 1..];
    // Fields 14 and 15: in user space, and in the kernel.
    let fields = rest.split_ascii_whitespace().skip(11).take(2);
    fields.map(|field| field.parse::<f64>().unwrap()).sum()
}

/// The first number after a name in a kernel file.
fn field(file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap();
    line.split_ascii_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap()
}
