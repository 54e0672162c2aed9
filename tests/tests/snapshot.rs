//! Tests saving a VM, ending its process, and continuing it in a new process.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{SCENARIO_DEADLINE, expect_all_passed, kvm_opens, start};
use integration_tests::guest_at_work::{expect_nothing_lost, wait_rounds};
use integration_tests::migration::{EVENTS, wait_event};
use integration_tests::paths;
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;
use serde_json::json;
use test_skip::skip;

use crate::bad_input::HIDE_KVM;

/// Enough memory that saving takes a while, without any data in it.
const LARGE: &[&str] = &["--memory", "size=1G,prefault=on"];
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
    // The file of the serial port is truncated, as at boot.
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
        // The driver's queue, its interrupt and the guest itself continue to work.
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

#[test]
fn restore_without_kvm_still_names_the_path_that_does_not_open() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let cmdline = ["--cmdline", "scenario=balloon stay"];
    let mut first = start("balloon", &[BALLOON, &cmdline].concat())?;
    expect_all_passed(&mut first)?;
    let url = save(&mut first)?;
    let folder = first.folder().join("saved");
    let config = folder.join("config.json");
    let text = std::fs::read_to_string(&config)?;
    let serial = first.folder().join("serial");
    let missing = first.folder().join("missing/serial");
    let edited = text.replace(&*serial.to_string_lossy(), &missing.to_string_lossy());
    ensure!(edited != text, "{text}");
    std::fs::write(&config, edited)?;
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", HIDE_KVM, "sh"])
        .arg(paths::program("cloud-hypervisor")?)
        .args(["--restore", &format!("source_url={url}")])
        .output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "{told}");
    if told.contains("unshare: ") {
        skip(format!("no mount namespace: {told}"));
        return Ok(());
    }
    ensure!(told.contains(&*missing.to_string_lossy()), "{told}");
    Ok(())
}

/// A paused guest that has completed its scenario and stays.
fn paused(arguments: &[&str]) -> Result<Vmm> {
    let cmdline = ["--cmdline", "scenario=balloon stay"];
    let mut vmm = start("balloon", &[BALLOON, &cmdline, arguments].concat())?;
    expect_all_passed(&mut vmm)?;
    vmm.put("vm.pause", None)?;
    Ok(vmm)
}

#[test]
fn process_killed_during_the_export_leaves_no_snapshot_or_a_whole_one() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut vmm = paused(LARGE)?;
    let folder = tempfile::tempdir()?;
    let url = format!("file://{}", folder.path().display());
    let body = json!({"destination_url": url}).to_string();
    std::thread::scope(|scope| -> Result<()> {
        // There is no response, or it reports success.
        let request = scope.spawn(|| vmm.request("PUT", "vm.snapshot", Some(&body)).is_ok());
        wait_for("the memory file", SCENARIO_DEADLINE, || {
            Ok(folder.path().join("memory-0").exists().then_some(()))
        })?;
        vmm.killer()();
        drop(request.join());
        Ok(())
    })?;
    vmm.wait_exit(PROCESS_DEADLINE)?;
    let complete = folder.path().join("state.json").exists();
    let restore = format!("source_url={url}");
    let mut second = Vmm::spawn(&["--restore", &restore])?;
    if complete {
        return second.wait_api();
    }
    let status = second.wait_exit(PROCESS_DEADLINE)?;
    let told = second.stderr();
    ensure!(!status.success() && told.contains("state.json"), "{told}");
    Ok(())
}

#[test]
fn export_to_a_full_disk_fails_and_leaves_nothing() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let disk = tempfile::tempdir()?;
    let mount = |arguments: &[&str]| {
        let command = Command::new(arguments[0])
            .args(&arguments[1..])
            .arg(disk.path())
            .output();
        command.is_ok_and(|output| output.status.success())
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=64k", "small"]) {
        skip("no file system can be mounted");
        return Ok(());
    }
    let saved = save_to_full_disk(disk.path());
    ensure!(mount(&["umount"]), "it is still in use");
    saved
}

