//! Tests several VMs from one snapshot, which share its pages.
//!
//! `CLONES=100` starts more of them. On a small host, whose memory is the limit:
//!
//! ```text
//! cargo xtask testbed run --memory 1536M --timeout 7200 -- env CLONES=100 target/release/vm-tests clones_of
//! ```

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::paths;
use integration_tests::serial::Serial;
use integration_tests::tests;
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;

use crate::balloon::{RECLAIM_DEADLINE, figure};
use crate::churn;
use crate::debian::DISTRIBUTION_DEADLINE;
use crate::snapshot::{Mode, end_vmm, restored, save};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        clones_of_a_snapshot_share_its_pages,
        debian_6_12_clones_of_a_snapshot_have_different_random_numbers,
    ]
}

const CLONES: u64 = 6;
/// Most memory of a clone that no other process has.
const GROWTH_MAX: u64 = 8 * MIB;
const TOUCHED_BYTES: u64 = 300 * MIB;

/// In each process, its serial port is a separate terminal.
const MACHINE: Machine<'_> = Machine {
    serial: "pty",
    arguments: &["--balloon", "size=0,free_page_reporting=on"],
    ..Machine::DEFAULT
};

/// The guest of a process that has one.
fn guest_of(vmm: Vmm) -> Result<Guest> {
    let path = wait_for("the terminal", PROCESS_DEADLINE, || {
        let answer = vmm.request("GET", "vm.info", None)?;
        // The API answers before the VM is created.
        if answer.status == 404 {
            return Ok(None);
        }
        let info = answer.json()?;
        let file = info["config"]["serial"]["file"].as_str();
        Ok(file.map(str::to_owned))
    })?;
    let serial = Serial::open(path.as_ref())?;
    Ok(Guest { vmm, serial })
}

fn resume(url: &str) -> Result<Guest> {
    let mut guest = guest_of(restored(url, Mode::CopyOnWrite.options())?)?;
    guest.vmm.put("vm.resume", None)?;
    guest.wait_serving()?;
    Ok(guest)
}

/// Memory of a process that no other one shares, in bytes.
fn private_bytes(vmm: &Vmm) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", vmm.pid()))?;
    let mut sum = 0;
    for line in text.lines().filter(|line| line.starts_with("Private_")) {
        let kib = line.split_whitespace().nth(1).context("a number")?;
        sum += kib.parse::<u64>()? << 10;
    }
    Ok(sum)
}

fn clones_of_a_snapshot_share_its_pages() -> Result<Outcome> {
    let count = churn::cycles("CLONES", CLONES)?;
    let folder = tempfile::tempdir()?;
    let mut first = guest_of(MACHINE.start()?)?;
    first.wait_init()?;
    first.wait_serving()?;
    let idle = figure(&first, "/resident_bytes")?;
    first.command(&format!("alloc {TOUCHED_BYTES}"))?;
    first.command("free")?;
    wait_for("the returned memory", RECLAIM_DEADLINE, || {
        let resident = figure(&first, "/resident_bytes")?;
        Ok((resident < idle + 32 * MIB).then_some(()))
    })?;
    first.vmm.put("vm.pause", None)?;
    let url = save(&first, &folder.path().join("saved"))?;
    end_vmm(&mut first)?;
    let mut clones = Vec::new();
    for number in 1..=count {
        let clone = resume(&url).with_context(|| format!("clone {number} of {count}"))?;
        clones.push(clone);
    }
    let private: Result<Vec<_>> = clones.iter().map(|it| private_bytes(&it.vmm)).collect();
    let mut private = private?;
    private.sort_unstable();
    let (middle, most) = (private[private.len() / 2], private[private.len() - 1]);
    println!(
        "     {count} clones; private memory of each: {} KiB in the middle, {} KiB at most",
        middle >> 10,
        most >> 10
    );
    ensure!(middle <= GROWTH_MAX, "{private:?}");
    // Each has its own memory.
    for (seed, clone) in clones.iter_mut().enumerate().take(8) {
        clone.command(&format!("alloc 16M seed={seed}"))?;
    }
    for clone in clones.iter_mut().take(8) {
        clone.command("verify")?;
        clone.end_cleanly()?;
    }
    Ok(Outcome::Passed)
}

/// Linux has the driver of the generation identifier since 5.18, and Debian builds it since 6.12.
fn debian_6_12_clones_of_a_snapshot_have_different_random_numbers() -> Result<Outcome> {
    let kernel = "debian-6.12/vmlinuz";
    if paths::guest(kernel).is_err() {
        return Ok(Outcome::Skipped(
            "this machine's Debian offers no kernel 6.12 for cloud guests".into(),
        ));
    }
    let folder = tempfile::tempdir()?;
    let machine = Machine { kernel, ..MACHINE };
    let mut first = guest_of(machine.start()?)?;
    first.expect("guest: init", DISTRIBUTION_DEADLINE)?;
    first.wait_serving()?;
    first.vmm.put("vm.pause", None)?;
    let url = save(&first, &folder.path().join("saved"))?;
    end_vmm(&mut first)?;
    let mut numbers = BTreeSet::new();
    for clone in 1..=3 {
        let mut guest = resume(&url)?;
        let text = guest.shell("echo number=$(cat /proc/sys/kernel/random/uuid)")?;
        let number = text
            .lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix("number="));
        let number = number.context("a number")?;
        ensure!(
            numbers.insert(number.to_owned()),
            "{number} again in clone {clone}"
        );
        guest.end_cleanly()?;
    }
    Ok(Outcome::Passed)
}
