//! Tests our kernel patches with another host: QEMU, with its balloon, memory hot-plug, virtio-mem and two NUMA nodes.
//! `cargo xtask guest qemu-test` starts it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use integration_tests::MIB;
use integration_tests::outcome::{self, Outcome};
use integration_tests::qemu::QemuGuest;
use integration_tests::wait::wait_for;
use integration_tests::{paths, tests};
use serde_json::{Value, json};

/// Generous, because mainline's tracker needs seconds, and machines are busy.
const DEADLINE: Duration = Duration::from_secs(180);

const TWO_NODES: &[&str] = &[
    "-smp",
    "2,sockets=2",
    "-m",
    "768M",
    "-object",
    "memory-backend-ram,id=m0,size=384M",
    "-object",
    "memory-backend-ram,id=m1,size=384M",
    "-numa",
    "node,nodeid=0,cpus=0,memdev=m0",
    "-numa",
    "node,nodeid=1,cpus=1,memdev=m1",
    "-device",
    "virtio-balloon-pci,free-page-reporting=on",
];

const ROOM_TO_GROW: &[&str] = &[
    "-smp",
    "2",
    "-m",
    "512M,slots=2,maxmem=2G",
    "-device",
    "virtio-balloon-pci,free-page-reporting=on",
];

/// A small guest, so that it is soon full; memory in one node, so that there is one limit.
const SMALL: &[&str] = &[
    "-smp",
    "2",
    "-m",
    "320M",
    "-device",
    "virtio-balloon-pci,free-page-reporting=on",
];

fn main() -> ExitCode {
    outcome::main_with_emulated_guests(tests![
        nodes_both_give_memory_back,
        mainline_tracker_in_a_patched_kernel_gives_memory_back,
        tracker_changed_at_run_time_gives_memory_back,
        each_tracker_after_the_other_gives_memory_back,
        dimm_plugged_gives_memory_back_and_leaves,
        virtio_mem_gives_memory_back_and_shrinks,
        memory_far_above_a_hole_gives_memory_back,
        huge_pages_always_and_never_give_memory_back,
        everything_at_once_leaves_no_trace,
        memory_filled_to_the_brim_survives_where_it_does_with_mainline,
    ])
}

fn kernel() -> Result<PathBuf> {
    paths::guest("patched/vmlinux")
}

/// Touches memory and frees it: most of it must become resident in QEMU, and then return to the host.
fn gives_back(guest: &mut QemuGuest, mib: u64) -> Result<()> {
    guest.command(&format!("alloc {mib}M seed=1"))?;
    guest.command("verify")?;
    let held = guest.resident_bytes()?;
    ensure!(held > mib * MIB, "QEMU holds {} MiB", held / MIB);
    guest.command("free")?;
    // The rest may be in blocks that are too small to report, and in QEMU's own memory.
    let enough = held - mib * MIB * 3 / 4;
    let gone = wait_for("the guest's memory on the host", DEADLINE, || {
        Ok((guest.resident_bytes()? < enough).then_some(()))
    });
    if let Err(error) = gone {
        let now = guest.resident_bytes()? / MIB;
        let figures = guest
            .shell("cd /sys/kernel/mm/page_reporting && grep . stats/*; cat /proc/buddyinfo")?;
        bail!("{error}: {} MiB → {now} MiB; {figures}", held / MIB);
    }
    // The memory can be used again.
    guest.command(&format!("alloc {mib}M seed=2"))?;
    guest.command("verify")?;
    guest.command("free")?;
    Ok(())
}

fn end(guest: &QemuGuest) -> Result<Outcome> {
    no_complaints(&guest.complaints());
    Ok(Outcome::Passed)
}

/// Panics, because a kernel bug does not justify a second attempt.
fn no_complaints(complaints: &[String]) {
    assert!(
        complaints.is_empty(),
        "the kernel logged warnings or errors: {complaints:#?}"
    );
}

fn nodes_both_give_memory_back() -> Result<Outcome> {
    let mut guest = QemuGuest::serve(&kernel()?, TWO_NODES, "page_reporting.tracker=bitmap")?;
    let nodes =
        guest.shell("ls -d /sys/devices/system/node/node0 /sys/devices/system/node/node1")?;
    ensure!(nodes.contains("node1"), "{nodes}");
    // More memory than one node has.
    gives_back(&mut guest, 560)?;
    let bytes = guest.figure("stats/bytes")?;
    ensure!(bytes > 500 * MIB, "{} MiB were reported", bytes / MIB);
    end(&guest)
}

