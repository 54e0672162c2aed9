//! Tests guests with our kernel patches.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::wait::wait_for;
use integration_tests::{paths, tests};
use serde_json::Value;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        patched_reporting_gives_memory_back,
        patched_guest_pauses_and_reports_as_asked,
    ]
}

/// The patched kernel reports immediately, but a busy machine is slow.
const RECLAIM_DEADLINE: Duration = Duration::from_secs(120);

fn resident(guest: &Guest) -> Result<u64> {
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    stats["resident_bytes"]
        .as_u64()
        .with_context(|| format!("no resident_bytes in {stats:#}"))
}

const KERNEL: &str = "patched/vmlinux";

fn no_patched_kernel() -> Option<Outcome> {
    let error = paths::guest(KERNEL).err()?;
    Some(Outcome::Skipped(format!("{error:#}")))
}

fn patched_reporting_gives_memory_back() -> Result<Outcome> {
    if let Some(skipped) = no_patched_kernel() {
        return Ok(skipped);
    }
    let mut guest = Machine {
        kernel: KERNEL,
        cpus: "boot=2",
        arguments: &["--balloon", "size=0,free_page_reporting=on"],
        command_line: "page_reporting.tracker=bitmap",
        ..Machine::default()
    }
    .serve()?;
    guest.command("alloc 300M seed=3")?;
    let touched = resident(&guest)?;
    ensure!(touched > 300 * MIB, "resident {} MiB", touched / MIB);
    guest.command("free")?;
    wait_for("the guest's memory on the host", RECLAIM_DEADLINE, || {
        Ok((resident(&guest)? < 150 * MIB).then_some(()))
    })?;
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    ensure!(
        stats["report"]["failed_bytes"].as_u64() == Some(0) && stats["reporting"]["active"] == true,
        "{stats:#}"
    );
    // The memory can be used again.
    guest.command("alloc 200M seed=4")?;
    guest.command("verify")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// The policy goes into the configuration space and comes into effect in a Linux guest.
fn patched_guest_pauses_and_reports_as_asked() -> Result<Outcome> {
    if let Some(skipped) = no_patched_kernel() {
        return Ok(skipped);
    }
    let balloon = "size=0,free_page_reporting=on,reporting_policy=on,stats_poll_ms=200";
    let mut guest = Machine {
        kernel: KERNEL,
        arguments: &["--balloon", balloon],
        command_line: "page_reporting.tracker=bitmap virtio_balloon.reporting_policy=1",
        ..Machine::default()
    }
    .serve()?;
    guest.command("alloc 300M seed=5")?;

    let paused = steer(&guest, "pause")?;
    ensure!(paused["paused_by"] == "guest", "{paused:#}");
    let before = figure(&guest, "/report/requested_bytes")?;
    guest.command("free")?;
    // The guest counts memory that it would report, but does not report it.
    wait_figure(&guest, "/guest/reporting/pending_bytes", |bytes| {
        bytes > 250 * MIB
    })?;
    ensure!(figure(&guest, "/report/requested_bytes")? == before);
    ensure!(resident(&guest)? > 300 * MIB);
    steer(&guest, "resume")?;
    wait_figure(&guest, "/resident_bytes", |bytes| bytes < 150 * MIB)?;

    // A guest whose threshold exceeds its free memory does not report until a full report is requested.
    set_policy(
        &guest,
        "\"delay_ms_max\": 3600000, \"pending_blocks\": 100000",
    )?;
    guest.command("alloc 300M seed=6")?;
    guest.command("free")?;
    wait_figure(&guest, "/guest/reporting/pending_bytes", |bytes| {
        bytes > 250 * MIB
    })?;
    ensure!(resident(&guest)? > 300 * MIB);
    steer(&guest, "report-now")?;
    wait_figure(&guest, "/resident_bytes", |bytes| bytes < 150 * MIB)?;
    guest.command("alloc 200M seed=7")?;
    guest.command("verify")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

fn steer(guest: &Guest, action: &str) -> Result<Value> {
    let body = format!("{{\"action\": \"{action}\"}}");
    let answer = guest
        .vmm
        .request("PUT", "vm.balloon-reporting", Some(&body))?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(serde_json::from_str(
        answer.body.as_deref().unwrap_or_default(),
    )?)
}

fn set_policy(guest: &Guest, settings: &str) -> Result<()> {
    let change = format!("{{\"reporting_policy\": {{{settings}}}}}");
    guest.vmm.put("vm.reclaim-thresholds", Some(&change))?;
    let mut policy = Value::Null;
    wait_for("the policy to be in effect", RECLAIM_DEADLINE, || {
        policy = guest.vmm.get("vm.reclaim-thresholds")?["reporting_policy"].clone();
        Ok((policy["in_effect"] == true).then_some(()))
    })
    .with_context(|| format!("{policy:#}"))
}

fn figure(guest: &Guest, path: &str) -> Result<u64> {
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    stats
        .pointer(path)
        .and_then(Value::as_u64)
        .with_context(|| format!("no {path} in {stats:#}"))
}

fn wait_figure(guest: &Guest, path: &str, condition: impl Fn(u64) -> bool) -> Result<()> {
    let mut last = 0;
    wait_for(path, RECLAIM_DEADLINE, || {
        // The guest's own figures arrive with its first statistics.
        last = figure(guest, path).unwrap_or(0);
        Ok(condition(last).then_some(()))
    })
    .with_context(|| format!("{path} is {last}"))
}
