//! Time and memory from the start of a VMM that restores a guest on demand to the guest's first instruction and its first
//! answer. The figure `wake` is the time to the first instruction of a VM that `ch-fleet wake` starts.
//!
//! `cargo xtask bench --icount restore wake`

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{BOOT_DEADLINE, Guest, Machine};
use integration_tests::paths;
use integration_tests::serial::Serial;
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;
use serde_json::{Value, json};

use crate::compare::{rounded, side_by_side};
use crate::options::Asked;

/// Its name on the command line.
pub(crate) const NAME: &str = "restore";
pub(crate) const WAKE: &str = "wake";

const TURNS: usize = 3;
/// Pings of a guest; the first one after a start has one-time costs.
const PINGS: usize = 5;
const TAP: &str = "vmbench2";
const HOST: &str = "192.168.243.1";
const GUEST: &str = "192.168.243.2";
/// Memory with content in the snapshot.
const USED: &str = "64M";
/// The name of the VM that sleeps.
const SLEEPER: &str = "sleeper";

/// Restores a guest of 512 MiB in several turns. The snapshot records in the first one which pages the guest needs.
pub(crate) fn run(asked: &Asked<'_>) -> Result<Value> {
    asked.refuse_options()?;
    let folder = tempfile::tempdir()?;
    let here = folder.path();
    let mut warm = boot(here)?;
    eprintln!("{NAME}: booted");
    let ping = median(&mut warm_pings()?);
    let saved = resident_bytes(&warm.vmm)?;
    let url = save(&warm, &here.join("saved"))?;
    end(&mut warm)?;
    eprintln!("{NAME}: saved");
    let paused = resident_when_restored(&url)?;
    let mut turns = Vec::new();
    for _ in 0..TURNS {
        let turn = restore(here, &url, ping)?;
        eprintln!("{NAME}: restored, {turn}");
        turns.push(turn);
    }
    Ok(json!({
        "warm_ping_ms": ping,
        "resident_bytes_saved": saved,
        "resident_bytes_restored": paused,
        "first_restore": turns[0],
        "later_restores": side_by_side(&[turns[1..].to_vec()]),
    }))
}

/// Guest RAM on the host, measured.
pub(crate) fn resident_bytes(vmm: &Vmm) -> Result<u64> {
    let stats = vmm.get("vm.reclaim-stats")?;
    let bytes = stats["resident_bytes"].as_u64();
    bytes.with_context(|| format!("no resident_bytes in {stats}"))
}

fn serial(here: &Path) -> PathBuf {
    here.join("serial.sock")
}

/// The options of the VM in `here`.
fn arguments(here: &Path) -> Result<Vec<String>> {
    let image = here.join("disk.raw");
    File::create(&image)?.set_len(64 * MIB)?;
    let (disk, serial) = (
        format!("path={},image_type=raw", image.display()),
        format!("socket={}", serial(here).display()),
    );
    Machine {
        serial: &serial,
        arguments: &[
            "--balloon",
            "size=0,free_page_reporting=on",
            "--disk",
            &disk,
            "--net",
            &format!("tap={TAP},ip={HOST},mask=255.255.255.0"),
        ],
        ..Machine::default()
    }
    .vmm_arguments()
}

/// A guest with a network, which has answered.
fn boot(here: &Path) -> Result<Guest> {
    let arguments = arguments(here)?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let vmm = Vmm::start(&arguments)?;
    let serial = Serial::connect(&serial(here), BOOT_DEADLINE)?;
    let mut guest = Guest { vmm, serial };
    guest.wait_init()?;
    guest.wait_serving()?;
    set_up(&mut guest)?;
    Ok(guest)
}

fn set_up(guest: &mut Guest) -> Result<()> {
    guest.shell(&format!(
        "ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 20 {HOST}"
    ))?;
    guest.command(&format!("alloc {USED} seed=5")).map(drop)
}