fn mainline_tracker_in_a_patched_kernel_gives_memory_back() -> Result<Outcome> {
    let mut guest = QemuGuest::serve(&kernel()?, TWO_NODES, "page_reporting.tracker=mainline")?;
    gives_back(&mut guest, 400)?;
    end(&guest)
}

fn track(guest: &mut QemuGuest, tracker: &str) -> Result<()> {
    let choose = format!("echo {tracker} > /sys/kernel/mm/page_reporting/tracker");
    guest.shell(&choose).map(drop)
}

fn tracker_changed_at_run_time_gives_memory_back() -> Result<Outcome> {
    let mut guest = QemuGuest::serve(&kernel()?, TWO_NODES, "page_reporting.tracker=off")?;
    guest.command("alloc 300M")?;
    guest.command("free")?;
    for tracker in ["bitmap", "mainline", "off", "bitmap"] {
        track(&mut guest, tracker)?;
    }
    gives_back(&mut guest, 400)?;
    end(&guest)
}

/// Each tracker must leave the queue and its interrupt in a state that the other can use.
fn each_tracker_after_the_other_gives_memory_back() -> Result<Outcome> {
    let mut guest = QemuGuest::serve(&kernel()?, TWO_NODES, "page_reporting.tracker=bitmap")?;
    gives_back(&mut guest, 300)?;
    for tracker in ["mainline", "bitmap"] {
        track(&mut guest, tracker)?;
        gives_back(&mut guest, 300)?;
    }
    end(&guest)
}

/// Total memory as the guest sees it.
fn total_bytes(guest: &mut QemuGuest) -> Result<u64> {
    let answer = guest.command("mem")?;
    answer
        .split(' ')
        .find_map(|word| word.strip_prefix("total=")?.parse().ok())
        .with_context(|| answer.clone())
}

fn wait_total(guest: &mut QemuGuest, what: &str, fits: impl Fn(u64) -> bool) -> Result<()> {
    wait_for(what, DEADLINE, || {
        Ok(fits(total_bytes(guest)?).then_some(()))
    })
}

/// Adds this DIMM of 512 MiB to the guest; returns its previous memory.
fn plug(guest: &mut QemuGuest, dimm: &Value) -> Result<u64> {
    let before = total_bytes(guest)?;
    let backend = json!({"qom-type": "memory-backend-ram", "id": "more", "size": 512 * MIB});
    guest.control("object-add", &backend)?;
    guest.control("device_add", dimm)?;
    wait_total(guest, "the DIMM in the guest", |total| {
        total >= before + 500 * MIB
    })?;
    Ok(before)
}

/// Removes the DIMM again.
fn unplug(guest: &mut QemuGuest, before: u64) -> Result<()> {
    guest.control("device_del", &json!({"id": "dimm"}))?;
    wait_total(guest, "the guest without the DIMM", |total| {
        total < before + 100 * MIB
    })
}

fn dimm_plugged_gives_memory_back_and_leaves() -> Result<Outcome> {
    let mut guest = QemuGuest::serve(
        &kernel()?,
        ROOM_TO_GROW,
        "page_reporting.tracker=bitmap memhp_default_state=online_movable",
    )?;
    let dimm = json!({"driver": "pc-dimm", "id": "dimm", "memdev": "more"});
    let before = plug(&mut guest, &dimm)?;
    gives_back(&mut guest, 700)?;
    unplug(&mut guest, before)?;
    // The remaining memory still works.
    gives_back(&mut guest, 250)?;
    end(&guest)
}

fn virtio_mem_gives_memory_back_and_shrinks() -> Result<Outcome> {
    let mut arguments = ROOM_TO_GROW.to_vec();
    arguments.extend([
        "-object",
        "memory-backend-ram,id=more,size=1G",
        "-device",
        "virtio-mem-pci,id=vm0,memdev=more,requested-size=0",
    ]);
    let mut guest = QemuGuest::serve(
        &kernel()?,
        &arguments,
        "page_reporting.tracker=bitmap memhp_default_state=online_movable",
    )?;
    let before = total_bytes(&mut guest)?;
    let request = |bytes: u64| json!({"path": "vm0", "property": "requested-size", "value": bytes});
    guest.control("qom-set", &request(512 * MIB))?;
    wait_total(&mut guest, "more memory", |total| {
        total >= before + 480 * MIB
    })?;
    gives_back(&mut guest, 700)?;
    guest.control("qom-set", &request(0))?;
    wait_total(&mut guest, "the guest as small as before", |total| {
        total < before + 100 * MIB
    })?;
    gives_back(&mut guest, 250)?;
    end(&guest)
}

