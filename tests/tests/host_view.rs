//! Tests a running VMM from the host's point of view: its threads, their permissions and affinity, and its events.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{self, SCENARIO_DEADLINE, expect_all_passed, kvm_opens, start};
use integration_tests::descriptors::inherit;
use integration_tests::guest_at_work::{expect_nothing_lost, wait_rounds};
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;
use serde_json::{Value, json};

/// A field of `/proc/PID/task/TID/status`, by the thread's name. A thread that ends in the meantime is omitted.
fn of_each_thread(vmm: &Vmm, field: &str) -> Result<BTreeMap<String, String>> {
    let mut fields = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{}/task", vmm.pid()))? {
        let path = task?.path();
        let (Ok(name), Ok(status)) = (
            fs::read_to_string(path.join("comm")),
            fs::read_to_string(path.join("status")),
        ) else {
            continue;
        };
        let value = status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
            .with_context(|| format!("no {field}"))?;
        fields.insert(name.trim().to_owned(), value.trim().to_owned());
    }
    Ok(fields)
}

/// As [`of_each_thread`], once all of `names` are among the threads: a thread has its creator's name until it has run
/// for the first time.
fn of_named_threads(vmm: &Vmm, field: &str, names: &[&str]) -> Result<BTreeMap<String, String>> {
    wait_for("the threads' names", PROCESS_DEADLINE, || {
        let threads = of_each_thread(vmm, field)?;
        let all = names.iter().all(|name| threads.contains_key(*name));
        Ok(all.then_some(threads))
    })
}

/// Starts a guest that computes forever, and waits until it runs.
fn start_spinning(arguments: &[&str]) -> Result<Vmm> {
    let vmm = start("spin", arguments)?;
    wait_for("running guest", SCENARIO_DEADLINE, || {
        let info = vmm.get("vm.info").ok();
        Ok(info.filter(|info| info["state"] == "Running"))
    })
    .with_context(|| vmm.stderr())?;
    Ok(vmm)
}

fn end(mut vmm: Vmm) -> Result<()> {
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)
}

#[test]
fn seccomp_confines_every_thread_unless_told_not_to() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    // 2: filtered, 0: not (PR_GET_SECCOMP).
    for (setting, expected) in [("true", "2"), ("log", "2"), ("errno", "2"), ("false", "0")] {
        let vmm = start_spinning(&[
            "--seccomp",
            setting,
            "--balloon",
            "size=0",
            "--event-monitor",
            "path=@/events",
        ])?;
        // The main thread is confined last.
        wait_for("the expected filters", PROCESS_DEADLINE, || {
            let names = ["vmm", "http-server", "event-monitor", "vcpu0"];
            let threads = of_named_threads(&vmm, "Seccomp", &names)?;
            let all = threads.values().all(|mode| mode == expected);
            Ok(all.then_some(()))
        })
        .with_context(|| format!("{setting}: {:?}", of_each_thread(&vmm, "Seccomp")))?;
        // Each of these creates threads or descriptors under the filters.
        for endpoint in ["vm.pause", "vm.resume", "vm.power-button", "vm.reboot"] {
            vmm.put(endpoint, None)?;
        }
        vmm.get("vm.counters")?;
        vmm.get("vm.reclaim-stats")?;
        ensure!(vmm.stderr().is_empty(), "{setting}: {}", vmm.stderr());
        end(vmm)?;
    }
    Ok(())
}

/// Whether a list as in `Cpus_allowed_list` begins with CPUs 0 and 1.
fn has_first_two(cpus: &str) -> bool {
    let (first, rest) = cpus.split_at(cpus.find([',', '-']).unwrap_or(cpus.len()));
    first == "0"
        && (rest.starts_with('-')
            || rest == ",1"
            || rest.starts_with(",1-")
            || rest.starts_with(",1,"))
}

/// The CPUs of a vCPU that is not pinned. `None`, which skips the test, if CPUs 0 and 1 are not among them.
fn usable_cpus() -> Result<Option<String>> {
    let free = start_spinning(&["--cpus", "boot=2"])?;
    let everywhere = of_named_threads(&free, "Cpus_allowed_list", &["vcpu0"])?["vcpu0"].clone();
    end(free)?;
    if !has_first_two(&everywhere) {
        test_skip::skip(format!(
            "CPUs 0 and 1 are not both usable, only {everywhere}"
        ));
        return Ok(None);
    }
    Ok(Some(everywhere))
}

