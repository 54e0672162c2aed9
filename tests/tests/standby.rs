//! Tests `ch-fleet standby`, `wake` and `discard` with real VMMs: a VM is always its process or its folder, never both.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{SCENARIO_DEADLINE, image, kvm_opens};
use integration_tests::guest_at_work::{END_BYTES, expect_pass, has_ended, newest_round};
use integration_tests::literal_client::request;
use integration_tests::paths;
use integration_tests::vmm::PROCESS_DEADLINE;
use integration_tests::wait::wait_for;
use serde_json::{Value, json};
use tempfile::TempDir;
use test_skip::skip;

const VM: &str = "guest";

/// A host with an agent.
struct Host {
    folder: TempDir,
    agent: Child,
    /// Commands that have started a VMM.
    runs: Vec<Child>,
}

impl Drop for Host {
    fn drop(&mut self) {
        // The VMM does not end with the command that started it.
        if let Some(pid) = self.pid() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        for child in self.runs.iter_mut().chain([&mut self.agent]) {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Host {
    fn start() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("standby-").tempdir()?;
        fs::create_dir(folder.path().join("vms"))?;
        fs::create_dir(folder.path().join("standby"))?;
        write_settings(folder.path(), "")?;
        let agent = start_agent(folder.path())?;
        let host = Self {
            folder,
            agent,
            runs: Vec::new(),
        };
        host.wait_agent()?;
        Ok(host)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(paths::program("ch-fleet")?);
        command.arg("--socket").arg(self.path("agent.sock"));
        command.args(["--timeout", "60", "--output", "json"]);
        command.args(arguments).stdin(Stdio::null());
        Ok(command)
    }

    fn ask(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(arguments)?.output()?)
    }

    fn status(&self) -> Result<Value> {
        let output = self.ask(&["status"])?;
        ensure!(output.status.success(), "{output:?}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Kills the agent and starts another.
    fn replace_agent(&mut self) -> Result<()> {
        self.agent.kill()?;
        self.agent.wait()?;
        self.agent = start_agent(self.folder.path())?;
        self.wait_agent()
    }

    fn wait_agent(&self) -> Result<()> {
        wait_for("the agent", PROCESS_DEADLINE, || {
            let output = self.ask(&["reserve", "other", "--memory", "1M", "--dry-run"])?;
            let is_settled = output.status.success() || output.status.code() == Some(3);
            let told = String::from_utf8_lossy(&output.stderr);
            Ok((is_settled && !told.contains("has just started")).then_some(()))
        })
        .with_context(|| self.log())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    /// Runs `arguments` in the background, with its errors in a file.
    fn spawn(&mut self, arguments: &[&str], errors: &str) -> Result<usize> {
        let errors = fs::File::create(self.path(errors))?;
        let mut command = self.command(arguments)?;
        let child = command.stdout(Stdio::null()).stderr(errors).spawn()?;
        self.runs.push(child);
        Ok(self.runs.len() - 1)
    }

    /// Runs a guest that writes and verifies memory and a disk.
    fn run_guest(&mut self, memory: &str) -> Result<usize> {
        let run = self.run_scenario(memory, "scenario=chaos")?;
        self.wait_rounds(0)?;
        wait_for("the agent to know it", PROCESS_DEADLINE, || {
            Ok(self.vm()?.is_some_and(|vm| vm["up"] == true).then_some(()))
        })?;
        Ok(run)
    }

    fn run_scenario(&mut self, memory: &str, scenario: &str) -> Result<usize> {
        let disk = self.path("disk.raw");
        fs::File::create(&disk)?.set_len(1 << 20)?;
        let program = paths::program("cloud-hypervisor")?;
        let arguments = [
            "run".to_owned(),
            "--".to_owned(),
            text(&program)?,
            "--api-socket".to_owned(),
            text(&self.socket())?,
            "--kernel".to_owned(),
            text(&image()?)?,
            "--cmdline".to_owned(),
            scenario.to_owned(),
            "--memory".to_owned(),
            memory.to_owned(),
            "--balloon".to_owned(),
            "size=0,free_page_reporting=on".to_owned(),
            "--disk".to_owned(),
            format!("path={},image_type=raw", text(&disk)?),
            "--console".to_owned(),
            "off".to_owned(),
            "--serial".to_owned(),
            format!("file={}", text(&self.path("serial"))?),
        ];
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.spawn(&arguments, "run.log")
    }

    fn socket(&self) -> PathBuf {
        self.path(&format!("vms/{VM}.sock"))
    }

    /// The VM that runs, as the agent knows it.
    fn vm(&self) -> Result<Option<Value>> {
        let status = self.status()?;
        Ok(status["vms"]
            .as_array()
            .and_then(|vms| vms.first().cloned()))
    }

    /// The VM in standby.
    fn entry(&self) -> Result<Option<Value>> {
        let status = self.status()?;
        let entries = status["standby"].as_array();
        Ok(entries.and_then(|entries| entries.first().cloned()))
    }

    /// The process behind the VM's socket.
    fn pid(&self) -> Option<u64> {
        let answer = request(&self.socket(), "GET", "vmm.ping", None).ok()?;
        answer.json().ok()?["pid"].as_u64()
    }

    fn state(&self) -> Option<String> {
        let answer = request(&self.socket(), "GET", "vm.info", None).ok()?;
        Some(answer.json().ok()?["state"].as_str()?.to_owned())
    }

    /// Waits for a round of the guest after this one.
    fn wait_rounds(&self, after: u32) -> Result<u32> {
        wait_for("another round of the guest", SCENARIO_DEADLINE, || {
            let newest = newest_round(&self.serial())?;
            Ok(newest.filter(|newest| *newest > after))
        })
        .with_context(|| self.last_words())
    }

    fn last_words(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.path(name)).unwrap_or_default();
        format!("{}{}{}", read("run.log"), read("wake.log"), self.log())
    }

    fn standby(&self) -> Result<()> {
        let output = self.ask(&["standby", VM])?;
        ensure!(output.status.success(), "{output:?}\n{}", self.last_words());
        Ok(())
    }

    /// Wakes the VM, and waits until it runs.
    fn wake(&mut self) -> Result<usize> {
        self.wake_with(&[])
    }

    fn wake_with(&mut self, options: &[&str]) -> Result<usize> {
        let before = self.newest_round();
        let wake = self.spawn(&[&["wake", VM], options].concat(), "wake.log")?;
        self.wait_rounds(before)?;
        Ok(wake)
    }

    /// The guest's last round; its serial port's file is truncated when it is woken.
    fn newest_round(&self) -> u32 {
        newest_round(&self.serial()).ok().flatten().unwrap_or(0)
    }

    /// The output of the guest.
    fn serial(&self) -> String {
        let bytes = fs::read(self.path("serial")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Begins to wake the VM in standby, and waits until the agent has recorded that.
    fn begin_wake(&mut self) -> Result<usize> {
        let record = self.path("standby").join(VM).join("record.json");
        let wake = self.spawn(&["wake", VM], "wake.log")?;
        wait_for("the record", PROCESS_DEADLINE, || {
            let text = fs::read_to_string(&record).unwrap_or_default();
            Ok((!text.contains("\"standby\"")).then_some(()))
        })?;
        Ok(wake)
    }

    fn wait_end(&mut self, run: usize) -> Result<Option<i32>> {
        let child = &mut self.runs[run];
        let status = wait_for("the end of a command", PROCESS_DEADLINE, || {
            Ok(child.try_wait()?)
        });
        Ok(status.with_context(|| self.last_words())?.code())
    }

    /// Has the guest verify everything and end.
    fn expect_nothing_lost(&mut self, run: usize) -> Result<()> {
        let body = json!({"desired_balloon": END_BYTES}).to_string();
        let answer = request(&self.socket(), "PUT", "vm.resize", Some(&body))?;
        ensure!(answer.status == 204, "{answer:?}");
        let told = wait_for("the guest's closing line", SCENARIO_DEADLINE, || {
            let text = self.serial();
            Ok(has_ended(&text).then_some(text))
        })?;
        expect_pass(&told)?;
        ensure!(self.wait_end(run)? == Some(0), "{}", self.last_words());
        Ok(())
    }

    /// Waits until the VM is either its process or its folder, and not both. True: the folder.
    fn wait_one(&self) -> Result<bool> {
        wait_for("one VM", PROCESS_DEADLINE, || {
            let runs = self.state().as_deref() == Some("Running");
            let exists = self.pid().is_some();
            Ok(match self.entry()? {
                None if runs => Some(false),
                Some(entry) if entry["phase"] == "standby" && !exists => {
                    ensure!(entry["fault"].is_null(), "{entry}");
                    Some(true)
                }
                // An agent was killed after it had ordered the VMM to end.
                Some(entry) if !entry["fault"].is_null() && !exists => Some(true),
                _ => None,
            })
        })
        .with_context(|| self.last_words())
    }

    /// Names in the folder for VMs in standby, except removed ones.
    fn folders(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(self.path("standby"))?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let names: Result<Vec<String>> = names.collect();
        Ok(names?
            .into_iter()
            .filter(|name| !name.starts_with('.'))
            .collect())
    }
}

fn text(path: &Path) -> Result<String> {
    Ok(path.to_str().context("path is not UTF-8")?.to_owned())
}

fn write_settings(folder: &Path, more: &str) -> Result<()> {
    let (here, vmm) = (folder.display(), paths::program("cloud-hypervisor")?);
    let settings = format!(
        "[agent]\nsocket = '{here}/agent.sock'\nstate_dir = '{here}/state'\n\
         standby_dir = '{here}/standby'\nwake_command = ['{}']\nscan = '100ms'\nhost = '100ms'\n\
         standby_deadline = '60s'\n[discovery]\nsockets = ['{here}/vms/*.sock']\nany_program = true\n\
         [control]\nsample = '200ms'\n{more}",
        vmm.display()
    );
    Ok(fs::write(folder.join("agent.toml"), settings)?)
}

fn start_agent(folder: &Path) -> Result<Child> {
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(folder.join("agent.log"))?;
    Command::new(paths::program("ch-fleet")?)
        .args(["agent", "--config"])
        .arg(folder.join("agent.toml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context("starting ch-fleet")
}

#[test]
fn guest_in_standby_has_no_process_and_goes_on_when_it_is_woken() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut host = Host::start()?;
    let run = host.run_guest("size=256M")?;
    let pid = host.pid().context("a VMM")?;
    host.standby()?;
    ensure!(!Path::new(&format!("/proc/{pid}/status")).exists() || host.wait_end(run)? == Some(0));
    let status = host.status()?;
    ensure!(status["reservations"] == json!([]), "{status}");
    let entry = host.entry()?.context("the VM in standby")?;
    let disk = entry["disk"].as_u64().context("disk")?;
    ensure!(
        entry["memory"] == 256 << 20 && disk > 0 && disk < 256 << 20,
        "{entry}"
    );
    wait_for("the VM gone", PROCESS_DEADLINE, || {
        Ok(host.vm()?.is_none().then_some(()))
    })?;
    // Its name is not free.
    let refused = host.ask(&["reserve", VM, "--memory", "256M"])?;
    ensure!(refused.status.code() == Some(3), "{refused:?}");

    let wake = host.wake()?;
    ensure!(!host.wait_one()?);
    wait_for("the folder removed", PROCESS_DEADLINE, || {
        Ok(host.folders()?.is_empty().then_some(()))
    })?;
    // And once more.
    host.standby()?;
    ensure!(host.wait_end(wake)? == Some(0), "{}", host.last_words());
    let wake = host.wake()?;
    host.expect_nothing_lost(wake)
}

#[test]
fn two_that_wake_a_vm_get_one() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut host = Host::start()?;
    host.run_guest("size=256M")?;
    host.standby()?;
    let before = host.newest_round();
    let wakes = [
        host.spawn(&["wake", VM], "wake.log")?,
        host.spawn(&["wake", VM], "second.log")?,
    ];
    host.wait_rounds(before)?;
    let ended = wait_for("one that is refused", PROCESS_DEADLINE, || {
        for wake in wakes {
            if let Some(status) = host.runs[wake].try_wait()? {
                return Ok(Some((wake, status.code())));
            }
        }
        Ok(None)
    })?;
    let log = if ended.0 == wakes[0] {
        "wake.log"
    } else {
        "second.log"
    };
    let told = fs::read_to_string(host.path(log))?;
    // It came too late to find the VM in standby, or found its lock taken.
    let is_named = told.contains("wakes \"guest\"") || told.contains("in standby");
    ensure!(ended.1 != Some(0) && is_named, "{ended:?}: {told}");
    let left = wakes[usize::from(ended.0 == wakes[0])];
    host.expect_nothing_lost(left)
}

#[test]
fn agent_that_is_killed_at_any_moment_leaves_one_vm() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut host = Host::start()?;
    let mut run = host.run_guest("size=1G,prefault=on")?;
    for file in [
        "record.json",
        "snapshot/config.json",
        "snapshot/memory-0",
        "snapshot/state.json",
    ] {
        let path = host.path("standby").join(VM).join(file);
        let standby = host.spawn(&["standby", VM], "standby.log")?;
        wait_for(file, PROCESS_DEADLINE, || Ok(path.exists().then_some(())))
            .with_context(|| host.last_words())?;
        host.replace_agent()?;
        host.wait_end(standby)?;
        if host.wait_one().context(file)? {
            ensure!(host.wait_end(run)? == Some(0));
            run = host.wake_with(&["--force"]).context(file)?;
            ensure!(!host.wait_one()?);
        }
        wait_for("no folder", PROCESS_DEADLINE, || {
            Ok(host.folders()?.is_empty().then_some(()))
        })?;
        host.wait_rounds(host.newest_round())?;
    }
    host.expect_nothing_lost(run)
}

#[test]
fn agent_that_is_killed_while_a_vm_is_woken_leaves_one_vm() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut host = Host::start()?;
    host.run_guest("size=256M")?;
    host.standby()?;
    let before = host.newest_round();
    let wake = host.begin_wake()?;
    host.replace_agent()?;
    // The client got no answer if the agent was killed right after it wrote the record.
    let wake = match host.wait_one()? {
        true => host.wake()?,
        false => wake,
    };
    host.wait_rounds(before)?;
    host.expect_nothing_lost(wake)
}

#[test]
fn vm_that_finds_the_disk_full_runs_again() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut host = Host::start()?;
    let disk = host.path("standby");
    let mount = |arguments: &[&str]| {
        let mut command = Command::new(arguments[0]);
        let output = command.args(&arguments[1..]).arg(&disk).output();
        output.is_ok_and(|output| output.status.success())
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=128k", "small"]) {
        skip("no file system can be mounted");
        return Ok(());
    }
    let result = find_disk_full(&mut host);
    // Lazily, because a folder may still be removed.
    ensure!(mount(&["umount", "--lazy"]), "it cannot be unmounted");
    result
}

fn find_disk_full(host: &mut Host) -> Result<()> {
    let run = host.run_guest("size=256M")?;
    let output = host.ask(&["standby", VM])?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(told.contains("No space left on device"), "{told}");
    ensure!(!host.wait_one()?);
    ensure!(host.folders()?.is_empty());
    host.wait_rounds(host.newest_round())?;
    host.expect_nothing_lost(run)
}

#[test]
fn vmm_that_hangs_is_not_ended_and_runs_when_it_responds() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut host = Host::start()?;
    write_settings(host.folder.path(), "")?;
    let settings = fs::read_to_string(host.path("agent.toml"))?;
    fs::write(host.path("agent.toml"), settings.replace("'60s'", "'1s'"))?;
    host.replace_agent()?;
    let run = host.run_guest("size=256M")?;
    let pid = host.pid().context("a VMM")?.to_string();
    let signal = |name: &str| -> Result<()> {
        ensure!(Command::new("kill").args([name, &pid]).status()?.success());
        Ok(())
    };
    signal("-STOP")?;
    let output = host.ask(&["standby", VM])?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "{output:?}");
    ensure!(told.contains("did not respond"), "{told}");
    signal("-CONT")?;
    ensure!(!host.wait_one()?);
    host.wait_rounds(host.newest_round())?;
    host.expect_nothing_lost(run)
}