fn save_to_full_disk(folder: &Path) -> Result<()> {
    let vmm = paused(&["--event-monitor", "path=@/events"])?;
    let body = json!({"destination_url": format!("file://{}", folder.display())}).to_string();
    let refused = vmm.request("PUT", "vm.snapshot", Some(&body))?;
    ensure!(refused.status == 500, "{refused:?}");
    let causes = refused.json()?.to_string();
    ensure!(causes.contains("No space left on device"), "{causes}");
    ensure!(std::fs::read_dir(folder)?.next().is_none());
    ensure!(vmm.text("events").contains("snapshot-failed"));
    // The VM is unchanged.
    let other = tempfile::tempdir()?;
    let body = json!({"destination_url": format!("file://{}", other.path().display())}).to_string();
    vmm.put("vm.snapshot", Some(&body))?;
    vmm.put("vm.resume", None)?;
    vmm.get("vm.balloon-stats")?;
    Ok(())
}

#[test]
fn restored_vm_with_landlock_confines_every_thread_and_reads_no_other_folder() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let [inside, outside] = [tempfile::tempdir()?, tempfile::tempdir()?];
    let rule = format!("path={},access=rw", inside.path().display());
    let vmm = paused(&["--landlock", "--landlock-rules", &rule])?;
    let url = |folder: &Path| format!("file://{}", folder.display());
    let to = |folder| json!({"destination_url": url(folder)}).to_string();
    let refused = vmm.request("PUT", "vm.snapshot", Some(&to(outside.path())))?;
    ensure!(refused.status == 400, "{refused:?}");
    let folder = inside.path().join("saved");
    std::fs::create_dir(&folder)?;
    vmm.put("vm.snapshot", Some(&to(&folder)))?;
    // Its folder, with the file of the serial port, stays.
    vmm.put("vmm.shutdown", None)?;

    // Without a filter of system calls, only Landlock takes the right to gain privileges from a thread.
    let restore = format!("source_url={},resume=on", url(&folder));
    let mut second = Vmm::start(&["--seccomp", "false", "--restore", &restore])?;
    // The main thread is confined last.
    wait_for("rules on every thread", PROCESS_DEADLINE, || {
        ensure!(!second.has_ended()?, "{}", second.stderr());
        let mut all = true;
        for task in std::fs::read_dir(format!("/proc/{}/task", second.pid()))? {
            let status = std::fs::read_to_string(task?.path().join("status"))?;
            all &= status.contains("Name:\tkvm-") || status.contains("NoNewPrivs:\t1");
        }
        Ok(all.then_some(()))
    })?;
    second.put("vm.delete", None)?;
    let from = json!({"source_url": url(outside.path())}).to_string();
    let refused = second.request("PUT", "vm.restore", Some(&from))?;
    let causes = refused.json()?.to_string();
    ensure!(
        refused.status == 400 && causes.contains("outside the Landlock rules"),
        "{causes}"
    );
    let from = json!({"source_url": url(&folder), "resume": true}).to_string();
    second.put("vm.restore", Some(&from))?;
    second.get("vm.balloon-stats").map(drop)
}

/// A guest that has written 64 MiB and waits, saved into a folder.
fn saved_with_data() -> Result<(Vmm, String)> {
    let mut first = start("reread", BALLOON)?;
    first.wait_api()?;
    wait_for("the guest's data", SCENARIO_DEADLINE, || {
        let written = first.text("serial").contains("PASS reread_written");
        Ok(written.then_some(()))
    })?;
    let url = save(&mut first)?;
    Ok((first, url))
}

