//! `ch-fleet standby`, `wake` and `discard`: VMs whose memory is on disk.
//!
//! `wake` starts the VMM itself, as `run` does, so that the VM does not depend on the agent. It locks a file in the
//! VM's folder, and the VMM inherits the lock. The kernel releases the lock when both have ended, for any reason.
//! Therefore no VM is woken twice, and the agent knows when an attempt has failed.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use api::{Client, Endpoint};
use fleet::agent::{
    DiscardRequest, JournalPage, StandbyRequest, StandbyStatus, WakeAnswer, WakeRequest,
    WokenRequest,
};
use fleet::model::Bytes;
use fleet::standby::Phase;
use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::process::geteuid;
use serde::Deserialize;

use crate::args::{Output, WakeMode, WakeOptions};
use crate::ask::{Agent, Locked, Unknown, status_of};
use crate::output::print;
use crate::run;

/// Time between two looks at the agent's status.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Time between two requests to a VMM that loads a snapshot: short, because a client waits for the VM.
const ASK_AGAIN: Duration = Duration::from_millis(5);
/// The agent holds the lock for moments, to see whether another process does.
const LOCK: Duration = Duration::from_secs(1);
/// How long the agent has to notice that the VM was not woken.
const SETTLE: Duration = Duration::from_secs(10);
/// Time limit of a request to the VMM.
const VMM_DEADLINE: Duration = Duration::from_secs(10);

/// Puts a VM in standby, and waits until its memory is free.
pub(crate) fn standby(agent: &Agent, vm: &str, output: Output, out: &mut dyn Write) -> Result<()> {
    let before: JournalPage = agent.get("fleet.events?since=0")?;
    let request = StandbyRequest { vm: vm.to_owned() };
    agent.order("fleet.standby", Some(&api::to_ascii_json(&request)?))?;
    loop {
        let entry = find(agent, vm)?;
        match &entry {
            Some(entry) if entry.fault.is_none() => match entry.phase {
                Some(Phase::Standby) => {
                    return print(out, output, entry, |out| {
                        writeln!(out, "{vm} is in standby, {} on disk", entry.disk)
                    });
                }
                Some(Phase::Saving | Phase::Ending) => thread::sleep(LOOK_AGAIN),
                _ => return Err(not_saved(agent, vm, before.next)),
            },
            _ => return Err(not_saved(agent, vm, before.next)),
        }
    }
}

/// The reason, from the agent's events since then.
fn not_saved(agent: &Agent, vm: &str, since: u64) -> anyhow::Error {
    let page: Result<JournalPage> = agent.get(&format!("fleet.events?since={since}"));
    let entries = page.map(|page| page.entries).unwrap_or_default();
    let of_vm = entries
        .into_iter()
        .filter(|entry| entry.kind == "standby" && entry.vm == vm);
    let texts: Vec<String> = of_vm.map(|entry| entry.text).collect();
    anyhow::anyhow!("{vm:?} is not in standby: {}", texts.join("; "))
}

pub(crate) fn discard(agent: &Agent, vm: &str) -> Result<()> {
    let request = DiscardRequest { vm: vm.to_owned() };
    agent.order("fleet.discard", Some(&api::to_ascii_json(&request)?))
}

/// Wakes a VM, and waits for its end.
pub(crate) fn wake(agent: &Agent, options: &WakeOptions) -> Result<ExitCode> {
    let vm = options.vm.as_str();
    let entry = find(agent, vm)?.ok_or_else(|| Unknown::not_in_standby(vm))?;
    let lock = lock(&Path::new(&entry.folder).join("lock"), vm)?;
    let request = WakeRequest {
        vm: vm.to_owned(),
        min: options.min.map(Bytes),
        force: options.force,
    };
    let answer: WakeAnswer = run::retry(options.wait, || agent.put("fleet.wake", &request))?;
    let mut child = match start(agent, options, &answer) {
        Ok(child) => child,
        Err(error) => {
            run::release(agent, &answer.reservation);
            drop(lock);
            settle(agent, vm);
            return Err(error);
        }
    };
    eprintln!("{vm} runs as process {}", child.id());
    let status = run::wait(&mut child);
    run::release(agent, &answer.reservation);
    Ok(run::code_of(status?))
}

fn find(agent: &Agent, vm: &str) -> Result<Option<StandbyStatus>> {
    let standby = agent.status()?.standby;
    Ok(standby.into_iter().find(|entry| entry.vm == vm))
}

/// Takes the lock, such that a child process inherits it.
fn lock(path: &Path, vm: &str) -> Result<File> {
    let cannot = || format!("Cannot lock {}", path.display());
    let file = File::options()
        .write(true)
        .open(path)
        .with_context(cannot)?;
    let until = Instant::now() + LOCK;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(Errno::WOULDBLOCK) if Instant::now() < until => thread::sleep(ASK_AGAIN),
            Err(Errno::WOULDBLOCK) => return Err(Locked(vm.to_owned()).into()),
            Err(errno) => return Err(errno).with_context(cannot),
        }
    }
    fcntl_setfd(&file, FdFlags::empty()).with_context(cannot)?;
    Ok(file)
}

/// Waits until the agent knows that the VM was not woken, so that the next attempt can succeed.
fn settle(agent: &Agent, vm: &str) {
    let until = Instant::now() + SETTLE;
    while Instant::now() < until {
        match find(agent, vm) {
            Ok(Some(entry)) if entry.phase == Some(Phase::Waking) => thread::sleep(LOOK_AGAIN),
            _ => return,
        }
    }
}

