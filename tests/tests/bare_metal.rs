//! Tests the machine and the balloon with a guest without an operating system, directly on this machine's KVM.

use std::fs::File;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{
    SCENARIO_DEADLINE, expect_all_passed, expect_all_passed_while, kvm_opens, start,
};
use integration_tests::huge_pages::ReservedHugePages;
use integration_tests::vmm::Vmm;
use integration_tests::wait::wait_for;
use serde_json::{Value, json};

/// Balloon with reporting, as most scenarios need it.
const BALLOON: &[&str] = &["--balloon", "size=0,free_page_reporting=on"];

/// Runs a scenario to its end: all checks pass, the guest powers off, the VMM exits 0.
fn runs(scenario: &str, arguments: &[&str]) -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut vmm = start(scenario, arguments)?;
    expect_all_passed(&mut vmm)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)?;
    ensure!(!vmm.socket().exists(), "the API socket was left behind");
    Ok(())
}

#[test]
fn pci_both_ways_in_agree() -> Result<()> {
    runs("pci", BALLOON)
}

/// Their APIC ids do not fit one byte, and their ACPI tables are long.
#[test]
fn machine_that_may_get_600_vcpus_runs() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut vmm = start("pci", &["--cpus", "boot=1,max=600"])?;
    let status = vmm.wait_exit(SCENARIO_DEADLINE)?;
    let log = vmm.stderr();
    if log.contains("max=600") {
        test_skip::skip(format!("KVM supports fewer vCPUs: {log}"));
        return Ok(());
    }
    ensure!(status.success(), "{status}: {log}");
    expect_all_passed(&mut vmm)
}

/// More than KVM can have is rejected with the numbers.
#[test]
fn machine_with_more_vcpus_than_kvm_has_is_refused() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut vmm = start("pci", &["--cpus", "boot=1,max=4097"])?;
    let status = vmm.wait_exit(SCENARIO_DEADLINE)?;
    let log = vmm.stderr();
    ensure!(!status.success(), "{log}");
    ensure!(log.contains("4096") && log.contains("max=4097"), "{log}");
    Ok(())
}

#[test]
fn balloon_private_memory_discards_exactly() -> Result<()> {
    runs("balloon", BALLOON)
}

#[test]
fn balloon_shared_memory_discards_exactly() -> Result<()> {
    runs(
        "balloon",
        &[BALLOON, &["--memory", "size=256M,shared=on"]].concat(),
    )
}

#[test]
fn hostile_guest_private_memory_is_contained_and_counted() -> Result<()> {
    /// One counter for each kind of protocol violation that a device can detect.
    const COUNTED: &[&str] = &[
        "actual_beyond_ram",
        "chains_empty",
        "chains_too_long",
        "chains_without_end",
        "chains_without_head",
        "descriptors_empty",
        "descriptors_unreadable",
        "descriptors_wrong_direction",
        "inflate_skipped_duplicate_bytes",
        "inflate_skipped_outside_ram_bytes",
        "report_skipped_duplicate_bytes",
        "report_skipped_outside_ram_bytes",
        "report_skipped_unaligned_bytes",
        "stats_ragged",
        "stats_surplus_buffers",
        "stats_unknown_tags",
    ];
    if !kvm_opens() {
        return Ok(());
    }
    let mut vmm = start(
        "hostile",
        &[BALLOON, &["--cmdline", "scenario=hostile stay"]].concat(),
    )?;
    expect_all_passed(&mut vmm)?;
    lies_are_counted(&mut vmm, COUNTED)
}

/// A machine whose guest has committed all violations: each kind is counted, and the VMM exits cleanly.
fn lies_are_counted(vmm: &mut Vmm, names: &[&str]) -> Result<()> {
    let counters = vmm.get("vm.counters")?;
    for name in names {
        let count = counters["__balloon"][name].as_u64();
        ensure!(count.is_some_and(|count| count > 0), "{name}: {counters:#}");
    }
    // The log has one line for the device, not one per violation.
    let log = vmm.stderr();
    // Rejected requests are the host's own.
    let lines = log.lines().filter(|line| !line.contains("/api/"));
    ensure!(lines.count() < 10, "{log}");
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)
}

#[test]
fn hostile_hints_private_memory_are_contained_and_counted() -> Result<()> {
    hostile_hints("size=256M")
}

