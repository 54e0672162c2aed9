//! Tests guests under the fleet agent, on a host (a control group) that is too small for all of them. After each guest
//! was busy once and all are idle, one of them needs its memory again.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use integration_tests::MIB;
use integration_tests::control_group::Group;
use integration_tests::fleet::{Agent, vm};
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

/// Six guests of 512 MiB, 3 GiB together.
const GUESTS: usize = 6;
/// Memory that each touches and frees, and memory that it then keeps: 2.4 GiB and 0.5 GiB together.
const BUSY_BYTES: u64 = 360 * MIB;
const KEPT_BYTES: u64 = 30 * MIB;
/// Limit of the host's memory, above which the kernel kills.
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

/// The means by which the agent may reclaim memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Levers {
    Reporting,
    Balloon,
    Both,
}

/// The agent's settings, other than its paths. On a busy emulated host, a balloon may grow as slowly as a stuck one
/// elsewhere.
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
        // A hard link to the socket, because the agent follows no symbolic links.
        fs::hard_link(guest.vmm.socket(), socket)?;
        guest.command(&format!("alloc {BUSY_BYTES}"))?;
        guest.command("free")?;
        guest.command(&format!("alloc {KEPT_BYTES} seed={number}"))?;
        guests.push(guest);
    }
    let started = began.elapsed();
    // If guests report, the host has enough memory without balloons.
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

/// Makes a guest with a balloon need its memory; returns the time until the agent shrinks the balloon.
fn suffer(agent: &Agent, guest: &mut Guest) -> Result<Duration> {
    let balloon = agent.wait("a balloon in the first guest", |status| {
        let vm = vm(status, "g0")?;
        vm["actual"].as_u64().filter(|bytes| *bytes > 32 * MIB)
    })?;
    let free = guest.memory_bytes("available")?;
    let begin = Instant::now();
    // Nearly all remaining memory, so that the guest is about to stall and keeps needing more.
    guest.command(&format!("alloc {} seed=77", free.saturating_sub(12 * MIB)))?;
    agent.wait("memory given back", |status| {
        let now = vm(status, "g0")?["actual"].as_u64()?;
        (now < balloon).then_some(())
    })?;
    Ok(begin.elapsed())
}