/// A hole of 200 GiB lies between the memory at boot and the DIMM.
fn memory_far_above_a_hole_gives_memory_back() -> Result<Outcome> {
    const FAR: u64 = 204 << 30;
    let mut arguments = ROOM_TO_GROW.to_vec();
    arguments[3] = "512M,slots=2,maxmem=256G";
    let mut guest = QemuGuest::serve(
        &kernel()?,
        &arguments,
        "page_reporting.tracker=bitmap memhp_default_state=online_movable",
    )?;
    let dimm = json!({"driver": "pc-dimm", "id": "dimm", "memdev": "more", "addr": FAR});
    let before = plug(&mut guest, &dimm)?;
    // The block of 128 MiB at that address.
    guest.shell(&format!(
        "grep online /sys/devices/system/memory/memory{}/state",
        FAR >> 27
    ))?;
    // Most of it can only be in that DIMM.
    gives_back(&mut guest, 700)?;
    unplug(&mut guest, before)?;
    gives_back(&mut guest, 250)?;
    end(&guest)
}

fn huge_pages_always_and_never_give_memory_back() -> Result<Outcome> {
    let mut guest = QemuGuest::serve(&kernel()?, TWO_NODES, "page_reporting.tracker=bitmap")?;
    for mode in ["never", "always"] {
        guest.shell(&format!(
            "echo {mode} > /sys/kernel/mm/transparent_hugepage/enabled"
        ))?;
        gives_back(&mut guest, 400)?;
    }
    end(&guest)
}

/// Does for seconds what `cargo xtask guest sanitize` does for minutes: takes memory blocks offline and online, and
/// changes trackers, settings and the driver, while every byte is checked.
fn everything_at_once_leaves_no_trace() -> Result<Outcome> {
    let mut guest = QemuGuest::serve(
        &kernel()?,
        TWO_NODES,
        "page_reporting.tracker=bitmap movablecore=256M",
    )?;
    let said = guest.shell("guest-mem stress --seconds 8 --seed 3 --bytes 200M")?;
    ensure!(said.contains("ok stress seconds=8 seed=3"), "{said}");
    let taint = guest.shell("cat /proc/sys/kernel/tainted")?;
    assert!(
        taint.lines().any(|line| line.trim() == "0"),
        "tainted: {taint}"
    );
    end(&guest)
}

/// A program takes nearly all memory and ends, and the next one takes it while the first one's memory is being
/// reported. With less and less memory left over, a program is eventually killed: this must not happen earlier with the
/// bitmap, which has many blocks in flight, than with mainline's tracker.
fn memory_filled_to_the_brim_survives_where_it_does_with_mainline() -> Result<Outcome> {
    const LEFT_MIB: &[u64] = &[40, 12];
    let mut guest = QemuGuest::serve(&kernel()?, SMALL, "page_reporting.tracker=mainline")?;
    let mut passed = Vec::new();
    for &left in LEFT_MIB {
        if !survives(&mut guest, left)? {
            break;
        }
        passed.push(left);
    }
    // The maximum number of reports in flight.
    guest.shell(
        "cd /sys/kernel/mm/page_reporting && echo bitmap > tracker && echo 0 > age_ms && \
         echo 1 > pending_blocks && echo 0 > backoff",
    )?;
    for &left in &passed {
        // The limit is not sharp, because the kernel's own use of memory varies.
        let survived = survives(&mut guest, left)? || survives(&mut guest, left)?;
        ensure!(
            survived,
            "{left} MiB left over: mainline's tracker survives, the bitmap does not"
        );
    }
    println!("  of {LEFT_MIB:?} MiB left over, no OOM with {passed:?}");
    ensure!(
        !passed.is_empty(),
        "mainline's tracker does not survive either"
    );
    // Reporting still works after memory was full.
    gives_back(&mut guest, 150)?;
    let complaints: Vec<String> = guest
        .complaints()
        .into_iter()
        .filter(|line| !line.contains("Out of memory"))
        .collect();
    no_complaints(&complaints);
    Ok(Outcome::Passed)
}

/// Whether successive programs can take all available memory except `left_mib`.
fn survives(guest: &mut QemuGuest, left_mib: u64) -> Result<bool> {
    let answer = guest.command(&format!(
        "sh echo 3 > /proc/sys/vm/drop_caches; \
         KIB=$(sed -n 's/MemAvailable: *//p' /proc/meminfo | cut -d' ' -f1); \
         for ROUND in 1 2 3; do \
         guest-mem touch --bytes $((KIB - {left_mib} * 1024))K > /dev/null 2>&1 || exit 9; \
         done"
    ))?;
    ensure!(
        ["sh 0", "sh 9"].iter().any(|word| answer.ends_with(word)),
        "{answer}"
    );
    Ok(answer.ends_with("sh 0"))
}
