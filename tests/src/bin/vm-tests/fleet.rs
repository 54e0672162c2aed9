//! Guests under the fleet agent, on a host (a control group) too small for all of them: each
//! was busy once, then they idle, and one of them comes to need what it gave.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use integration_tests::fleet::{Agent, Group, vm};
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;

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

/// The agent's settings besides those of its places. On a busy emulated host a balloon may grow as
/// slowly as one that is stuck elsewhere.
fn settings(balloon: bool) -> String {
    format!(
        "[control]\nsample = '500ms'\nplan = '500ms'\nsample_deadline = '5s'\n\
         keep_min = '48MiB'\nsuffer_min = '24MiB'\nstep_part = '25%'\nstuck_rate = '1MiB'\n\
         [policy.default]\nmin = '128MiB'\nfloor = '128MiB'\nballoon = {balloon}\n"
    )
}

fn run_fleet(options: &str, levers: Levers) -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    fs::create_dir(folder.path().join("vms"))?;
    // Dropped after the guests in it.
    let group = Group::new(HOST_BYTES)?;
    let settings = settings(levers != Levers::Reporting);
    let agent = Agent::start(folder.path(), &group, None, &settings)?;
    let began = Instant::now();
    let mut guests = Vec::new();
    for number in 0..GUESTS {
        let name = format!("g{number}");
        agent.admit(&name, "512M")?;
        let mut guest = start(options, &group)?;
        let socket = folder.path().join(format!("vms/{name}.sock"));
        // A second name of the socket: the agent follows no symbolic links.
        fs::hard_link(guest.vmm.socket(), socket)?;
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