/// Has the restored guest check its data. `first` has the file of the serial port.
fn expect_data(first: &Vmm, mut restored: Vmm) -> Result<()> {
    restored.put("vm.resume", None)?;
    restored.put("vm.resize", Some(r#"{"desired_balloon": 1048576}"#))?;
    let text = wait_for("the guest's closing line", SCENARIO_DEADLINE, || {
        let ended = restored.has_ended()?;
        let text = first.text("serial");
        let closing = text.split_once("DONE ");
        let done = closing.is_some_and(|(_, line)| line.contains('\n'));
        ensure!(done || !ended, "the VMM ended: {}", restored.stderr());
        Ok(done.then_some(text))
    })?;
    ensure!(
        text.contains(", 0 failed") && text.contains("PASS reread_finds_what"),
        "{text}"
    );
    restored.expect_clean_exit(SCENARIO_DEADLINE)
}

fn on_demand(url: &str, background: &str) -> Vec<String> {
    let restore =
        format!("source_url={url},memory_restore_mode=ondemand,background_fill={background}");
    vec!["--restore".to_owned(), restore]
}

fn start_on_demand(url: &str, background: &str, more: &[&str]) -> Result<Option<Vmm>> {
    if std::fs::File::open("/dev/userfaultfd").is_err() {
        skip("/dev/userfaultfd does not open");
        return Ok(None);
    }
    let arguments = on_demand(url, background);
    let mut all: Vec<&str> = arguments.iter().map(String::as_str).collect();
    all.extend(more);
    let vmm = Vmm::start(&all)?;
    wait_for("the restored VM", PROCESS_DEADLINE, || {
        let info = vmm.request("GET", "vm.info", None)?;
        let paused = info
            .body
            .is_some_and(|body| body.contains(r#""state":"Paused""#));
        Ok(paused.then_some(()))
    })?;
    Ok(Some(vmm))
}

#[test]
fn guest_restored_on_demand_discards_while_its_memory_comes() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (first, url) = saved_with_data()?;
    let saved = disk_bytes(&first.folder().join("saved/memory-0"))?;
    for background in ["off", "on"] {
        let events = ["--event-monitor", "path=@/events"];
        let Some(vmm) = start_on_demand(&url, background, &events)? else {
            return Ok(());
        };
        match background {
            "off" => {
                let resident = resident_bytes(&vmm)?;
                ensure!(resident <= saved / 10, "{resident} of {saved} bytes came");
            }
            _ => wait_for("the rest of the memory", PROCESS_DEADLINE, || {
                let filled = vmm.text("events").contains("memory-filled");
                Ok(filled.then_some(()))
            })?,
        }
        expect_data(&first, vmm).context(background)?;
        // The order of the first run, which the next one follows.
        let order = std::fs::read_to_string(first.folder().join("saved/touched.json"))?;
        ensure!(order.lines().count() == 2, "{order}");
    }
    Ok(())
}

#[test]
fn guests_restored_by_copy_on_write_share_a_snapshot_and_discard_their_own() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (first, url) = saved_with_data()?;
    let memory = first.folder().join("saved/memory-0");
    let before = std::fs::read(&memory)?;
    // One after the other: they write to the same file of the serial port.
    for _ in 0..2 {
        let vmm = Vmm::start(&[])?;
        let body = json!({"source_url": url, "memory_restore_mode": "CopyOnWrite"}).to_string();
        vmm.put("vm.restore", Some(&body))?;
        expect_data(&first, vmm)?;
    }
    ensure!(
        std::fs::read(&memory)? == before,
        "the snapshot has changed"
    );
    Ok(())
}

#[test]
fn guest_saved_while_its_memory_comes_is_saved_with_all_of_it() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (first, url) = saved_with_data()?;
    let Some(mut second) = start_on_demand(&url, "off", &[])? else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let url = format!("file://{}", folder.path().display());
    let body = json!({"destination_url": url}).to_string();
    second.put("vm.snapshot", Some(&body))?;
    second.put("vmm.shutdown", None)?;
    second.expect_clean_exit(PROCESS_DEADLINE)?;
    let third = Vmm::start(&[])?;
    let body = json!({"source_url": url}).to_string();
    third.put("vm.restore", Some(&body))?;
    expect_data(&first, third)
}

#[test]
fn memory_that_cannot_come_ends_the_vm_with_its_name() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (first, url) = saved_with_data()?;
    let memory = first.folder().join("saved/memory-0");
    let sound = std::fs::read(&memory)?;
    let damaged = || {
        let mut bytes = sound.clone();
        // In the middle of the guest's data, each piece with a checksum of 2 MiB.
        for at in (96 << 20..98 << 20).step_by(16 << 10) {
            bytes[at + 1] ^= 1;
        }
        bytes
    };
    let is_damaged = "memory file of zone mem0 is damaged at offset 0x6000000";
    let is_cut = "Cannot access the memory file of zone mem0";
    for (saves, content, word) in [
        (false, damaged(), is_damaged),
        (true, damaged(), is_damaged),
        (false, Vec::new(), is_cut),
    ] {
        std::fs::write(&memory, &sound)?;
        let events = ["--event-monitor", "path=@/events"];
        let Some(mut vmm) = start_on_demand(&url, "off", &events)? else {
            return Ok(());
        };
        // Damage after the start is detected as well.
        std::fs::write(&memory, content)?;
        if saves {
            // Everything has to come.
            let folder = tempfile::tempdir()?;
            let url = format!("file://{}", folder.path().display());
            let body = json!({"destination_url": url}).to_string();
            let refused = vmm.request("PUT", "vm.snapshot", Some(&body))?;
            ensure!(refused.status == 500, "{refused:?}");
            ensure!(std::fs::read_dir(folder.path())?.next().is_none());
        } else {
            vmm.put("vm.resume", None)?;
            // Has no answer if the VM has already ended.
            let wakes = r#"{"desired_balloon": 1048576}"#;
            vmm.request("PUT", "vm.resize", Some(wakes)).ok();
        }
        let status = vmm.wait_exit(SCENARIO_DEADLINE)?;
        let told = vmm.stderr();
        ensure!(!status.success() && told.contains(word), "{status}: {told}");
        let text = first.text("serial");
        ensure!(
            !text.contains("FAIL "),
            "the guest saw another page: {text}"
        );
        ensure!(vmm.text("events").contains("memory-fill-failed"));
    }
    Ok(())
}