#[test]
fn hostile_hints_shared_memory_are_contained_and_counted() -> Result<()> {
    hostile_hints("size=256M,shared=on")
}

fn hostile_hints(memory: &str) -> Result<()> {
    const COUNTED: &[&str] = &[
        "chains_without_end",
        "chains_without_head",
        "descriptors_empty",
        "descriptors_unreadable",
        "hint_commands_malformed",
        "hint_commands_not_asked_for",
        "hint_discarded_bytes",
        "hint_skipped_duplicate_bytes",
        "hint_skipped_hint_not_held_bytes",
        "hint_skipped_hint_stale_bytes",
        "hint_skipped_outside_ram_bytes",
        "hint_skipped_unaligned_bytes",
    ];
    if !kvm_opens() {
        return Ok(());
    }
    let arguments = [
        "--balloon",
        "size=0,free_page_hinting=on,free_page_reporting=on",
        "--memory",
        memory,
        "--cmdline",
        "scenario=hinting stay",
    ];
    let mut vmm = start("hinting", &arguments)?;
    vmm.wait_api()?;
    expect_all_passed_while(&mut vmm, |vmm| {
        // Starts run after run; a request is rejected while a run is in progress, or without a driver.
        vmm.request("PUT", "vm.balloon-hinting", Some("{\"action\":\"start\"}"))
            .map(drop)
    })?;
    lies_are_counted(&mut vmm, COUNTED)
}

#[test]
fn hostile_guest_shared_memory_is_contained() -> Result<()> {
    runs(
        "hostile",
        &[BALLOON, &["--memory", "size=256M,shared=on"]].concat(),
    )
}

#[test]
fn noise_at_every_register_is_contained() -> Result<()> {
    runs("registers", BALLOON)
}

/// Runs with every kind of device; the VMM creates the tap.
fn runs_with_every_device(scenario: &str) -> Result<()> {
    if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
        test_skip::skip(format!("/dev/net/tun does not open: {error}"));
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let file = |name: &str| -> Result<String> {
        let path = folder.path().join(name);
        File::create(&path)?.set_len(16 << 20)?;
        Ok(path.display().to_string())
    };
    let disk = format!("path={},image_type=raw,num_queues=2", file("disk")?);
    let translated = format!("path={},image_type=raw,iommu=on", file("translated")?);
    let pmem = format!("file={}", file("pmem")?);
    let arguments = [
        BALLOON,
        &["--cpus", "boot=2"],
        &[
            "--memory",
            "size=256M,hotplug_method=virtio-mem,hotplug_size=128M",
        ],
        &["--disk", &disk, &translated],
        &["--net", "mac=02:00:00:00:00:01"],
        &["--console", "file=@/console"],
        &["--vsock", "cid=3,socket=@/vsock"],
        &["--pmem", &pmem],
        &["--watchdog", "--rtc", "--pvpanic"],
    ];
    runs(scenario, &arguments.concat())
}

#[test]
fn noise_at_every_device_is_contained() -> Result<()> {
    runs_with_every_device("registers")
}

#[test]
fn hostile_guest_of_every_device_is_contained() -> Result<()> {
    runs_with_every_device("hostile")
}

/// An image over a backing file: the crate that reads it makes its own system calls under the filters.
#[test]
fn hostile_guest_of_a_qcow2_disk_is_contained() -> Result<()> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("base"), vec![7; 1 << 20])?;
    let qemu_img = |arguments: &str| {
        std::process::Command::new("qemu-img")
            .args(arguments.split(' '))
            .current_dir(folder.path())
            .output()
    };
    if let Err(error) = qemu_img("create -q -f qcow2 -F raw -b base disk 16M") {
        test_skip::skip(format!("no qemu-img: {error}"));
        return Ok(());
    }
    let path = folder.path().join("disk");
    for options in ["", ",direct=on,num_queues=2"] {
        let disk = format!("path={},backing_files=on{options}", path.display());
        let arguments = [BALLOON, &["--cpus", "boot=2"], &["--disk", &disk]];
        runs("hostile", &arguments.concat())?;
        let checked = qemu_img("check disk")?;
        ensure!(checked.status.success(), "{checked:?}");
    }
    Ok(())
}

