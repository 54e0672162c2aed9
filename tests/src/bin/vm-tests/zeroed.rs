//! Tests guests that do not clear memory which the host has zeroed.
//!
//! The guest checks every byte of fresh memory before it fills it, so that a page with old contents fails the test.

use std::io::Write as _;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::wait::wait_for;
use integration_tests::{paths, tests};

use crate::balloon::{RECLAIM_DEADLINE, figure, resize, wait_actual};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        zeroed_memory_is_not_cleared_again_and_reads_zero,
        zeroed_memory_reads_zero_with_inflation_pause_and_churn,
        reported_memory_that_is_not_zeroed_is_cleared_again,
        zeroed_memory_is_cleared_again_unless_both_sides_agree,
    ]
}

const KERNEL: &str = "patched/vmlinux";
const BALLOON: &str = "size=0,free_page_reporting=on,reporting_policy=on,device_init=on";
const PARAMETERS: &str = "virtio_balloon.reporting_policy=1 virtio_balloon.device_init=1";
/// Pages of 4 KiB in a MiB.
const PAGES: u64 = MIB / 4096;
/// Steps of the churn that end its part of the test.
const CHURN_STEPS: u64 = 60;

fn no_patched_kernel() -> Option<Outcome> {
    let error = paths::guest(KERNEL).err()?;
    Some(Outcome::Skipped(format!("{error:#}")))
}

fn serve(balloon: &str, parameters: &str, cpus: &str) -> Result<Guest> {
    Machine {
        kernel: KERNEL,
        cpus,
        arguments: &["--balloon", balloon],
        command_line: parameters,
        ..Machine::default()
    }
    .serve()
}

/// A figure of the guest's `/proc/vmstat`.
fn vmstat(guest: &mut Guest, name: &str) -> Result<u64> {
    let text = guest.shell(&format!("grep '^{name} ' /proc/vmstat"))?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = value.with_context(|| format!("no {name} in {text:?}"))?;
    Ok(value.trim().parse()?)
}

/// Pages that the guest's kernel did not clear, since boot.
fn uncleared(guest: &mut Guest) -> Result<u64> {
    vmstat(guest, "page_reporting_uncleared")
}

/// Frees all memory of the test and waits until the host has it.
fn return_all(guest: &mut Guest) -> Result<()> {
    guest.command("free")?;
    wait_for("the guest's memory on the host", RECLAIM_DEADLINE, || {
        Ok((figure(guest, "/resident_bytes")? < 170 * MIB).then_some(()))
    })
}

fn steer(guest: &Guest, action: &str) -> Result<()> {
    let body = format!("{{\"action\": \"{action}\"}}");
    guest.vmm.put("vm.balloon-reporting", Some(&body)).map(drop)
}

/// Fills memory with one pattern, returns it, and fills it with another; returns how many MiB the guest did not clear.
fn touch_again(guest: &mut Guest, huge: &str) -> Result<u64> {
    guest.command(&format!("alloc 200M seed=1 huge={huge}"))?;
    return_all(guest)?;
    let before = uncleared(guest)?;
    guest.command(&format!("alloc 200M seed=2 huge={huge}"))?;
    guest.command("verify")?;
    let pages = uncleared(guest)? - before;
    return_all(guest)?;
    Ok(pages / PAGES)
}

fn zeroed_memory_is_not_cleared_again_and_reads_zero() -> Result<Outcome> {
    if let Some(skipped) = no_patched_kernel() {
        return Ok(skipped);
    }
    for tracker in ["bitmap", "mainline"] {
        let parameters = format!("page_reporting.tracker={tracker} {PARAMETERS}");
        let mut guest = serve(BALLOON, &parameters, "boot=1")?;
        // Linux disables huge pages by default in a guest of this size.
        guest.shell("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")?;
        for huge in ["never", "always"] {
            let mib = touch_again(&mut guest, huge)?;
            let faults = vmstat(&mut guest, "thp_fault_alloc")?;
            ensure!(
                (faults > 0) == (huge == "always"),
                "{tracker}, huge pages {huge}: {faults} faults with huge pages"
            );
            ensure!(
                mib >= 100,
                "{tracker}, huge pages {huge}: the guest cleared all but {mib} of 200 MiB again"
            );
        }
        guest.end_cleanly()?;
    }
    Ok(Outcome::Passed)
}

