//! Tests moving a Linux guest between two hosts.
//!
//! `MIGRATIONS=200` makes the test of random moments longer, `STRESS_SEED=N` repeats its choices, and `RETURNED_MIB=3584`
//! has the guest of the other test return more:
//!
//! ```text
//! cargo xtask testbed run --timeout 7200 -- env MIGRATIONS=200 target/debug/vm-tests guest_moved
//! ```

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::migration::{EVENTS, wait_event};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::random::Random;
use integration_tests::tests;
use integration_tests::two_hosts::TwoHosts;
use integration_tests::vmm::PROCESS_DEADLINE;
use integration_tests::wait::wait_for;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::balloon::{RECLAIM_DEADLINE, figure, resize};
use crate::churn::{self, Churn, PROGRESS_DEADLINE};
use crate::snapshot::{expect_no_complaint, forget_complaints};
use crate::snapshot_cycles::disturb;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        guest_moved_at_random_moments_loses_no_byte_and_no_packet,
        guest_that_writes_faster_than_the_connection_moves_before_its_memory,
        guest_that_has_returned_memory_moves_without_it,
    ]
}

const MIGRATIONS: u64 = 4;
const RAM_BYTES: u64 = 256 * MIB;
const PREFIX: &str = "192.168.246";
const POSTCOPY_PREFIX: &str = "192.168.247";
const GUEST: &str = "192.168.246.2";

/// A figure of the event `migration-finished`.
fn reported(report: &Value, name: &str) -> Result<u64> {
    let text = report[name].as_str();
    let text = text.with_context(|| format!("no {name} in {report}"))?;
    Ok(text.parse()?)
}

/// The interval of [`Ping`], in milliseconds.
const PING_MS: u64 = 200;

/// Sends packets to the guest continuously.
struct Ping {
    process: Child,
    output: NamedTempFile,
}

impl Ping {
    fn start() -> Result<Self> {
        let output = NamedTempFile::new()?;
        let interval = format!("0.{PING_MS}");
        let process = Command::new("busybox")
            .args(["ping", "-i", &interval, GUEST])
            .stdout(Stdio::from(output.reopen()?))
            .spawn()
            .context("busybox ping")?;
        let ping = Self { process, output };
        ping.wait_answer()?;
        Ok(ping)
    }

    /// The number of the last packet that was answered.
    fn last(&self) -> Result<u64> {
        let text = std::fs::read_to_string(self.output.path())?;
        let numbers = text.split("seq=").skip(1);
        let numbers = numbers.filter_map(|it| it.split(' ').next()?.parse().ok());
        Ok(numbers.max().unwrap_or(0))
    }

    /// Waits until a packet is answered that was sent after this call.
    fn wait_answer(&self) -> Result<()> {
        let before = self.last()?;
        wait_for("answers of the guest", PROGRESS_DEADLINE, || {
            Ok((self.last()? > before + 2).then_some(()))
        })
    }

    /// Stops, and returns the numbers of packets sent and answered.
    fn stop(mut self) -> Result<(u64, u64)> {
        self.wait_answer()?;
        let pid = self.process.id().to_string();
        Command::new("kill").args(["-INT", &pid]).status()?;
        let process = &mut self.process;
        wait_for("the end of ping", PROCESS_DEADLINE, || {
            Ok(process.try_wait()?)
        })?;
        let text = std::fs::read_to_string(self.output.path())?;
        let count = |what: &str| -> Result<u64> {
            let before = text.split(what).next().unwrap_or_default();
            let number = before.split([' ', '\n']).rfind(|it| !it.is_empty());
            let number = number.with_context(|| format!("no {what:?} in {text}"))?;
            number.parse().with_context(|| text.clone())
        };
        Ok((count("packets transmitted")?, count("packets received")?))
    }
}