/// A guest that touches what it has not plugged gets no memory, nor do its devices for it. It runs twice: a reboot takes
/// away what was plugged.
fn unplugged_memory_is_closed(memory: &str) -> Result<()> {
    /// Checks of closed blocks: each is two reads and a write.
    const ACCESSES: u64 = 4 * 3;
    const BLOCK: u64 = 2 << 20;
    if !kvm_opens() {
        return Ok(());
    }
    let memory = format!("{memory},hotplug_method=virtio-mem,hotplug_size=128M,hotplugged_size=2M");
    let arguments = ["--memory", &memory, "--cmdline", "scenario=plug stay"];
    let mut vmm = start("plug", &arguments)?;
    for round in 0..2 {
        if round > 0 {
            vmm.put("vm.reboot", None)?;
        } else {
            expect_all_passed(&mut vmm)?;
        }
        let figures = wait_for("the last block to be full", SCENARIO_DEADLINE, || {
            let counters = vmm.get("vm.counters")?["mem0"].clone();
            let zones = vmm.get("vm.reclaim-stats")?["zones"].clone();
            let zone = zones.as_array().into_iter().flatten();
            let mut zone = zone.filter(|zone| zone["id"] == "mem0-hotplug");
            let zone = zone.next().cloned().context("no such zone")?;
            let full = zone["resident_bytes"] == BLOCK && counters["plug_requests"] == 2;
            ensure!(
                zone["resident_bytes"].as_u64() <= Some(BLOCK),
                "{zone:#}: more than is plugged"
            );
            Ok(full.then_some((counters, zone)))
        });
        let (counters, zone) = figures?;
        ensure!(zone["configured_bytes"] == BLOCK, "{zone:#}");
        ensure!(counters["plugged_bytes"] == BLOCK, "{counters:#}");
        ensure!(counters["unplugged_accesses"] == ACCESSES, "{counters:#}");
        expect_all_passed(&mut vmm)?;
    }
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)
}

#[test]
fn unplugged_private_memory_is_closed() -> Result<()> {
    unplugged_memory_is_closed("size=256M")
}

#[test]
fn unplugged_shared_memory_is_closed() -> Result<()> {
    unplugged_memory_is_closed("size=256M,shared=on")
}

#[test]
fn unplugged_huge_pages_are_closed() -> Result<()> {
    // RAM, and all that can be plugged: the pool does not grow.
    let Some(_pool) = ReservedHugePages::new((256 + 128) / 2)? else {
        test_skip::skip("the host has too few huge pages of 2 MiB");
        return Ok(());
    };
    unplugged_memory_is_closed("size=256M,hugepages=on,hugepage_size=2M")
}

/// The memory file becomes shorter under the guest: as on a full file system, its pages cannot come back.
#[test]
fn memory_that_the_host_takes_away_ends_the_vm_with_its_name() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let file = tempfile::NamedTempFile::new()?;
    file.as_file().set_len(256 << 20)?;
    let zone = format!("id=ram,size=256M,shared=on,file={}", file.path().display());
    let arguments = ["--memory", "size=0", "--memory-zone", &zone];
    let more = [
        "--cmdline",
        "scenario=balloon stay",
        "--event-monitor",
        "path=@/events",
    ];
    let mut vmm = start("balloon", &[BALLOON, &arguments, &more].concat())?;
    expect_all_passed(&mut vmm)?;
    file.as_file().set_len(0)?;
    // The balloon's worker reads its ring. The VM may end before the response.
    drop(vmm.request("GET", "vm.balloon-stats", None));
    let status = vmm.wait_exit(SCENARIO_DEADLINE)?;
    ensure!(status.code() == Some(1), "{status}: {}", vmm.stderr());
    let (log, events) = (vmm.stderr(), vmm.text("events"));
    ensure!(
        log.contains("the host cannot provide RAM") && log.contains("ram (file-shared)"),
        "{log}"
    );
    ensure!(events.contains("memory-unavailable"), "{events}");
    Ok(())
}

/// Both scenarios request a reset, so the guest restarts forever, which its boot count shows.
fn starts_again_after(scenario: &str) -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    // With a disk, because its image is locked: the next machine needs the lock released.
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(1 << 20)?;
    let disk = format!("path={},image_type=raw", image.path().display());
    let arguments = ["--event-monitor", "path=@/events", "--disk", &disk];
    let mut vmm = start(scenario, &arguments)?;
    wait_for("two reboots", SCENARIO_DEADLINE, || {
        ensure!(!vmm.has_ended()?, "the VMM ended");
        Ok((vmm.text("events").matches("\"rebooted\"").count() >= 2).then_some(()))
    })
    .with_context(|| vmm.stderr())
}