#[test]
fn affinity_pins_each_vcpu_and_nothing_else() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let Some(everywhere) = usable_cpus()? else {
        return Ok(());
    };
    let vmm = start_spinning(&["--cpus", "boot=3,affinity=[0@[1],1@[0]]"])?;
    for _ in 0..2 {
        let threads = of_named_threads(&vmm, "Cpus_allowed_list", &["vcpu0", "vcpu1", "vcpu2"])?;
        let allowed = |name: &str| threads.get(name).map(String::as_str);
        ensure!(allowed("vcpu0") == Some("1"), "{threads:?}");
        ensure!(allowed("vcpu1") == Some("0"), "{threads:?}");
        ensure!(allowed("vcpu2") == Some(&everywhere), "{threads:?}");
        ensure!(allowed("vmm") == Some(&everywhere), "{threads:?}");
        vmm.put("vm.reboot", None)?;
    }
    end(vmm)
}

/// As cocoon: the disk that is written has its queues pinned, the other one has not.
#[test]
fn queue_affinity_pins_each_queue_of_its_disk_and_nothing_else() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let Some(everywhere) = usable_cpus()? else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let file = |name: &str| -> Result<String> {
        let path = folder.path().join(name);
        File::create(&path)?.set_len(1 << 20)?;
        Ok(path.display().to_string())
    };
    let layer = format!(
        "path={},readonly=on,image_type=raw,num_queues=2",
        file("l")?
    );
    let cow = format!(
        "path={},image_type=raw,num_queues=3,queue_size=512,queue_affinity=[0@[1],1@[0]],serial=cow",
        file("cow")?
    );
    let vmm = start_spinning(&["--cpus", "boot=3", "--disk", &layer, &cow])?;
    let added = json!({
        "path": file("added")?, "image_type": "Raw", "num_queues": 2,
        "queue_affinity": [{"queue_index": 1, "host_cpus": [0]}],
    });
    vmm.put("vm.add-disk", Some(&added.to_string()))?;
    for _ in 0..2 {
        let pinned = [
            ("_disk0_q0", everywhere.as_str()),
            ("_disk0_q1", &everywhere),
            ("_disk1_q0", "1"),
            ("_disk1_q1", "0"),
            ("_disk1_q2", &everywhere),
            ("_disk2_q0", &everywhere),
            ("_disk2_q1", "0"),
            ("vmm", &everywhere),
        ];
        let threads = of_named_threads(&vmm, "Cpus_allowed_list", &pinned.map(|(name, _)| name))?;
        for (name, expected) in pinned {
            ensure!(threads[name] == expected, "{name}: {threads:?}");
        }
        vmm.put("vm.reboot", None)?;
    }
    end(vmm)
}

/// Linux AIO serves a guest that writes and verifies its disk, under the filters.
#[test]
fn disks_use_the_best_engine_that_is_not_disabled() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    for (keys, ring, aio) in [
        ("direct=on", true, false),
        ("direct=on,_disable_aio=on", true, false),
        ("direct=on,_disable_io_uring=on", false, true),
        (
            "direct=on,_disable_io_uring=on,_disable_aio=on",
            false,
            false,
        ),
        ("_disable_io_uring=on", false, false),
    ] {
        let image = tempfile::NamedTempFile::new()?;
        image.as_file().set_len(1 << 20)?;
        let in_memory = virtio_devices::file_system::is_in_memory(image.as_file());
        let disk = format!("path={},image_type=raw,{keys}", image.path().display());
        let balloon = ["--balloon", "size=0,free_page_reporting=on"];
        let mut vmm = start("chaos", &[&["--disk", &disk][..], &balloon].concat())?;
        if vmm.has_ended()? && vmm.stderr().contains("does not support direct I/O") {
            test_skip::skip("the temporary directory has no direct I/O");
            return Ok(());
        }
        vmm.wait_api()?;
        wait_rounds(&vmm, "serial", 0)?;
        let rings = fs::read_dir(format!("/proc/{}/fd", vmm.pid()))?
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .filter(|link| link.to_string_lossy().contains("[io_uring]"));
        let has_ring = rings.count() > 0;
        // The kernel maps the completions of Linux AIO into the process.
        let has_aio = fs::read_to_string(format!("/proc/{}/maps", vmm.pid()))?.contains("[aio]");
        ensure!(
            (has_ring, has_aio) == (ring && !in_memory, aio && !in_memory),
            "{keys}, in memory {in_memory}: {has_ring}, {has_aio}"
        );
        // Other tests verify the data of the other engines.
        if aio {
            expect_nothing_lost(&vmm, "serial", &vmm)?;
            vmm.expect_clean_exit(PROCESS_DEADLINE)?;
        } else {
            end(vmm)?;
        }
    }
    Ok(())
}

