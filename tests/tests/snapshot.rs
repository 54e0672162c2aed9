//! A VM is saved, its process ends, and a new process continues it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{SCENARIO_DEADLINE, expect_all_passed, kvm_opens, start};
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;
use serde_json::json;

const BALLOON: &[&str] = &["--balloon", "size=0,free_page_reporting=on"];

/// Pauses the VM, saves it into a new folder and ends its process. Returns the URL of the folder.
fn save(vmm: &mut Vmm) -> Result<String> {
    let folder = vmm.folder().join("saved");
    std::fs::create_dir(&folder)?;
    let url = format!("file://{}", folder.display());
    vmm.put("vm.pause", None)?;
    let body = json!({"destination_url": url}).to_string();
    vmm.put("vm.snapshot", Some(&body))?;
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    Ok(url)
}

fn resident_bytes(vmm: &Vmm) -> Result<u64> {
    let stats = vmm.get("vm.reclaim-stats")?;
    stats["resident_bytes"].as_u64().context("resident_bytes")
}

fn disk_bytes(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

#[test]
fn guest_saved_at_work_finishes_in_another_process() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut first = start("balloon", BALLOON)?;
    first.wait_api()?;
    wait_for("the first check", SCENARIO_DEADLINE, || {
        Ok(first.text("serial").contains("PASS ").then_some(()))
    })?;
    let url = save(&mut first)?;
    let before = first.text("serial");
    ensure!(!before.contains("DONE "), "it was to be saved at work");
    let restore = format!("source_url={url},resume=on");
    let mut second = Vmm::start(&["--restore", &restore])?;
    // The file of the serial port is emptied, as at a boot.
    let text = wait_for("the guest's closing line", SCENARIO_DEADLINE, || {
        let ended = second.has_ended()?;
        // The save may have cut a line in two.
        let text = before.clone() + &first.text("serial");
        let closing = text.split_once("DONE ");
        let done = closing.is_some_and(|(_, line)| line.contains('\n'));
        ensure!(
            done || !ended,
            "the VMM ended before the guest was done: {}",
            second.stderr()
        );
        Ok(done.then_some(text))
    })?;
    let passed = text.matches("PASS ").count();
    let done = format!("DONE {passed} passed, 0 failed");
    ensure!(
        passed > 0 && !text.contains("FAIL ") && text.contains(&done),
        "{done}: {text}"
    );
    second.expect_clean_exit(SCENARIO_DEADLINE)
}

#[test]
fn restored_guest_answers_and_what_it_gave_back_stays_given_back() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    for memory in ["size=256M", "size=256M,shared=on"] {
        let cmdline = ["--cmdline", "scenario=balloon stay", "--memory", memory];
        let mut first = start("balloon", &[BALLOON, &cmdline].concat())?;
        expect_all_passed(&mut first)?;
        first.get("vm.balloon-stats")?;
        let counters = first.get("vm.counters")?;
        let resident = resident_bytes(&first)?;
        let url = save(&mut first)?;
        let saved = disk_bytes(&first.folder().join("saved/memory-0"))?;
        ensure!(saved <= resident + resident / 20, "{saved} of {resident}");

        let second = Vmm::start(&[])?;
        let body = json!({"source_url": url}).to_string();
        second.put("vm.restore", Some(&body))?;
        ensure!(second.get("vm.info")?["state"] == "Paused");
        let after = resident_bytes(&second)?;
        ensure!(
            after <= resident + resident / 20,
            "{memory}: {after} of {resident}"
        );
        second.put("vm.resume", None)?;
        // The driver's queue, its interrupt and the guest itself go on.
        second.get("vm.balloon-stats")?;
        let now = second.get("vm.counters")?;
        for name in ["report_discarded_bytes", "inflate_discarded_bytes"] {
            let count = |of: &serde_json::Value| of["__balloon"][name].as_u64();
            ensure!(
                count(&now) >= count(&counters) && count(&now).is_some(),
                "{name}: {now:#}"
            );
        }
    }
    Ok(())
}

#[test]
fn damaged_snapshot_ends_the_process_with_its_name() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let cmdline = ["--cmdline", "scenario=balloon stay"];
    let mut first = start("balloon", &[BALLOON, &cmdline].concat())?;
    expect_all_passed(&mut first)?;
    let url = save(&mut first)?;
    let memory = first.folder().join("saved/memory-0");
    let mut bytes = std::fs::read(&memory)?;
    let at = bytes.iter().position(|byte| *byte != 0).context("data")?;
    bytes[at] ^= 1;
    std::fs::write(&memory, bytes)?;
    let mut second = Vmm::spawn(&["--restore", &format!("source_url={url}")])?;
    let status = second.wait_exit(PROCESS_DEADLINE)?;
    ensure!(!status.success());
    let told = second.stderr();
    ensure!(
        told.contains("memory file of zone mem0 is damaged"),
        "{told}"
    );
    Ok(())
}