#[test]
fn i8042_reset_reboots() -> Result<()> {
    starts_again_after("reset")
}

#[test]
fn triple_fault_reboots() -> Result<()> {
    starts_again_after("triple-fault")
}

#[test]
fn watchdog_that_is_pinged_no_more_resets_the_machine() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let arguments = ["--cmdline", "scenario=watchdog stay", "--watchdog"];
    let events = ["--event-monitor", "path=@/events"];
    let mut vmm = start("watchdog", &[&arguments[..], &events].concat())?;
    expect_all_passed(&mut vmm)?;
    wait_for("a reset by the watchdog", SCENARIO_DEADLINE, || {
        ensure!(!vmm.has_ended()?, "the VMM ended");
        Ok(vmm.text("events").contains("\"rebooted\"").then_some(()))
    })
    .with_context(|| vmm.stderr())?;
    let log = vmm.stderr();
    ensure!(log.contains("__watchdog: no ping from the guest"), "{log}");
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)
}

#[test]
fn guest_reads_the_clock_of_the_host() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let since_epoch = || SystemTime::now().duration_since(UNIX_EPOCH);
    let before = since_epoch()?;
    let mut vmm = start("rtc", &["--rtc", "pci_device_id=7"])?;
    expect_all_passed(&mut vmm)?;
    let text = vmm.text("serial");
    let told = text.lines().find_map(|line| line.strip_prefix("CLOCK "));
    let told = Duration::from_nanos(told.context("no clock")?.trim().parse()?);
    ensure!(before <= told && told <= since_epoch()?, "{told:?}");
    Ok(())
}

#[test]
fn guest_that_panics_is_reported_and_its_debug_text_kept() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let arguments = ["--pvpanic", "--debug-console", "file=@/debug"];
    let events = ["--event-monitor", "path=@/events"];
    let command_line = ["--cmdline", "scenario=panic stay"];
    let mut vmm = start("panic", &[&arguments[..], &events, &command_line].concat())?;
    expect_all_passed(&mut vmm)?;
    ensure!(vmm.text("debug") == "text for the debug console\n");
    for event in ["panic", "crash_loaded", "unknown_event"] {
        let properties = json!({ "event": event });
        wait_for(event, SCENARIO_DEADLINE, || {
            let text = vmm.text("events");
            let mut events = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
            Ok(events
                .find_map(|it| {
                    it.ok().filter(|it| {
                        it["source"] == "guest"
                            && it["event"] == "panic"
                            && it["properties"] == properties
                    })
                })
                .map(drop))
        })
        .with_context(|| vmm.text("events"))?;
    }
    let info = vmm.get("vm.info")?;
    ensure!(info["state"] == "Running", "{info:#}");
    ensure!(
        info["device_tree"]["__pvpanic"]["pci_bdf"].is_string(),
        "{info:#}"
    );
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)
}

#[test]
fn debug_console_on_another_port_writes_to_the_terminal_of_the_console() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    // The scenario finds nothing at 0xe9, and the VMM continues to run.
    let arguments = ["--debug-console", "tty,iobase=0xe8", "--console", "tty"];
    let mut vmm = start("spin", &arguments)?;
    vmm.wait_api()?;
    wait_for("running guest", SCENARIO_DEADLINE, || {
        let info = vmm.get("vm.info").ok();
        Ok(info.filter(|info| info["state"] == "Running"))
    })?;
    let info = vmm.get("vm.info")?;
    ensure!(
        info["config"]["debug_console"]["iobase"] == 0xe8,
        "{info:#}"
    );
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)
}