#[test]
fn signals_end_a_running_machine_in_good_order() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    for signal in ["TERM", "INT"] {
        let mut vmm = start_spinning(&["--balloon", "size=0", "--event-monitor", "path=@/events"])?;
        vmm.signal(signal)?;
        vmm.expect_clean_exit(PROCESS_DEADLINE)?;
        let events = events(&vmm)?;
        let last = events.last().context("no events")?;
        ensure!(
            last["source"] == "vmm" && last["event"] == "shutdown",
            "{last}"
        );
        ensure!(
            !vmm.socket().exists(),
            "{signal}: the API socket was left behind"
        );
    }
    Ok(())
}

#[test]
fn power_off_with_no_shutdown_leaves_a_vm_that_boots_again() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let vmm = start("pci", &["--no-shutdown"])?;
    for boot in 1..=2 {
        wait_for("power-off", SCENARIO_DEADLINE, || {
            let done = vmm.text("serial").matches("DONE ").count() >= boot;
            let info = vmm.get("vm.info").ok();
            Ok(info.filter(|info| done && info["state"] == "Created"))
        })
        .with_context(|| vmm.stderr())?;
        if boot == 1 {
            vmm.put("vm.boot", None)?;
        }
    }
    end(vmm)
}

/// The events so far. They are JSON objects, each followed by an empty line.
fn events(vmm: &Vmm) -> Result<Vec<Value>> {
    parse(&vmm.text("events"))
}

fn parse(text: &str) -> Result<Vec<Value>> {
    ensure!(text.is_empty() || text.ends_with("}\n\n"), "{text}");
    text.split_terminator("\n\n")
        .map(|event| serde_json::from_str(event).with_context(|| event.to_owned()))
        .collect()
}

/// `source event` of each.
fn names(events: &[Value]) -> Vec<String> {
    let name = |event: &Value| {
        let word = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        format!("{} {}", word("source"), word("event"))
    };
    events.iter().map(name).collect()
}

const BOOT: [&str; 3] = ["vmm starting", "vm booting", "vm booted"];
const END: [&str; 3] = ["vm shutdown", "vm deleted", "vmm shutdown"];

#[test]
fn event_monitor_tells_of_a_triple_fault_and_a_reset_as_reboots() -> Result<()> {
    const TWICE: [&str; 4] = ["vm rebooting", "vm rebooted", "vm rebooting", "vm rebooted"];
    if !kvm_opens() {
        return Ok(());
    }
    for scenario in ["triple-fault", "reset"] {
        let mut vmm = start(scenario, &["--event-monitor", "path=@/events"])?;
        wait_for("two reboots", SCENARIO_DEADLINE, || {
            ensure!(!vmm.has_ended()?, "the VMM ended: {}", vmm.stderr());
            let count = vmm.text("events").matches("\"rebooted\"").count();
            Ok((count >= 2).then_some(()))
        })?;
        vmm.put("vmm.shutdown", None)?;
        vmm.expect_clean_exit(PROCESS_DEADLINE)?;
        let names = names(&events(&vmm)?);
        ensure!(
            names
                .iter()
                .zip([&BOOT[..], &TWICE].concat())
                .all(|(name, wanted)| name == wanted),
            "{scenario}: {names:#?}"
        );
    }
    Ok(())
}

/// A guest whose only vCPU sleeps with interrupts off may still get a device or an NMI: it has not ended.
#[test]
fn event_monitor_tells_nothing_of_a_halt() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let arguments = [
        "--cmdline",
        "scenario=pci stay",
        "--event-monitor",
        "path=@/events",
    ];
    let mut vmm = start("pci", &arguments)?;
    expect_all_passed(&mut vmm)?;
    wait_for("halted vCPU", SCENARIO_DEADLINE, || {
        let tasks = fs::read_dir(format!("/proc/{}/task", vmm.pid()))?;
        let mut stats =
            tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
        Ok(stats.any(|stat| stat.contains("(vcpu0) S")).then_some(()))
    })?;
    ensure!(vmm.get("vm.info")?["state"] == "Running");
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    let names = names(&events(&vmm)?);
    ensure!(names == [BOOT, END].concat(), "{names:#?}");
    Ok(())
}

#[test]
fn api_on_an_inherited_socket_serves_a_machine() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let arguments = ["--cmdline", "scenario=pci stay", "--api-socket", "fd=@api"];
    let mut vmm = start("pci", &arguments)?;
    vmm.wait_api()?;
    expect_all_passed(&mut vmm)?;
    ensure!(vmm.get("vm.info")?["state"] == "Running");
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    // The process that created it removes it.
    ensure!(vmm.socket().exists());
    Ok(())
}