/// A guest that writes and verifies memory and the disk `image` in its folder.
fn guest_at_work(vmm_arguments: &[&str]) -> Result<Vmm> {
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(1 << 20)?;
    // Deleted with the folder of temporary files: the VMM keeps it open, and a copy is used afterwards.
    let (_, path) = image.keep()?;
    let disk = format!("path={},image_type=raw", path.display());
    let mut vmm = start(
        "chaos",
        &[&["--disk", &disk], BALLOON, EVENTS, vmm_arguments].concat(),
    )?;
    vmm.wait_api()?;
    wait_rounds(&vmm, "serial", 0)?;
    Ok(vmm)
}

/// The path of the VM's disk.
fn image_of(vmm: &Vmm) -> Result<String> {
    let info = vmm.get("vm.info")?;
    let path = info["config"]["disks"][0]["path"].as_str();
    path.map(str::to_owned).context("a disk")
}

/// Saves the running VM into a new folder `name`, while the balloon is resized continuously.
fn save_live(vmm: &Vmm, name: &str, more: &serde_json::Value) -> Result<std::path::PathBuf> {
    let folder = vmm.folder().join(name);
    std::fs::create_dir(&folder)?;
    let mut body = json!({"destination_url": format!("file://{}", folder.display()), "live": true});
    if let (Some(body), Some(more)) = (body.as_object_mut(), more.as_object()) {
        body.extend(more.clone());
    }
    let body = body.to_string();
    let answer = std::thread::scope(|scope| {
        let request = scope.spawn(|| vmm.request("PUT", "vm.snapshot", Some(&body)));
        let mut pages = 0_u64;
        while !request.is_finished() {
            pages = (pages + 100) % 250;
            let body = json!({"desired_balloon": pages * 4096}).to_string();
            vmm.put("vm.resize", Some(&body))?;
        }
        request
            .join()
            .map_err(|_| anyhow::anyhow!("the request panicked"))?
    })?;
    ensure!(answer.status == 204, "{answer:?}\n{}", vmm.stderr());
    Ok(folder)
}

/// Changes the paths of the saved VM, so that it can run at the same time as the first one.
fn move_paths(folder: &Path, image: &Path, serial: &Path) -> Result<()> {
    let path = folder.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    config["disks"][0]["path"] = json!(image);
    config["serial"]["file"] = json!(serial);
    std::fs::write(&path, config.to_string())?;
    Ok(())
}

#[test]
fn guest_saved_while_it_runs_continues_here_and_from_the_snapshot() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    for memory in ["size=256M", "size=256M,shared=on"] {
        let first = guest_at_work(&["--memory", memory])?;
        let image = image_of(&first)?;
        let before = wait_rounds(&first, "serial", 0)?;
        let saved = save_live(&first, "saved", &json!({"keep_paused": true}))?;
        let report = wait_event(&first, "snapshotted")?;
        println!("     {memory}: {report}");
        let passes: u32 = report["passes"].as_str().context("passes")?.parse()?;
        ensure!(passes >= 2, "{report}");
        ensure!(first.get("vm.info")?["state"] == "Paused");
        let copy = first.folder().join("copy");
        std::fs::copy(&image, &copy)?;
        std::fs::remove_file(&image)?;
        let serial = first.folder().join("serial2");
        move_paths(&saved, &copy, &serial)?;
        first.put("vm.resume", None)?;

        let second = Vmm::start(&[])?;
        let body = json!({"source_url": format!("file://{}", saved.display()), "resume": true});
        second.put("vm.restore", Some(&body.to_string()))?;
        // Both continue.
        wait_rounds(&first, "serial2", before)?;
        wait_rounds(&first, "serial", before)?;
        expect_nothing_lost(&first, "serial2", &second)?;
        expect_nothing_lost(&first, "serial", &first)?;
    }
    Ok(())
}