#[test]
fn vm_that_does_not_fit_or_does_not_start_sleeps_on() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut host = Host::start()?;
    host.run_guest("size=256M")?;
    host.standby()?;
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let kib = |name: &str| -> Result<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        let figure = line.and_then(|line| line.split_whitespace().next());
        Ok(figure.context(name.to_owned())?.parse()?)
    };
    // The agent does not count the pool of huge pages, which other tests have.
    let reserve = kib("MemTotal:")? - kib("Hugetlb:")? - (64 << 10);
    write_settings(
        host.folder.path(),
        &format!("[host]\nreserve = '{reserve}KiB'\n"),
    )?;
    ensure!(host.ask(&["reload"])?.status.success(), "{}", host.log());
    let refused = host.ask(&["wake", VM])?;
    ensure!(refused.status.code() == Some(3), "{refused:?}");
    ensure!(
        String::from_utf8_lossy(&refused.stderr).contains("refused"),
        "{refused:?}"
    );
    ensure!(host.wait_one()?);

    write_settings(host.folder.path(), "")?;
    ensure!(host.ask(&["reload"])?.status.success(), "{}", host.log());
    let failed = host.ask(&["wake", VM, "--wait", "30", "--", "false"])?;
    let told = String::from_utf8_lossy(&failed.stderr).into_owned();
    ensure!(failed.status.code() == Some(1), "{failed:?}");
    ensure!(told.contains("The VMM ended before the VM ran"), "{told}");
    ensure!(host.wait_one()?);
    ensure!(host.status()?["reservations"] == json!([]));

    // Without a confirmation, nothing is discarded.
    ensure!(host.ask(&["discard", VM])?.status.code() == Some(2));
    ensure!(host.folders()? == [VM]);
    ensure!(host.ask(&["discard", VM, "--yes"])?.status.success());
    ensure!(host.folders()?.is_empty() && host.entry()?.is_none());
    ensure!(host.ask(&["wake", VM])?.status.code() == Some(1));
    Ok(())
}

