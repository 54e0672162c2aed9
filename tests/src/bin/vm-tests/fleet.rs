//! Guests under the fleet agent, on a host (a control group) too small for all of them: each
//! was busy once, then they idle, and one of them comes to need what it gave.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::paths;
use integration_tests::tests;
use integration_tests::wait::wait_for;
use serde_json::Value;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        fleet_of_reporting_guests_fits_a_small_host,
        fleet_of_ballooned_guests_fits_a_small_host,
        fleet_of_reporting_and_ballooned_guests_fits_a_small_host,
    ]
}

const MIB: u64 = 1 << 20;
/// Six of 512 MiB, 3 GiB together.
const GUESTS: usize = 6;
/// What each touches and frees, and what it then keeps: 2.4 GiB together, and 0.5 GiB.
const BUSY_BYTES: u64 = 360 * MIB;
const KEPT_BYTES: u64 = 30 * MIB;
/// The host: above this the kernel kills.
const HOST_BYTES: u64 = 1400 * MIB;
/// An emulated host on a machine that is busy itself takes its time.
const DEADLINE: Duration = Duration::from_secs(180);

/// The control group that is the host; it is removed when dropped.
struct Group(PathBuf);

impl Group {
    fn new() -> Result<Group> {
        let folder = PathBuf::from(format!("/sys/fs/cgroup/fleet-{}", std::process::id()));
        fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
        let group = Group(folder);
        fs::write(group.0.join("memory.max"), HOST_BYTES.to_string()).context("memory.max")?;
        Ok(group)
    }

    /// As the agent's settings have it.
    fn name(&self) -> String {
        let name = self.0.file_name().unwrap_or_default();
        format!("/{}", name.to_string_lossy())
    }

    fn add(&self, pid: u32) -> Result<()> {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).context("cgroup.procs")
    }

    fn oom_kills(&self) -> Result<u64> {
        let text = fs::read_to_string(self.0.join("memory.events"))?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count
            .and_then(|count| count.parse().ok())
            .context("no oom_kill in memory.events")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Only a group whose guests could not be ended stays, and those have been told of.
        let _ = fs::remove_dir(&self.0);
    }
}

/// The agent; ended when dropped.
struct Agent {
    child: Child,
    folder: PathBuf,
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Already ended is as good as killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    fn start(folder: &Path, group: &Group, balloon: bool) -> Result<Self> {
        // On a busy emulated host a balloon may grow as slowly as one that is stuck elsewhere.
        let here = folder.display();
        let settings = format!(
            "[agent]\nsocket = '{here}/agent.sock'\nstate_dir = '{here}/state'\n\
             [discovery]\nsockets = ['{here}/vms/*.sock']\n\
             [host]\ncgroup = '{}'\n\
             [control]\nsample = '500ms'\nplan = '500ms'\nsample_deadline = '5s'\n\
             keep_min = '48MiB'\nsuffer_min = '24MiB'\nstep_part = '25%'\nstuck_rate = '1MiB'\n\
             [policy.default]\nmin = '128MiB'\nfloor = '128MiB'\nballoon = {balloon}\n",
            group.name()
        );
        let file = folder.join("agent.toml");
        fs::write(&file, settings)?;
        let child = Command::new(paths::program("ch-fleet")?)
            .args(["agent", "--config"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.join("agent.log"))?)
            .spawn()
            .context("starting ch-fleet")?;
        Ok(Self {
            child,
            folder: folder.to_owned(),
        })
    }

    fn ask(&self, arguments: &[&str]) -> Result<std::process::Output> {
        Command::new(paths::program("ch-fleet")?)
            .arg("--socket")
            .arg(self.folder.join("agent.sock"))
            .args(["--output", "json"])
            .args(arguments)
            .output()
            .context("starting ch-fleet")
    }

    /// Waits until the agent lets a guest start.
    fn admit(&self, name: &str) -> Result<()> {
        let mut last = String::new();
        wait_for(&format!("a place for {name}"), DEADLINE, || {
            let output = self.ask(&["reserve", name, "--memory", "512M"])?;
            last = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            Ok(output.status.success().then_some(()))
        })
        .with_context(|| {
            let why = self.ask(&["explain"]).map(|output| output.stdout);
            format!(
                "{last}\n{}",
                String::from_utf8_lossy(&why.unwrap_or_default())
            )
        })
    }