#[test]
fn running_vm_whose_image_would_change_is_not_saved_live_and_a_failure_leaves_it_running()
-> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let first = guest_at_work(&[])?;
    std::fs::remove_file(image_of(&first)?)?;
    let folder = tempfile::tempdir()?;
    let url = format!("file://{}", folder.path().display());
    for (more, word) in [
        (json!({}), "pause it before it is saved"),
        (json!({"live": true}), "set keep_paused"),
    ] {
        let mut body = json!({"destination_url": url});
        if let (Some(body), Some(more)) = (body.as_object_mut(), more.as_object()) {
            body.extend(more.clone());
        }
        let refused = first.request("PUT", "vm.snapshot", Some(&body.to_string()))?;
        let told = refused.json()?.to_string();
        ensure!(told.contains(word), "{told}");
    }
    // The folder is in use.
    std::fs::write(folder.path().join("memory-0"), "theirs")?;
    let body = json!({"destination_url": url, "live": true, "keep_paused": true}).to_string();
    let refused = first.request("PUT", "vm.snapshot", Some(&body))?;
    let told = refused.json()?.to_string();
    ensure!(told.contains("memory-0 already exists"), "{told}");
    let left = std::fs::read_dir(folder.path())?.count();
    ensure!(left == 1, "{left} files");
    wait_event(&first, "snapshot-failed")?;
    ensure!(first.get("vm.info")?["state"] == "Running");
    let now = wait_rounds(&first, "serial", 0)?;
    wait_rounds(&first, "serial", now)?;
    expect_nothing_lost(&first, "serial", &first)
}

/// Saves the paused VM into the folder `name`, based on the snapshot `base` if there is one.
fn save_beside(vmm: &Vmm, name: &str, base: Option<&str>) -> Result<std::path::PathBuf> {
    let url = |name: &str| format!("file://{}", vmm.folder().join(name).display());
    let folder = vmm.folder().join(name);
    std::fs::create_dir(&folder)?;
    let mut body = json!({"destination_url": url(name), "track_writes": true});
    if let Some(base) = base {
        body["base_url"] = json!(url(base));
    }
    vmm.put("vm.snapshot", Some(&body.to_string()))?;
    Ok(folder)
}

#[test]
fn chain_of_snapshots_is_restored_merged_and_refused_when_a_link_is_broken() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let first = guest_at_work(&[])?;
    let image = image_of(&first)?;
    let rounds = |serial: &str| -> Result<()> {
        let now = wait_rounds(&first, serial, 0)?;
        wait_rounds(&first, serial, now).map(drop)
    };
    first.put("vm.pause", None)?;
    let one = save_beside(&first, "one", None)?;
    first.put("vm.resume", None)?;
    rounds("serial")?;
    let base = json!({"keep_paused": true, "base_url": format!("file://{}", one.display())});
    let two = save_live(&first, "two", &base)?;
    first.put("vm.resume", None)?;
    rounds("serial")?;
    // A move that is refused does not end the record of writes.
    let body = json!({"destination_url": "unix:/move", "local": true}).to_string();
    let refused = first.request("PUT", "vm.send-migration", Some(&body))?;
    ensure!(refused.status == 400, "{refused:?}");
    first.put("vm.pause", None)?;
    let three = save_beside(&first, "three", Some("two"))?;
    let copy = first.folder().join("copy");
    std::fs::copy(&image, &copy)?;
    first.put("vm.resume", None)?;
    let sizes: Vec<u64> = [&one, &two, &three]
        .iter()
        .map(|folder| disk_bytes(&folder.join("memory-0")))
        .collect::<Result<_>>()?;
    println!("     bytes of the chain: {sizes:?}");
    // The guest writes 2 MiB in each round; it has its code, rings and the balloon's pages besides.
    ensure!(sizes[2] < sizes[0], "{sizes:?}");

    let url = |folder: &Path| format!("file://{}", folder.display());
    let merged = first.folder().join("merged");
    std::fs::create_dir(&merged)?;
    let helper = Vmm::start(&[])?;
    let body = json!({"source_url": url(&three), "destination_url": url(&merged)}).to_string();
    helper.put("vm.snapshot-merge", Some(&body))?;
    let again = helper.request("PUT", "vm.snapshot-merge", Some(&body))?;
    ensure!(again.status == 400, "{again:?}");

    let mut modes = vec![
        (&three, "Copy"),
        (&merged, "Copy"),
        (&merged, "CopyOnWrite"),
    ];
    match std::fs::File::open("/dev/userfaultfd") {
        Ok(_) => modes.push((&three, "OnDemand")),
        Err(_) => skip("/dev/userfaultfd does not open"),
    }
    for (number, (folder, mode)) in modes.into_iter().enumerate() {
        let own = first.folder().join(format!("image{number}"));
        std::fs::copy(&copy, &own)?;
        let serial = format!("serial-{number}");
        move_paths(folder, &own, &first.folder().join(&serial))?;
        let vmm = Vmm::start(&[])?;
        let body = json!({"source_url": url(folder), "resume": true, "memory_restore_mode": mode});
        vmm.put("vm.restore", Some(&body.to_string()))
            .with_context(|| vmm.stderr())?;
        expect_nothing_lost(&first, &serial, &vmm).context(mode)?;
    }
    let refuse = |mode: &str, word: &str| -> Result<()> {
        let body = json!({"source_url": url(&three), "memory_restore_mode": mode}).to_string();
        let refused = helper.request("PUT", "vm.restore", Some(&body))?;
        let told = refused.json()?.to_string();
        ensure!(refused.status == 400 && told.contains(word), "{told}");
        Ok(())
    };
    refuse("CopyOnWrite", "merge them first")?;
    let aside = first.folder().join("aside");
    std::fs::rename(&one, &aside)?;
    refuse("Copy", "one/state.json")?;
    std::fs::rename(&two, &one)?;
    std::fs::rename(&aside, &two)?;
    refuse("Copy", "two breaks the chain")?;
    ensure!(helper.get("vmm.ping").is_ok());
    std::fs::remove_file(&image)?;
    expect_nothing_lost(&first, "serial", &first)
}

