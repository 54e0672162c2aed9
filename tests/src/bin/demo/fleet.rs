//! Runs three guests under one fleet agent, on a host with less memory than the guests have together. Each guest in
//! turn grows while the previous one frees its memory, and the agent's page shows it.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::control_group::Group;
use integration_tests::fleet::Agent;
use integration_tests::linux::{Guest, Machine};
use integration_tests::wait::wait_for;

const NAMES: [&str; 3] = ["web", "build", "database"];
/// Memory of each guest; 1536 MiB together.
const GUEST_MIB: u64 = 512;
/// Limit of the host's memory, above which the kernel kills.
const HOST_BYTES: u64 = 1200 * MIB;
/// Memory that a guest uses in its turn, in visible steps.
const STEP_BYTES: u64 = 75 * MIB;
const STEPS: u64 = 4;
/// Number of turns per guest.
const ROUNDS: usize = 2;
/// Mainline reports two seconds after a free, then a sixteenth every two seconds.
const RECLAIM_DEADLINE: Duration = Duration::from_secs(120);
/// Maximum resident memory of a guest that has freed its memory.
const IDLE_BYTES: u64 = 260 * MIB;
/// Time for the agent to serve its page, and for a picture of it to be taken.
const PAGE_DEADLINE: Duration = Duration::from_secs(120);

const SETTINGS: &str = "\
[control]
sample = '1s'
plan = '1s'
sample_deadline = '5s'
keep_min = '48MiB'
suffer_min = '24MiB'
[policy.default]
min = '128MiB'
floor = '128MiB'
";

/// The emulated host's address in QEMU's own network, to which a port is forwarded.
const EMULATED_ADDRESS: &str = "10.0.2.15";

/// Action after all turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then<'a> {
    End,
    /// Continue forever.
    Keep,
    /// Continue until this file exists.
    Until(&'a Path),
}

/// Runs the demonstration with the page on `port`.
pub(crate) fn run(port: &str, then: Then<'_>) -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::create_dir(folder.path().join("vms"))?;
    // Dropped after the guests in it.
    let group = Group::new(HOST_BYTES)?;
    let listen = format!("{}:{port}", address()?);
    let agent = Agent::start(folder.path(), &group, Some(&listen), SETTINGS)?;
    wait_for("the agent's page", PAGE_DEADLINE, || {
        Ok(std::net::TcpStream::connect(&listen).ok())
    })
    .with_context(|| agent.last_words())?;
    say(&format!("The fleet's page: http://127.0.0.1:{port}/"));

    let mut guests = Vec::new();
    for name in NAMES {
        agent.admit(name, &format!("{GUEST_MIB}M"))?;
        guests.push(start(name, folder.path(), &group)?);
        say(&format!("{name}: a guest of {GUEST_MIB} MiB has booted"));
    }
    let mut turns = 0;
    loop {
        turn(&mut guests, turns % NAMES.len())?;
        turns += 1;
        let is_done = turns >= ROUNDS * NAMES.len();
        if is_done
            && match then {
                Then::End => true,
                Then::Keep => false,
                Then::Until(file) => file.exists(),
            }
        {
            break;
        }
    }
    guests[(turns - 1) % NAMES.len()].command("free")?;
    let resident = wait_for("the guests' memory on the host", RECLAIM_DEADLINE, || {
        let all = resident(&guests)?;
        Ok((all < IDLE_BYTES * NAMES.len() as u64).then_some(all))
    })?;
    ensure!(group.oom_kills()? == 0, "the kernel has killed guests");
    for guest in &mut guests {
        guest.end()?;
    }
    println!(
        "{} guests of {GUEST_MIB} MiB shared a host of {} MiB: each used {} MiB more in turn, none was killed, and at \
         the end {} MiB are resident.",
        NAMES.len(),
        HOST_BYTES / MIB,
        STEP_BYTES * STEPS / MIB,
        resident / MIB
    );
    Ok(())
}

/// The guest of this number grows; the one before it has freed its memory.
fn turn(guests: &mut [Guest], number: usize) -> Result<()> {
    let before = (number + guests.len() - 1) % guests.len();
    guests[before].command("free")?;
    for step in 0..STEPS {
        // Waits for returned memory before each step.
        wait_for("room on the host", RECLAIM_DEADLINE, || {
            let all = resident(guests)?;
            Ok((all + STEP_BYTES + 64 * MIB < HOST_BYTES).then_some(()))
        })?;
        guests[number].command(&format!("alloc {STEP_BYTES} seed={step}"))?;
    }
    guests[number].command("verify")?;
    wait_for("the memory that was freed", RECLAIM_DEADLINE, || {
        let resident = guests[before].vmm.resident_bytes()?;
        Ok((resident < IDLE_BYTES).then_some(()))
    })?;
    say(&format!(
        "{} freed its memory, {} has grown by {} MiB: {} of {} MiB are resident",
        NAMES[before],
        NAMES[number],
        STEP_BYTES * STEPS / MIB,
        resident(guests)? / MIB,
        HOST_BYTES / MIB
    ));
    Ok(())
}

fn start(name: &str, folder: &Path, group: &Group) -> Result<Guest> {
    let vmm = Machine {
        arguments: &[
            "--balloon",
            "size=0,free_page_reporting=on,deflate_on_oom=on,stats_poll_ms=1000",
        ],
        ..Machine::default()
    }
    .start()?;
    group.add(vmm.pid())?;
    let mut guest = Guest::on_socket(vmm, "serial.sock")?;
    guest.wait_init()?;
    guest.wait_serving()?;
    // A hard link to the socket, because the agent follows no symbolic links.
    fs::hard_link(guest.vmm.socket(), folder.join(format!("vms/{name}.sock")))?;
    Ok(guest)
}

fn resident(guests: &[Guest]) -> Result<u64> {
    guests.iter().map(|guest| guest.vmm.resident_bytes()).sum()
}

/// The address on which the agent listens. In an emulated host, QEMU provides the network, which is set up here.
fn address() -> Result<&'static str> {
    if std::env::var_os("TESTBED").is_none_or(|testbed| testbed != "emulated") {
        return Ok("127.0.0.1");
    }
    let set_up = format!("ip addr add {EMULATED_ADDRESS}/24 dev eth0 && ip link set eth0 up");
    let status = Command::new("sh").args(["-c", &set_up]).status()?;
    ensure!(status.success(), "{set_up}: {status}");
    Ok(EMULATED_ADDRESS)
}

fn say(line: &str) {
    println!("{line}");
    // The reader may have disconnected, which is not an error.
    std::io::stdout().flush().ok();
}