#[test]
fn client_that_is_killed_while_it_wakes_a_vm_leaves_one_vm() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut host = Host::start()?;
    host.run_guest("size=256M")?;
    host.standby()?;
    let before = host.newest_round();
    let wake = host.begin_wake()?;
    host.runs[wake].kill()?;
    host.runs[wake].wait()?;
    // Its VMM, if it has started one, loads the snapshot, and the agent resumes the VM.
    let wake = match host.wait_one()? {
        true => Some(host.wake()?),
        false => None,
    };
    host.wait_rounds(before)?;
    match wake {
        Some(wake) => host.expect_nothing_lost(wake),
        None => Ok(()),
    }
}

#[test]
fn guest_that_is_idle_goes_to_standby_by_itself() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut host = Host::start()?;
    // The agent's own requests keep a VMM without optimisation busy, too.
    let policy = "[policy.default]\nidle_standby = '2s'\nidle_cpu = '50%'\n";
    write_settings(host.folder.path(), policy)?;
    host.replace_agent()?;
    // When it has done its work, it waits for interrupts.
    let run = host.run_scenario("size=256M", "scenario=pci stay")?;
    wait_for("the VM in standby", SCENARIO_DEADLINE, || {
        let entry = host.entry()?;
        Ok(entry.filter(|entry| entry["phase"] == "standby").map(drop))
    })
    .with_context(|| host.last_words())?;
    ensure!(host.wait_end(run)? == Some(0));
    let events = host.ask(&["events"])?;
    let told = String::from_utf8_lossy(&events.stdout).into_owned();
    ensure!(told.contains("idle for "), "{told}");
    Ok(())
}