impl Drop for Ping {
    fn drop(&mut self) {
        // It has ended if it was stopped.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A guest on the first of the hosts, with a disk in `folder`.
fn start_guest(hosts: &TwoHosts, folder: &Path) -> Result<Guest> {
    let (serial, net) = hosts.arguments();
    let disk = churn::disk(folder)?;
    let vmm = Machine {
        vmm: Some(hosts.program(0)),
        cpus: "boot=2",
        memory: "size=256M",
        serial: &serial,
        command_line: "init_on_free=1",
        arguments: &[
            EVENTS,
            &["--disk", &disk, "--net", &net, "--balloon"],
            &["size=0,deflate_on_oom=on,free_page_reporting=on,free_page_hinting=on"],
        ]
        .concat(),
        ..Machine::default()
    }
    .start()?;
    let mut guest = hosts.guest_on(0, vmm)?;
    guest.wait_init()?;
    guest.wait_serving()?;
    guest.shell(&format!(
        "ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up"
    ))?;
    forget_complaints(&mut guest)?;
    Ok(guest)
}

/// The guest verifies memory and a disk, inflates its balloon and reports memory while it moves.
fn guest_moved_at_random_moments_loses_no_byte_and_no_packet() -> Result<Outcome> {
    let migrations = churn::cycles("MIGRATIONS", MIGRATIONS)?;
    let seed = churn::seed()?;
    let mut random = Random(seed);
    let folder = tempfile::tempdir()?;
    let hosts = TwoHosts::new("vmmove", PREFIX)?;
    let mut guest = start_guest(&hosts, folder.path())?;
    let mut churn = Churn::start(&mut guest, seed)?;
    let ping = Ping::start()?;
    let (mut downtimes, mut permitted) = (Vec::new(), 0);
    for number in 1..=migrations {
        let action = disturb(&guest, &mut random)?;
        churn.go_on(&mut guest, &mut random)?;
        // The guest writes faster than an emulated host sends.
        let settings = json!({
            "connections": 1 + random.below(3), "auto_converge": random.below(2) == 0,
            "timeout_s": 10, "timeout_strategy": "Ignore",
        });
        let host = (number % 2) as usize;
        let moved = hosts.move_to(host, guest, &settings);
        let (moved, report) = moved.with_context(|| format!("migration {number}, {action}"))?;
        guest = moved;
        guest.wait_serving().context(action)?;
        ping.wait_answer().context("after a migration")?;
        let downtime = reported(&report, "downtime_ms")?;
        // One was under way, and one may have come between two others.
        permitted += downtime.div_ceil(PING_MS) + 2;
        downtimes.push(downtime);
        churn.verify_disk(&mut guest)?;
    }
    let (sent, answered) = ping.stop()?;
    ensure!(
        sent - answered <= permitted,
        "{answered} of {sent} packets were answered; downtimes {downtimes:?} ms"
    );
    resize(&guest, 0)?;
    wait_for("all memory back in the guest", PROGRESS_DEADLINE, || {
        let info = guest.vmm.get("vm.info")?;
        Ok((info["memory_actual_size"] == RAM_BYTES).then_some(()))
    })?;
    churn.wait(&mut guest, 16)?;
    churn.stop(&mut guest)?;
    expect_no_complaint(&mut guest)?;
    println!(
        "     {} steps, {} MiB verified, {answered} of {sent} packets answered, downtimes {downtimes:?} ms",
        churn.steps,
        churn.verified_bytes / MIB
    );
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// A part of RAM follows the guest, which uses and discards memory in the meantime.
fn guest_that_writes_faster_than_the_connection_moves_before_its_memory() -> Result<Outcome> {
    let seed = churn::seed()?;
    let mut random = Random(seed);
    let folder = tempfile::tempdir()?;
    let hosts = TwoHosts::new("vmpost", POSTCOPY_PREFIX)?;
    let mut guest = start_guest(&hosts, folder.path())?;
    let mut churn = Churn::start(&mut guest, seed)?;
    let mut followed = Vec::new();
    for host in [1, 0] {
        churn.go_on(&mut guest, &mut random)?;
        let settings = json!({
            "memory_mode": "Postcopy", "downtime_ms": 1, "bytes_per_second_max": 32 * MIB,
        });
        let (moved, report) = hosts.move_to(host, guest, &settings)?;
        guest = moved;
        guest.wait_serving()?;
        let filled = wait_event(&guest.vmm, "memory-filled")?;
        let pages = ["demanded_pages", "filled_pages"].map(|name| reported(&filled, name));
        let [demanded, filled] = pages;
        let (demanded, filled) = (demanded?, filled?);
        ensure!(
            demanded + filled > 0,
            "no memory followed the guest: {report}"
        );
        followed.push((demanded, filled, reported(&report, "downtime_ms")?));
        let action = disturb(&guest, &mut random)?;
        churn.verify_disk(&mut guest).context(action)?;
    }
    resize(&guest, 0)?;
    churn.wait(&mut guest, 16)?;
    churn.stop(&mut guest)?;
    expect_no_complaint(&mut guest)?;
    println!(
        "     {} MiB verified; pages on demand, in the background, downtime in ms: {followed:?}",
        churn.verified_bytes / MIB
    );
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// Memory that the guest touches and returns, unless the environment sets the amount.
const RETURNED_MIB: u64 = 600;

/// The guest of 4 GiB is idle when it moves.
fn guest_that_has_returned_memory_moves_without_it() -> Result<Outcome> {
    let returned = churn::cycles("RETURNED_MIB", RETURNED_MIB)?;
    let hosts = TwoHosts::new("vmidle", "192.168.245")?;
    let image = NamedTempFile::new()?;
    File::set_len(image.as_file(), 16 * MIB)?;
    let machine = Machine {
        cpus: "boot=2",
        memory: "size=4G",
        ..Machine::default()
    };
    let mut guest = hosts.boot(&machine, image.path())?;
    // In huge pages: blocks that are free only in part are not reported.
    guest.command("alloc 48M seed=5 huge=always")?;
    let idle = figure(&guest, "/resident_bytes")?;
    guest.command_within(&format!("alloc {returned}M"), Duration::from_secs(600))?;
    guest.command("free 1")?;
    wait_for("the returned memory", RECLAIM_DEADLINE, || {
        let resident = figure(&guest, "/resident_bytes")?;
        Ok((resident < idle + 64 * MIB).then_some(()))
    })?;
    forget_complaints(&mut guest)?;
    let resident = figure(&guest, "/resident_bytes")?;
    let (mut guest, report) = hosts.move_to(1, guest, &json!({"downtime_ms": 50}))?;
    let wire = reported(&report, "wire_bytes")?;
    guest.wait_serving()?;
    let after = figure(&guest, "/resident_bytes")?;
    println!(
        "     {returned} MiB returned, {} MiB resident before, {} after: {report}",
        resident / MIB,
        after / MIB
    );
    ensure!(
        wire <= resident + resident / 10,
        "{wire} bytes sent of {resident} resident"
    );
    ensure!(
        after <= resident + resident / 10,
        "{after} bytes resident, {resident} before"
    );
    guest.command("verify")?;
    expect_no_complaint(&mut guest)?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}