/// Changes the number of vCPUs as soon as the guest has released those that it was asked for before.
fn resize_vcpus(vmm: &Vmm, count: u32) -> Result<()> {
    let body = json!({"desired_vcpus": count}).to_string();
    wait_for("room for another resize", SCENARIO_DEADLINE, || {
        let answer = vmm.request("PUT", "vm.resize", Some(&body))?;
        ensure!(matches!(answer.status, 204 | 429), "{count}: {answer:?}");
        Ok((answer.status == 204).then_some(()))
    })
}

/// The guest starts what is added, and finds everything that it started still running at each change.
#[test]
fn added_vcpus_run_on_after_a_restore_and_leave() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut first = start("processors", &["--cpus", "boot=1,max=4"])?;
    first.wait_api()?;
    let serial = first.folder().join("serial");
    let printed = |line: &str, times: usize| {
        wait_for(line, SCENARIO_DEADLINE, || {
            // The VMM creates it when the guest boots.
            let text = std::fs::read_to_string(&serial).unwrap_or_default();
            ensure!(!text.contains("FAIL "), "{text}");
            Ok((text.matches(line).count() >= times).then_some(()))
        })
    };
    let restored = |url: &str, vcpus: u32| -> Result<Vmm> {
        let vmm = Vmm::start(&["--restore", &format!("source_url={url},resume=on")])?;
        let info = wait_for("running guest", SCENARIO_DEADLINE, || {
            let info = vmm.get("vm.info").ok();
            Ok(info.filter(|info| info["state"] == "Running"))
        })?;
        let cpus = &info["config"]["cpus"];
        ensure!(
            cpus["boot_vcpus"] == vcpus && cpus["max_vcpus"] == 4,
            "{cpus:#}"
        );
        Ok(vmm)
    };
    printed("READY processors", 1)?;
    resize_vcpus(&first, 3)?;
    printed("PASS processor_started", 2)?;
    let url = save(&mut first)?;

    // The file of the serial port is truncated, as at boot.
    let mut second = restored(&url, 3)?;
    resize_vcpus(&second, 4)?;
    printed("PASS processor_started", 1)?;
    resize_vcpus(&second, 2)?;
    printed("PASS processor_left", 2)?;
    resize_vcpus(&second, 3)?;
    printed("PASS processor_started", 2)?;
    let url = save(&mut second)?;

    let mut third = restored(&url, 3)?;
    resize_vcpus(&third, 1)?;
    printed("PASS processor_left", 2)?;
    printed(" passed, 0 failed", 1)?;
    third.expect_clean_exit(SCENARIO_DEADLINE)
}