/// Milliseconds until the guest answers a ping, including the question for its hardware address.
fn ping() -> Result<f64> {
    let forgotten = Command::new("ip")
        .args(["neigh", "flush", "dev", TAP])
        .status()?;
    ensure!(forgotten.success(), "ip neigh flush");
    let output = Command::new("busybox")
        .args(["ping", "-c", "1", "-W", "60", GUEST])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let time = text
        .split("time=")
        .nth(1)
        .and_then(|it| it.split(' ').next());
    let time = time.with_context(|| format!("no answer: {text}"))?;
    Ok(time.parse()?)
}

fn warm_pings() -> Result<Vec<f64>> {
    ping()?;
    (0..PINGS).map(|_| ping()).collect()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn save(guest: &Guest, folder: &Path) -> Result<String> {
    fs::create_dir(folder)?;
    let url = format!("file://{}", folder.display());
    guest.vmm.put("vm.pause", None)?;
    let body = json!({ "destination_url": url }).to_string();
    guest.vmm.put("vm.snapshot", Some(&body))?;
    Ok(url)
}

fn end(guest: &mut Guest) -> Result<()> {
    guest.vmm.put("vmm.shutdown", None)?;
    guest.vmm.expect_clean_exit(PROCESS_DEADLINE)
}

/// Resident guest RAM of a VM that was restored on demand and has not run.
fn resident_when_restored(url: &str) -> Result<u64> {
    let restore = format!("source_url={url},memory_restore_mode=ondemand,background_fill=off");
    let mut vmm = Vmm::start(&["--restore", &restore])?;
    wait_for("the restored VM", BOOT_DEADLINE, || {
        ensure!(!vmm.has_ended()?, "the VMM ended: {}", vmm.stderr());
        let info = vmm.request("GET", "vm.info", None)?.body;
        Ok(info.filter(|it| it.contains("Paused")).map(drop))
    })?;
    let resident = resident_bytes(&vmm)?;
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    Ok(resident)
}

/// One restore: milliseconds from the start of the process, and of the first ping.
fn restore(here: &Path, url: &str, warm: f64) -> Result<Value> {
    let events = Events::new(&here.join("events"))?;
    let begin = Instant::now();
    let restore = format!("source_url={url},memory_restore_mode=ondemand,resume=on");
    let monitor = format!("path={}", events.path.display());
    let vmm = Vmm::spawn(&["--event-monitor", &monitor, "--restore", &restore])?;
    let resumed = events
        .wait("resumed", || vmm.stderr())?
        .duration_since(begin);
    let first = ping()?;
    let mut guest = Guest {
        vmm,
        serial: Serial::connect(&serial(here), BOOT_DEADLINE)?,
    };
    guest.wait_serving()?;
    guest.command("verify")?;
    end(&mut guest)?;
    Ok(json!({
        "to_first_instruction_ms": ms(resumed),
        "first_ping_ms": first,
        "first_ping_to_warm": rounded(first / warm),
    }))
}

fn ms(time: Duration) -> f64 {
    rounded(time.as_secs_f64() * 1000.0)
}

/// The events of a VMM, read as soon as it writes them.
struct Events {
    path: PathBuf,
    /// Open for both directions: it does not wait for the other end.
    pipe: File,
}

impl Events {
    fn new(path: &Path) -> Result<Self> {
        if !path.exists() {
            let made = Command::new("mkfifo").arg(path).status()?;
            ensure!(made.success(), "mkfifo {}", path.display());
        }
        let pipe = File::options().read(true).write(true).open(path)?;
        Ok(Self {
            path: path.to_owned(),
            pipe,
        })
    }

    /// When this event came.
    fn wait(&self, name: &str, words: impl Fn() -> String) -> Result<Instant> {
        let pipe = self.pipe.try_clone()?;
        let wanted = format!("\"event\": \"{name}\"");
        let reader = std::thread::spawn(move || {
            BufReader::new(pipe)
                .lines()
                .map_while(Result::ok)
                .find(|line| line.contains(&wanted))
                .map(|_| Instant::now())
        });
        wait_for(name, BOOT_DEADLINE, || {
            Ok(reader.is_finished().then_some(()))
        })
        .with_context(words)?;
        let at = reader.join().ok().flatten();
        at.with_context(|| name.to_owned())
    }
}

/// An agent, ended when dropped.
struct Agent {
    children: Vec<Child>,
    socket: PathBuf,
}

impl Drop for Agent {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Agent {
    fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(paths::program("ch-fleet")?);
        command.arg("--socket").arg(&self.socket);
        command.args(["--timeout", "60", "--output", "json"]);
        command.args(arguments).stdin(Stdio::null());
        Ok(command)
    }

    fn spawn(&mut self, here: &Path, arguments: &[&str]) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(here.join("log"))?;
        let mut command = self.command(arguments)?;
        command.stdout(Stdio::null()).stderr(log);
        self.children.push(command.spawn()?);
        Ok(())
    }
}

