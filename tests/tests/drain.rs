//! Tests `ch-fleet fleet drain --execute` with two agents, a real store and real VMMs on one machine: a VM runs on one host,
//! never on both and never on none.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use integration_tests::bare_metal::{SCENARIO_DEADLINE, image, kvm_opens};
use integration_tests::guest_at_work::{END_BYTES, expect_pass, has_ended, newest_round};
use integration_tests::literal_client::request;
use integration_tests::migration::free_port;
use integration_tests::paths;
use integration_tests::vmm::PROCESS_DEADLINE;
use integration_tests::wait::wait_for;
use serde_json::{Value, json};
use tempfile::TempDir;
use test_skip::skip;

const VM: &str = "guest";
const HOSTS: [&str; 2] = ["a", "b"];

/// Two hosts that share a store and a disk.
struct Fleet {
    folder: TempDir,
    store: Child,
    agents: [Option<Child>; 2],
    /// The command that started the VM.
    run: Option<Child>,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for host in 0..HOSTS.len() {
            // The VMM does not end with the agent or the command that started it.
            if let Some(pid) = self.pid(host) {
                let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
            }
        }
        let agents = self.agents.iter_mut().flatten();
        for child in agents.chain(&mut self.run).chain([&mut self.store]) {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A command that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether this machine has what the tests need.
fn can_run() -> bool {
    if !kvm_opens() {
        return false;
    }
    let etcd = Command::new("etcd").arg("--version").output();
    if let Err(error) = etcd {
        skip(format!("etcd does not start: {error}"));
        return false;
    }
    true
}

impl Fleet {
    fn start() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("drain-").tempdir()?;
        let client = format!("http://127.0.0.1:{}", free_port()?);
        let peer = format!("http://127.0.0.1:{}", free_port()?);
        let store = Command::new("etcd")
            .arg("--data-dir")
            .arg(folder.path().join("etcd"))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .args(["--log-level", "error", "--logger", "zap"])
            .stdin(Stdio::null())
            .spawn()
            .context("starting etcd")?;
        let mut fleet = Self {
            folder,
            store,
            agents: [None, None],
            run: None,
        };
        for host in 0..HOSTS.len() {
            fs::create_dir_all(fleet.path(host, "vms"))?;
            fleet.write_settings(host, &client)?;
            fleet.start_agent(host)?;
        }
        wait_for("both hosts", PROCESS_DEADLINE, || {
            let output = fleet.fleet(&["status"])?.output()?;
            let hosts: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            let hosts = hosts.as_array().cloned().unwrap_or_default();
            let there = hosts.iter().filter(|host| host["there"] == true);
            Ok((there.count() == HOSTS.len()).then_some(()))
        })
        .with_context(|| fleet.told())?;
        Ok(fleet)
    }

    fn path(&self, host: usize, name: &str) -> PathBuf {
        self.folder.path().join(HOSTS[host]).join(name)
    }

    fn write_settings(&self, host: usize, store: &str) -> Result<()> {
        let here = self.folder.path().join(HOSTS[host]);
        let vmm = paths::program("cloud-hypervisor")?;
        let (here, name, port) = (here.display(), HOSTS[host], free_port()?);
        // Other programs of this machine must not matter.
        let settings = format!(
            "[agent]\nsocket = '{here}/agent.sock'\nstate_dir = '{here}/state'\nscan = '100ms'\nhost = '100ms'\n\
             move_address = '127.0.0.1'\nmove_port = {port}\nmove_ports = 16\nmove_command = ['{}']\n\
             [discovery]\nsockets = ['{here}/vms/*.sock']\nany_program = true\n\
             [control]\nsample = '200ms'\nburst_prior = '0%'\n\
             [host]\nreserve = '0B'\n[admission]\nfacts_age_max = '30s'\n\
             [thresholds]\nyellow = {{ enter = '0.3%', leave = '0.4%' }}\norange = {{ enter = '0.2%', leave = '0.3%' }}\n\
             red = {{ enter = '0.1%', leave = '0.2%' }}\npressure_below = '0%'\n\
             [store]\nendpoints = ['{store}']\nhost = '{name}'\nlease = '5s'\n",
            vmm.display()
        );
        Ok(fs::write(self.path(host, "agent.toml"), settings)?)
    }

    fn start_agent(&mut self, host: usize) -> Result<()> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.path(host, "agent.log"))?;
        let child = Command::new(paths::program("ch-fleet")?)
            .args(["agent", "--config"])
            .arg(self.path(host, "agent.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("starting ch-fleet")?;
        self.agents[host] = Some(child);
        Ok(())
    }

    fn kill_agent(&mut self, host: usize) -> Result<()> {
        let mut agent = self.agents[host].take().context("an agent")?;
        agent.kill()?;
        agent.wait()?;
        Ok(())
    }

    /// `ch-fleet`, which asks this host's agent.
    fn local(&self, host: usize, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(paths::program("ch-fleet")?);
        command.arg("--socket").arg(self.path(host, "agent.sock"));
        command.args(["--timeout", "30", "--output", "json"]);
        command.args(arguments).stdin(Stdio::null());
        Ok(command)
    }

    /// `ch-fleet fleet`, which asks the store.
    fn fleet(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(paths::program("ch-fleet")?);
        command.args(["--timeout", "30", "--output", "json", "fleet", "--config"]);
        command.arg(self.path(0, "agent.toml"));
        command.args(arguments).stdin(Stdio::null());
        Ok(command)
    }

    fn drain(&self, host: usize) -> Result<Output> {
        Ok(self.fleet(&["drain", HOSTS[host], "--execute"])?.output()?)
    }

    fn undo(&self, host: usize) -> Result<()> {
        let output = self.fleet(&["drain", HOSTS[host], "--undo"])?.output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(())
    }

    fn status(&self, host: usize) -> Result<Value> {
        let output = self.local(host, &["status"])?.output()?;
        Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    /// Runs a guest that writes and verifies memory and a disk.
    fn run_guest(&mut self, host: usize) -> Result<()> {
        let disk = self.folder.path().join("disk.raw");
        fs::File::create(&disk)?.set_len(1 << 20)?;
        let mut command = self.local(host, &["run", "--"])?;
        command.arg(paths::program("cloud-hypervisor")?);
        command.arg("--api-socket").arg(self.socket(host));
        command.arg("--kernel").arg(image()?);
        command.args(["--cmdline", "scenario=chaos", "--memory", "size=256M"]);
        command.args(["--balloon", "size=0,free_page_reporting=on"]);
        command.args(["--disk", &format!("path={},image_type=raw", text(&disk)?)]);
        let serial = format!("file={}", text(&self.serial())?);
        command.args(["--console", "off", "--serial", &serial]);
        let log = fs::File::create(self.folder.path().join("run.log"))?;
        self.run = Some(command.stdout(Stdio::null()).stderr(log).spawn()?);
        self.wait_rounds(0)?;
        self.wait_known(host)
    }

    /// Waits until the agent knows the VM, and others know that it does.
    fn wait_known(&self, host: usize) -> Result<()> {
        wait_for("the VM in the store", PROCESS_DEADLINE, || {
            let output = self.fleet(&["status"])?.output()?;
            let hosts: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            let mut hosts = hosts.as_array().cloned().unwrap_or_default().into_iter();
            let known = hosts.any(|it| it["host"] == HOSTS[host] && it["vms"] == 1);
            let status = self.status(host)?;
            let is_up = status["vms"][0]["up"] == true;
            Ok((known && is_up).then_some(()))
        })
        .with_context(|| self.told())
    }

    fn socket(&self, host: usize) -> PathBuf {
        self.path(host, &format!("vms/{VM}.sock"))
    }

    fn serial(&self) -> PathBuf {
        self.folder.path().join("serial")
    }

    fn serial_text(&self) -> String {
        let bytes = fs::read(self.serial()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn pid(&self, host: usize) -> Option<u64> {
        let answer = request(&self.socket(host), "GET", "vmm.ping", None).ok()?;
        answer.json().ok()?["pid"].as_u64()
    }

    /// Whether the VM runs on this host.
    fn runs(&self, host: usize) -> bool {
        let info = request(&self.socket(host), "GET", "vm.info", None);
        let info = info.ok().and_then(|answer| answer.json().ok());
        info.is_some_and(|info| info["state"] == "Running")
    }

    fn wait_rounds(&self, after: u32) -> Result<()> {
        wait_for("another round of the guest", SCENARIO_DEADLINE, || {
            let newest = newest_round(&self.serial_text())?;
            Ok(newest.filter(|newest| *newest > after).map(drop))
        })
        .with_context(|| self.told())
    }

    /// The host on which the VM runs, if it runs on one and no other VMM is left.
    fn only_host(&self) -> Result<usize> {
        wait_for("one VMM", PROCESS_DEADLINE, || {
            let vmms: Vec<usize> = (0..HOSTS.len())
                .filter(|&host| self.pid(host).is_some())
                .collect();
            let runs: Vec<usize> = vmms
                .iter()
                .copied()
                .filter(|&host| self.runs(host))
                .collect();
            ensure!(runs.len() < 2, "it runs twice");
            Ok((vmms.len() == 1 && runs == vmms).then(|| runs[0]))
        })
        .with_context(|| self.told())
    }

    /// The guest goes on, after everything that it did before.
    fn expect_work(&self) -> Result<()> {
        let before = newest_round(&self.serial_text())?.unwrap_or(0);
        self.wait_rounds(before)
    }

    /// Has the guest verify everything and end.
    fn expect_nothing_lost(&self, host: usize) -> Result<()> {
        let body = json!({"desired_balloon": END_BYTES}).to_string();
        let answer = request(&self.socket(host), "PUT", "vm.resize", Some(&body))?;
        ensure!(answer.status == 204, "{answer:?}");
        let told = wait_for("the guest's closing line", SCENARIO_DEADLINE, || {
            let text = self.serial_text();
            Ok(has_ended(&text).then_some(text))
        })?;
        expect_pass(&told)
    }

    fn told(&self) -> String {
        let logs = HOSTS.iter().map(|host| {
            let path = self.folder.path().join(host).join("agent.log");
            let text = fs::read_to_string(path).unwrap_or_default();
            format!("--- {host}\n{text}")
        });
        let run = fs::read_to_string(self.folder.path().join("run.log")).unwrap_or_default();
        logs.chain([format!("--- run\n{run}")]).collect()
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("path is not UTF-8")
}

/// The VMs that have left, and those that stay.
fn drained(output: &Output) -> Result<Value> {
    serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))
}

#[test]
fn drained_host_has_no_vms_and_they_run_elsewhere() -> Result<()> {
    if !can_run() {
        return Ok(());
    }
    let mut fleet = Fleet::start()?;
    fleet.run_guest(0)?;
    let output = fleet.drain(0)?;
    ensure!(output.status.success(), "{output:?}\n{}", fleet.told());
    ensure!(drained(&output)? == json!({"moved": {VM: "b"}, "stay": {}}));
    ensure!(fleet.only_host()? == 1);
    fleet.expect_work()?;
    // The command that ran it ends as its VMM does, and nothing is reserved there any more.
    let mut run = fleet.run.take().context("the command")?;
    let status = wait_for("the end of a command", PROCESS_DEADLINE, || {
        Ok(run.try_wait()?)
    })?;
    ensure!(status.success(), "{status}");
    wait_for("no reservation on the source", PROCESS_DEADLINE, || {
        Ok((fleet.status(0)?["reservations"] == json!([])).then_some(()))
    })?;
    let events = fleet.local(1, &["events"])?.output()?;
    let events = String::from_utf8_lossy(&events.stdout).into_owned();
    ensure!(events.contains("b: starting"), "{events}");

    // And back: a host that is no longer drained takes it.
    fleet.undo(0)?;
    fleet.wait_known(1)?;
    let output = fleet.drain(1)?;
    ensure!(output.status.success(), "{output:?}\n{}", fleet.told());
    ensure!(fleet.only_host()? == 0);
    fleet.expect_work()?;
    fleet.expect_nothing_lost(0)
}

#[test]
fn vm_that_cannot_move_stays_and_the_reason_is_told() -> Result<()> {
    if !can_run() {
        return Ok(());
    }
    let mut fleet = Fleet::start()?;
    let output = fleet.fleet(&["drain", "nobody", "--execute"])?.output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(String::from_utf8_lossy(&output.stderr).contains("nobody"));
    // A host without VMs is done at once.
    let output = fleet.drain(1)?;
    ensure!(output.status.success(), "{output:?}");
    fleet.run_guest(0)?;
    // The other one is drained, too.
    let output = fleet.drain(0)?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let why = drained(&output)?["stay"][VM].to_string();
    ensure!(why.contains("being drained"), "{why}");
    fleet.undo(1)?;
    let put = |endpoint: &str| request(&fleet.socket(0), "PUT", endpoint, None);
    ensure!(put("vm.pause")?.status == 204);
    wait_for("the pause to be seen", PROCESS_DEADLINE, || {
        Ok((fleet.status(0)?["vms"][0]["interlock"] == "paused").then_some(()))
    })?;
    let output = fleet.drain(0)?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let why = drained(&output)?["stay"][VM].to_string();
    ensure!(why.contains("paused"), "{why}");
    ensure!(put("vm.resume")?.status == 204);
    ensure!(fleet.only_host()? == 0);
    fleet.expect_work()?;
    fleet.expect_nothing_lost(0)
}

#[test]
fn agent_that_is_killed_during_a_move_leaves_one_vm() -> Result<()> {
    if !can_run() {
        return Ok(());
    }
    let mut fleet = Fleet::start()?;
    fleet.run_guest(0)?;
    let (mut at, mut moves) = (0, 0);
    for phase in ["reserved", "starting", "receiving", "sending"] {
        for kills_source in [true, false] {
            let killed = if kills_source { at } else { 1 - at };
            let log = fs::File::create(fleet.folder.path().join("drain.log"))?;
            let mut command = fleet.fleet(&["drain", HOSTS[at], "--execute"])?;
            let told = fleet.folder.path().join("drained");
            let mut drain = Running(
                command
                    .stdout(fs::File::create(&told)?)
                    .stderr(log)
                    .spawn()?,
            );
            // A host that prepares too long gives up after a minute.
            wait_for(phase, SCENARIO_DEADLINE, || {
                let status = fleet.status(at)?;
                let now = status["moves"][0]["phase"].as_str().unwrap_or_default();
                let is_over = drain.0.try_wait()?.is_some();
                Ok((is_over || is_at_least(now, phase)).then_some(()))
            })
            .with_context(|| fleet.told())?;
            fleet.kill_agent(killed)?;
            fleet.start_agent(killed)?;
            wait_for("the end of the drain", SCENARIO_DEADLINE, || {
                Ok(drain.0.try_wait()?)
            })
            .with_context(|| format!("{phase} {killed}\n{}", fleet.told()))?;
            let now = fleet.only_host()?;
            let told: Value = serde_json::from_slice(&fs::read(&told)?)?;
            match now == at {
                true => ensure!(told["stay"][VM].is_string(), "{told}"),
                false => moves += 1,
            }
            fleet.expect_work()?;
            fleet.undo(at)?;
            at = now;
            fleet.wait_known(at)?;
        }
    }
    if moves == 0 {
        bail!("no VM has moved\n{}", fleet.told());
    }
    fleet.expect_nothing_lost(at)
}

/// Whether a move in phase `now` has reached `phase`.
fn is_at_least(now: &str, phase: &str) -> bool {
    let phases = ["reserved", "starting", "receiving", "sending", "arrived"];
    let place = |name| phases.iter().position(|it| *it == name);
    place(now).is_some_and(|now| place(phase).is_some_and(|phase| now >= phase))
}