fn zeroed_memory_reads_zero_with_inflation_pause_and_churn() -> Result<Outcome> {
    if let Some(skipped) = no_patched_kernel() {
        return Ok(skipped);
    }
    let mut guest = serve(
        BALLOON,
        &format!("page_reporting.tracker=bitmap {PARAMETERS}"),
        "boot=2",
    )?;

    // What the balloon held was not reported.
    guest.command("alloc 200M seed=1")?;
    return_all(&mut guest)?;
    for balloon in [200 * MIB, 0] {
        resize(&guest, balloon)?;
        wait_actual(&guest, 512 * MIB - balloon)?;
    }
    guest.command("alloc 200M seed=2")?;
    guest.command("verify")?;

    // What is freed during a pause keeps its contents on the host.
    steer(&guest, "pause")?;
    guest.command("free")?;
    let before = uncleared(&mut guest)?;
    guest.command("alloc 200M seed=3")?;
    guest.command("verify")?;
    let pages = uncleared(&mut guest)? - before;
    ensure!(pages < 100 * PAGES, "{} MiB count as zero", pages / PAGES);
    steer(&guest, "resume")?;
    return_all(&mut guest)?;

    // Free, reported, split, merged and allocated, by several threads at once.
    let before = uncleared(&mut guest)?;
    guest.command("churn-start 200M seed=4 threads=2")?;
    wait_for("the churn", 3 * RECLAIM_DEADLINE, || {
        let answer = guest.command("churn-status")?;
        let steps = answer
            .split(' ')
            .find_map(|word| word.strip_prefix("steps="));
        let steps: u64 = steps.context("no steps")?.parse()?;
        Ok((steps >= CHURN_STEPS).then_some(()))
    })?;
    guest.command("churn-stop")?;
    ensure!(uncleared(&mut guest)? > before);
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// Fills most memory with a pattern, frees it, waits until the device has completed most reports, and fills it with
/// another pattern; returns how many MiB the guest did not clear.
fn touch_most_after_reports(guest: &mut Guest) -> Result<u64> {
    guest.command("alloc 150M seed=1")?;
    let reported = figure(guest, "/report/requested_bytes")?;
    guest.command("free")?;
    wait_for("the reports", RECLAIM_DEADLINE, || {
        let bytes = figure(guest, "/report/requested_bytes")? - reported;
        Ok((bytes >= 110 * MIB).then_some(()))
    })?;
    let before = uncleared(guest)?;
    guest.command("alloc 150M seed=2")?;
    guest.command("verify")?;
    Ok((uncleared(guest)? - before) / PAGES)
}

fn reported_memory_that_is_not_zeroed_is_cleared_again() -> Result<Outcome> {
    if let Some(skipped) = no_patched_kernel() {
        return Ok(skipped);
    }
    // The driver has no policy, so the device completes reports without discarding.
    for tracker in ["bitmap", "mainline"] {
        let parameters = format!("page_reporting.tracker={tracker} virtio_balloon.device_init=1");
        let mut guest = Machine {
            kernel: KERNEL,
            memory: "size=256M",
            arguments: &["--balloon", BALLOON],
            command_line: &parameters,
            ..Machine::default()
        }
        .serve()?;
        steer(&guest, "pause")?;
        let mib = touch_most_after_reports(&mut guest)?;
        // The rest of the memory may be zero since it was reported at boot.
        ensure!(
            mib < 110,
            "{tracker}: {mib} MiB count as zero during a pause"
        );
        guest.command("free")?;
        guest.end_cleanly()?;
    }

    // Discarded memory of a private file shows the file again. A report with both kinds of memory is zeroed in part.
    let mut file = tempfile::NamedTempFile::new()?;
    for _ in 0..128 {
        file.write_all(&[0xa5; MIB as usize])?;
    }
    let zone = format!("id=file,size=128M,file={}", file.path().display());
    let zones = ["--memory-zone", "id=anonymous,size=128M", &zone];
    let mut guest = Machine {
        kernel: KERNEL,
        memory: "size=0",
        arguments: &[&["--balloon", BALLOON], zones.as_slice()].concat(),
        command_line: &format!("page_reporting.tracker=bitmap {PARAMETERS}"),
        ..Machine::default()
    }
    .serve()?;
    let mib = touch_most_after_reports(&mut guest)?;
    ensure!(
        mib <= 128,
        "{mib} MiB count as zero, more than the anonymous zone has"
    );
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

fn zeroed_memory_is_cleared_again_unless_both_sides_agree() -> Result<Outcome> {
    if let Some(skipped) = no_patched_kernel() {
        return Ok(skipped);
    }
    let tracker = "page_reporting.tracker=bitmap";
    let no_device = BALLOON.replace(",device_init=on", "");
    for (balloon, parameters) in [
        (no_device.as_str(), format!("{tracker} {PARAMETERS}")),
        (BALLOON, tracker.to_owned()),
        (BALLOON, format!("{tracker} {PARAMETERS} init_on_free=1")),
    ] {
        let mut guest = serve(balloon, &parameters, "boot=1")?;
        let mib = touch_again(&mut guest, "never")?;
        ensure!(
            mib == 0,
            "{balloon}, {parameters}: {mib} MiB were not cleared"
        );
        guest.end_cleanly()?;
    }
    Ok(Outcome::Passed)
}