    fn wait<T>(&self, what: &str, condition: impl Fn(&Value) -> Option<T>) -> Result<T> {
        let mut last = Value::Null;
        wait_for(what, DEADLINE, || {
            let output = self.ask(&["status"])?;
            last = serde_json::from_slice(&output.stdout).unwrap_or_default();
            Ok(condition(&last))
        })
        .with_context(|| format!("{last}\n{}", self.last_words()))
    }

    /// The log's end, for the message of a test that failed.
    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.folder.join("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

fn vm<'a>(status: &'a Value, name: &str) -> Option<&'a Value> {
    status["vms"].as_array()?.iter().find(|vm| vm["vm"] == name)
}

fn fleet_of_reporting_guests_fits_a_small_host() -> Result<Outcome> {
    let options = "size=0,free_page_reporting=on,stats_poll_ms=500";
    run_fleet(options, Levers::Reporting)
}

fn fleet_of_ballooned_guests_fits_a_small_host() -> Result<Outcome> {
    let options = "size=0,deflate_on_oom=on,stats_poll_ms=500";
    run_fleet(options, Levers::Balloon)
}

fn fleet_of_reporting_and_ballooned_guests_fits_a_small_host() -> Result<Outcome> {
    let options = "size=0,free_page_reporting=on,deflate_on_oom=on,stats_poll_ms=500";
    run_fleet(options, Levers::Both)
}

/// What the agent may reclaim by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Levers {
    Reporting,
    Balloon,
    Both,
}

fn run_fleet(options: &str, levers: Levers) -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    fs::create_dir(folder.path().join("vms"))?;
    // Dropped after the guests in it.
    let group = Group::new()?;
    let agent = Agent::start(folder.path(), &group, levers != Levers::Reporting)?;
    let began = Instant::now();
    let mut guests = Vec::new();
    for number in 0..GUESTS {
        let name = format!("g{number}");
        agent.admit(&name)?;
        let mut guest = start(options, &group)?;
        let socket = folder.path().join(format!("vms/{name}.sock"));
        std::os::unix::fs::symlink(guest.vmm.socket(), socket)?;
        guest.command(&format!("alloc {BUSY_BYTES}"))?;
        guest.command("free")?;
        guest.command(&format!("alloc {KEPT_BYTES} seed={number}"))?;
        guests.push(guest);
    }
    let started = began.elapsed();
    // Where guests report, the host has enough without a balloon that could be given back.
    if levers == Levers::Balloon {
        let back = suffer(&agent, &mut guests[0])?;
        println!(
            "     memory given back {} ms after the need",
            back.as_millis()
        );
    }
    let resident: u64 = guests
        .iter()
        .map(|guest| guest.vmm.resident_bytes())
        .sum::<Result<_>>()?;
    println!(
        "     {GUESTS} guests of 512 MiB in {} MiB, up after {} s, {} MiB resident",
        HOST_BYTES / MIB,
        started.as_secs(),
        resident / MIB
    );
    ensure!(group.oom_kills()? == 0, "guests were killed");
    for guest in &mut guests {
        ensure!(!guest.vmm.has_ended()?, "a guest has ended");
        guest.command("verify")?;
    }
    Ok(Outcome::Passed)
}

fn start(options: &str, group: &Group) -> Result<Guest> {
    let machine = Machine {
        arguments: &["--balloon", options],
        ..Machine::default()
    };
    let vmm = machine.start()?;
    group.add(vmm.pid())?;
    let mut guest = Guest::on_socket(vmm, "serial.sock")?;
    guest.wait_init()?;
    guest.wait_serving()?;
    Ok(guest)
}

/// Has a guest with a balloon need what it gave; how long until the agent let go of some.
fn suffer(agent: &Agent, guest: &mut Guest) -> Result<Duration> {
    let balloon = agent.wait("a balloon in the first guest", |status| {
        let vm = vm(status, "g0")?;
        vm["actual"].as_u64().filter(|bytes| *bytes > 32 * MIB)
    })?;
    let free = guest.memory_bytes("available")?;
    let begin = Instant::now();
    // All that is left but a little, so that the guest is about to stall, and goes on needing it.
    guest.command(&format!("alloc {} seed=77", free.saturating_sub(12 * MIB)))?;
    agent.wait("memory given back", |status| {
        let now = vm(status, "g0")?["actual"].as_u64()?;
        (now < balloon).then_some(())
    })?;
    Ok(begin.elapsed())
}