#[test]
fn reboots_leave_no_descriptor_and_no_thread_behind() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let vmm = start("spin", BALLOON)?;
    wait_for("running guest", SCENARIO_DEADLINE, || {
        let info = vmm.get("vm.info").ok();
        Ok(info.filter(|info| info["state"] == "Running"))
    })?;
    vmm.put("vm.reboot", None)?;
    // A thread has its creator's name until it has run for the first time.
    let named = ["vmm", "vcpu0", "__rng", "__balloon"];
    let before = wait_for("the threads' names", Duration::from_secs(60), || {
        let now = Some(vmm.possessions()?);
        Ok(now.filter(|(_, threads)| named.iter().all(|name| threads.contains(*name))))
    })?;
    for _ in 0..4 {
        vmm.put("vm.reboot", None)?;
    }
    // Threads need a moment to get their names, or to disappear.
    wait_for("what one machine has", Duration::from_secs(60), || {
        Ok((vmm.possessions()? == before).then_some(()))
    })
    .with_context(|| format!("{before:?} became {:?}", vmm.possessions()))
}

#[test]
fn reclaim_stats_after_balloon_scenario_add_up() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut vmm = start(
        "balloon",
        &[BALLOON, &["--cmdline", "scenario=balloon stay"]].concat(),
    )?;
    expect_all_passed(&mut vmm)?;
    let stats = vmm.get("vm.reclaim-stats")?;
    let figure = |path: &str| stats.pointer(path).and_then(serde_json::Value::as_u64);
    // Eight blocks of 2 MiB in one chain, then 256 scattered frames in another.
    ensure!(
        figure("/report/requested_bytes") == Some(16 << 20),
        "{stats:#}"
    );
    ensure!(
        figure("/report/discarded_bytes") == Some(16 << 20),
        "{stats:#}"
    );
    ensure!(figure("/report/requested_ranges") == Some(8), "{stats:#}");
    ensure!(figure("/report/failed_bytes") == Some(0), "{stats:#}");
    ensure!(
        figure("/inflate/discarded_bytes") == Some(1 << 20),
        "{stats:#}"
    );
    ensure!(figure("/ballooned_bytes") == Some(256 * 4096), "{stats:#}");
    // One system call for each batch, or one for each range where the kernel takes no vectors.
    let counters = vmm.get("vm.counters")?;
    let calls = ["report_syscalls", "inflate_syscalls"]
        .map(|name| counters["__balloon"][name].as_u64().unwrap_or_default());
    ensure!(calls == [1, 1] || calls == [8, 256], "{calls:?}");
    ensure!(figure("/configured_bytes") == Some(256 << 20), "{stats:#}");
    let resident = figure("/resident_bytes").context("resident_bytes")?;
    // The guest touched well under 64 MiB and returned most of it.
    ensure!(resident > 0 && resident < 64 << 20, "{stats:#}");

    // Every response is fresh, and the first is not the sample from the start: the guest reports one byte less for each
    // request, by us or by the VMM itself. It sends that first sample after its closing line.
    wait_for("the guest's first sample", SCENARIO_DEADLINE, || {
        let stats = vmm.get("vm.reclaim-stats")?;
        Ok(stats["guest"].is_object().then_some(()))
    })?;
    let mut last = 123_456_788;
    for _ in 0..3 {
        let guest = vmm.get("vm.balloon-stats")?;
        let free = guest.pointer("/stats/free_memory").and_then(Value::as_u64);
        ensure!(free.is_some_and(|free| free < last), "{last}: {guest:#}");
        last = free.unwrap_or_default();
        ensure!(guest["stats"]["total_memory"] == 987_654_321, "{guest:#}");
        ensure!(guest["balloon_actual"] == 256 * 4096, "{guest:#}");
    }
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(Duration::from_secs(60))
}

#[test]
fn spinning_guest_delays_no_request() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut vmm = start("spin", BALLOON)?;
    wait_for("running guest", SCENARIO_DEADLINE, || {
        let info = vmm.get("vm.info").ok();
        Ok(info.filter(|info| info["state"] == "Running"))
    })?;
    let started = std::time::Instant::now();
    // This guest never sends statistics: the request must time out, and others must be served in the meantime.
    std::thread::scope(|scope| -> Result<()> {
        let slow = scope.spawn(|| vmm.request("GET", "vm.balloon-stats", None));
        for _ in 0..20 {
            vmm.get("vm.info")?;
        }
        let info_done = started.elapsed();
        let answer = slow.join().expect("the thread does not panic")?;
        ensure!(answer.status == 500, "{answer:?}");
        ensure!(
            info_done < started.elapsed(),
            "vm.info waited for the guest"
        );
        Ok(())
    })?;
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(Duration::from_secs(60))
}