/// Milliseconds from the start of `ch-fleet wake` to the guest's first instruction.
pub(crate) fn wake(asked: &Asked<'_>) -> Result<Value> {
    asked.refuse_options()?;
    let folder = tempfile::tempdir()?;
    let here = folder.path();
    let log = || fs::read_to_string(here.join("log")).unwrap_or_default();
    for name in ["vms", "standby"] {
        fs::create_dir(here.join(name))?;
    }
    let events = Events::new(&here.join("wake-events"))?;
    let (at, vmm) = (here.display(), paths::program("cloud-hypervisor")?);
    let settings = format!(
        "[agent]\nsocket = '{at}/agent.sock'\nstate_dir = '{at}/state'\nstandby_dir = '{at}/standby'\n\
         wake_command = ['{}', '--event-monitor', 'path={}']\n\
         [discovery]\nsockets = ['{at}/vms/*.sock']\nany_program = true\n",
        vmm.display(),
        events.path.display()
    );
    fs::write(here.join("agent.toml"), settings)?;
    let mut agent = Agent {
        children: Vec::new(),
        socket: here.join("agent.sock"),
    };
    let output = File::create(here.join("log"))?;
    let child = Command::new(paths::program("ch-fleet")?)
        .args(["agent", "--config"])
        .arg(here.join("agent.toml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output)
        .spawn()?;
    agent.children.push(child);
    wait_for("the agent", BOOT_DEADLINE, || {
        let output = agent
            .command(&["reserve", "other", "--memory", "1M", "--dry-run"])?
            .output()?;
        let told = String::from_utf8_lossy(&output.stderr);
        let is_settled = matches!(output.status.code(), Some(0 | 3));
        Ok((is_settled && !told.contains("has just started")).then_some(()))
    })
    .with_context(log)?;
    let socket = here.join("vms").join(format!("{SLEEPER}.sock"));
    let (vmm, socket) = (vmm.display().to_string(), socket.display().to_string());
    let arguments = arguments(here)?;
    let mut words = vec!["run", "--", &vmm, "--api-socket", &socket];
    words.extend(arguments.iter().map(String::as_str));
    agent.spawn(here, &words)?;
    let mut port = Serial::connect(&serial(here), BOOT_DEADLINE).with_context(log)?;
    port.expect("guest: init", BOOT_DEADLINE)?;
    eprintln!("{WAKE}: booted");
    let mut times = Vec::new();
    for _ in 0..TURNS {
        let mut last = String::new();
        wait_for("standby", BOOT_DEADLINE, || {
            let output = agent.command(&["standby", SLEEPER])?.output()?;
            last = String::from_utf8_lossy(&output.stderr).into_owned();
            Ok(output.status.success().then_some(()))
        })
        .with_context(|| last.clone())?;
        let begin = Instant::now();
        agent.spawn(here, &["wake", SLEEPER])?;
        let resumed = events.wait("resumed", log)?.duration_since(begin);
        eprintln!("{WAKE}: woken after {} ms", ms(resumed));
        times.push(json!({ "to_first_instruction_ms": ms(resumed) }));
    }
    Ok(side_by_side(&[times]))
}