#[test]
fn event_monitor_writes_a_whole_life_to_an_inherited_descriptor() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (mut reader, writer) = std::io::pipe()?;
    let writer = File::from(OwnedFd::from(writer));
    let argument = format!("fd={}", inherit(&writer)?);
    let mut vmm = start("pci", &["--event-monitor", &argument])?;
    drop(writer);
    vmm.expect_clean_exit(SCENARIO_DEADLINE)?;
    let mut text = String::new();
    reader.read_to_string(&mut text)?;
    let names = names(&parse(&text)?);
    ensure!(names == [BOOT, END].concat(), "{names:#?}");
    Ok(())
}

#[test]
fn event_monitor_tells_a_whole_life_in_order() -> Result<()> {
    const LIFE: &[&str] = &[
        "vmm starting",
        "vm booting",
        "vm booted",
        "vm pausing",
        "vm paused",
        "vm resuming",
        "vm resumed",
        "vm resizing",
        "vm resized",
        "vm rebooting",
        "vm rebooted",
        "vm shutdown",
        "vm deleted",
        "vmm shutdown",
    ];
    if !kvm_opens() {
        return Ok(());
    }
    let mut vmm = Vmm::start(&["--event-monitor", "path=@/events"])?;
    let config = json!({
        "payload": { "kernel": bare_metal::image()?, "cmdline": "scenario=spin" },
        "balloon": { "size": 0 },
        "console": { "mode": "Off" },
    });
    vmm.put("vm.create", Some(&config.to_string()))?;
    for endpoint in ["vm.boot", "vm.pause", "vm.resume"] {
        vmm.put(endpoint, None)?;
    }
    vmm.put("vm.resize", Some("{\"desired_balloon\":4096}"))?;
    for endpoint in ["vm.reboot", "vm.shutdown", "vm.delete", "vmm.shutdown"] {
        vmm.put(endpoint, None)?;
    }
    vmm.expect_clean_exit(PROCESS_DEADLINE)?;

    let events = events(&vmm)?;
    let names = names(&events);
    ensure!(names == LIFE, "{names:#?}");
    let mut last = Duration::ZERO;
    for event in &events {
        let part = |key: &str| event["timestamp"][key].as_u64().context(key.to_owned());
        let time = Duration::new(part("secs")?, u32::try_from(part("nanos")?)?);
        ensure!(last <= time, "{event} comes after {last:?}");
        ensure!(event["properties"].is_null(), "{event}");
        last = time;
    }
    Ok(())
}

#[test]
fn event_monitor_tells_of_drivers_by_device() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let mut vmm = start(
        "balloon",
        &[
            "--balloon",
            "size=0,free_page_reporting=on",
            "--event-monitor",
            "path=@/events",
        ],
    )?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)?;
    let events = events(&vmm)?;
    let activated = events
        .iter()
        .find(|event| event["event"] == "activated")
        .context("no driver was seen")?;
    ensure!(activated["source"] == "virtio-device", "{activated}");
    ensure!(
        activated["properties"] == json!({ "id": "__balloon" }),
        "{activated}"
    );
    let last = events.last().context("no events")?;
    ensure!(
        last["event"] == "shutdown" && last["source"] == "vmm",
        "{last}"
    );
    Ok(())
}

/// Without a reader, only events are lost.
#[test]
fn event_monitor_that_nobody_reads_delays_nothing() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let fifo = folder.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status()?;
    ensure!(made.success(), "mkfifo");
    let argument = format!("path={}", fifo.display());
    let vmm = start_spinning(&["--event-monitor", &argument])?;
    // A pipe holds 64 KiB, an event takes about 130 bytes, a pause and its end are
    // four: it is full long before the last of these.
    for _ in 0..200 {
        vmm.put("vm.pause", None)?;
        vmm.put("vm.resume", None)?;
    }
    end(vmm)
}

/// The figure is only printed, because machines differ; the bound only distinguishes a response from a wait.
#[test]
fn spinning_guest_leaves_the_api_its_latency() -> Result<()> {
    const REQUESTS: usize = 500;
    if !kvm_opens() {
        return Ok(());
    }
    let vmm = start_spinning(&["--balloon", "size=0"])?;
    let mut latencies = (0..REQUESTS)
        .map(|_| {
            let asked = Instant::now();
            vmm.get("vm.info")?;
            Ok(asked.elapsed())
        })
        .collect::<Result<Vec<_>>>()?;
    latencies.sort_unstable();
    let (median, p99) = (latencies[REQUESTS / 2], latencies[REQUESTS * 99 / 100]);
    println!(
        "vm.info: median {median:?}, p99 {p99:?}, max {:?}",
        latencies[REQUESTS - 1]
    );
    ensure!(median < Duration::from_millis(100), "{median:?}");
    end(vmm)
}