/// Starts the VMM. When this returns, the VM runs, or the agent manages it.
fn start(agent: &Agent, options: &WakeOptions, answer: &WakeAnswer) -> Result<Child> {
    let mut command = command(options, answer)?;
    let mut child = run::start(&mut command)?;
    run::confirm(agent, &answer.reservation);
    let Err(error) = bring_up(agent, &options.vm, &answer.socket, &mut child) else {
        return Ok(child);
    };
    if may_kill(agent, &options.vm, &mut child)? {
        // It may have ended already.
        let _ = child.kill();
        run::wait(&mut child)?;
        return Err(error);
    }
    eprintln!("{}", api::chain_report("ch-fleet", error.as_ref()));
    Ok(child)
}

/// Whether the VMM has ended, or the agent agrees to its end. Otherwise the VM may be this process alone.
fn may_kill(agent: &Agent, vm: &str, child: &mut Child) -> Result<bool> {
    let request = woken(vm, child, true)?;
    let until = Instant::now() + SETTLE;
    while child.try_wait().is_ok_and(|ended| ended.is_none()) {
        match agent.order("fleet.woken", Some(&request)) {
            Ok(()) => return Ok(true),
            Err(error) if status_of(&error).is_some_and(|status| status < 500) => return Ok(false),
            Err(_) if Instant::now() < until => thread::sleep(LOOK_AGAIN),
            Err(_) => return Ok(false),
        }
    }
    Ok(true)
}

fn woken(vm: &str, child: &Child, failed: bool) -> Result<String> {
    let request = WokenRequest {
        vm: vm.to_owned(),
        pid: i32::try_from(child.id()).context("The process id is too large")?,
        failed,
    };
    Ok(api::to_ascii_json(&request)?)
}

fn command(options: &WakeOptions, answer: &WakeAnswer) -> Result<Command> {
    let mut command = match options.command.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
        None => {
            let own = geteuid().as_raw();
            ensure!(
                answer.uid == own,
                "The VMM ran as user {}, not {own}: after --, give a command that starts it as that user",
                answer.uid
            );
            let (program, arguments) = answer
                .command
                .split_first()
                .context("agent.wake_command is empty")?;
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
    };
    let mode = options.mode.unwrap_or_else(|| mode_of(&answer.snapshot));
    let mode = match mode {
        WakeMode::OnDemand => "ondemand",
        WakeMode::Copy => "copy",
    };
    let folder = answer.snapshot.display();
    command.arg("--api-socket").arg(&answer.socket);
    command.arg("--restore");
    command.arg(format!(
        "source_url=\"file://{folder}\",memory_restore_mode={mode}"
    ));
    Ok(command)
}

/// Loading on demand, if the configuration allows it. If it cannot be read, the VMM gives the reason.
fn mode_of(snapshot: &Path) -> WakeMode {
    let memory = run::read_config(&snapshot.join("config.json")).map(|config| config.memory);
    let Ok(memory) = memory else {
        return WakeMode::OnDemand;
    };
    let zones = memory.zones.iter().flatten();
    let mut zones = zones.map(|zone| zone.shared || zone.hugepages || zone.prefault);
    if memory.shared || memory.hugepages || memory.prefault || zones.any(|needs_copy| needs_copy) {
        WakeMode::Copy
    } else {
        WakeMode::OnDemand
    }
}

/// Waits until the VMM has loaded the snapshot, has the agent record that the VM is this process, and resumes it.
fn bring_up(agent: &Agent, vm: &str, socket: &Path, child: &mut Child) -> Result<()> {
    let client = Client::new(socket).with_timeout(Some(VMM_DEADLINE));
    let pid = i32::try_from(child.id()).context("The process id is too large")?;
    while !is_loaded(&client, pid, child)? {
        thread::sleep(ASK_AGAIN);
    }
    let request = woken(vm, child, false)?;
    let mut is_told = false;
    while let Err(error) = agent.order("fleet.woken", Some(&request)) {
        // Without a record that it runs, it must not run. An agent that was restarted has recorded and resumed it.
        if status_of(&error).is_some_and(|status| status < 500) {
            return match state(&client).as_deref() {
                Some("Running") => Ok(()),
                _ => Err(error),
            };
        }
        if !is_told {
            eprintln!("{}", api::chain_report("ch-fleet", error.as_ref()));
            eprintln!("{vm} stays paused until the agent responds");
            is_told = true;
        }
        require_alive(child)?;
        thread::sleep(LOOK_AGAIN);
    }
    // From here on the VM is this process. If it cannot be resumed now, the agent tries again.
    if let Err(error) = client.to_peer(pid).put("vm.resume", None)
        && state(&client).as_deref() != Some("Running")
    {
        eprintln!("{}", api::chain_report("ch-fleet", &error));
    }
    Ok(())
}

/// Whether the VM is there. It is paused, unless an agent that was restarted has resumed it.
fn is_loaded(client: &Client, pid: i32, child: &mut Child) -> Result<bool> {
    require_alive(child)?;
    let Ok((_, peer)) = client.get_with_peer(Endpoint::VmmPing) else {
        return Ok(false);
    };
    if peer.pid != pid {
        bail!(
            "Process {} listens at {}, not the VMM",
            peer.pid,
            client.socket().display()
        );
    }
    Ok(matches!(
        state(client).as_deref(),
        Some("Paused" | "Running")
    ))
}

fn state(client: &Client) -> Option<String> {
    #[derive(Deserialize)]
    struct Info {
        state: String,
    }
    let body = client.get("vm.info").ok()??;
    let info: Info = serde_json::from_str(&body).ok()?;
    Some(info.state)
}

fn require_alive(child: &mut Child) -> Result<()> {
    let ended = child.try_wait().context("Cannot wait for the VMM")?;
    match ended {
        None => Ok(()),
        Some(status) => bail!("The VMM ended before the VM ran: {status}"),
    }
}
