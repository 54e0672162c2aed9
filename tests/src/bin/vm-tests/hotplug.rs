//! Tests devices that are hot-plugged into and unplugged from a running Linux.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;
use integration_tests::wait::wait_for;
use serde_json::{Value, json};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        memory_plugged_in_is_used_ballooned_and_comes_back,
        memory_devices_are_used_reported_and_part_of_ram_after_a_reboot,
        devices_on_another_pci_segment_work_come_and_go,
        vcpus_come_and_go_with_their_topology,
    ]
}

/// Tests that end a shared guest.
pub(crate) fn sharing() -> Vec<Test> {
    tests![
        balloon_added_to_a_running_guest_reports_and_goes_when_it_is_empty,
        disk_added_to_a_running_guest_keeps_data_and_goes,
    ]
}

/// Time for asynchronous actions of Linux: probing, reporting, releasing.
const GUEST_DEADLINE: Duration = Duration::from_secs(120);

pub(crate) fn expect(guest: &Guest, endpoint: &str, body: &Value, status: u16) -> Result<String> {
    let answer = guest
        .vmm
        .request("PUT", endpoint, Some(&body.to_string()))?;
    ensure!(answer.status == status, "{endpoint} {body}: {answer:?}");
    Ok(answer.body.unwrap_or_default())
}

/// Waits until a figure of `vm.reclaim-stats` is as wanted.
pub(crate) fn wait_figure(
    guest: &Guest,
    pointer: &str,
    wanted: impl Fn(u64) -> bool,
) -> Result<()> {
    wait_for(pointer, GUEST_DEADLINE, || {
        let stats = guest.vmm.get("vm.reclaim-stats")?;
        let figure = stats.pointer(pointer).and_then(Value::as_u64);
        Ok(figure.filter(|figure| wanted(*figure)).map(drop))
    })
}

/// Waits until the guest has released a device.
pub(crate) fn wait_gone(guest: &Guest, id: &str) -> Result<()> {
    wait_for("the device to go", GUEST_DEADLINE, || {
        let info = guest.vmm.get("vm.info")?;
        Ok(info["device_tree"][id].is_null().then_some(()))
    })
}

fn balloon_added_to_a_running_guest_reports_and_goes_when_it_is_empty() -> Result<Outcome> {
    let mut guest = Machine::default().take_over()?;
    // Touched and freed before a balloon exists.
    guest.command("alloc 200M")?;
    guest.command("free")?;
    let balloon = json!({"size": 0, "free_page_reporting": true});
    let added = expect(&guest, "vm.add-balloon", &balloon, 200)?;
    ensure!(added.contains("__balloon"), "{added}");
    wait_figure(&guest, "/report/discarded_bytes", |bytes| bytes > 150 * MIB)?;

    let remove = json!({"id": "__balloon"});
    expect(
        &guest,
        "vm.resize",
        &json!({"desired_balloon": 64 * MIB}),
        204,
    )?;
    wait_figure(&guest, "/ballooned_bytes", |bytes| bytes == 64 * MIB)?;
    let refused = expect(&guest, "vm.remove-device", &remove, 400)?;
    ensure!(refused.contains("holds 67108864 bytes"), "{refused}");
    expect(&guest, "vm.resize", &json!({"desired_balloon": 0}), 204)?;
    wait_figure(&guest, "/ballooned_bytes", |bytes| bytes == 0)?;
    expect(&guest, "vm.remove-device", &remove, 204)?;
    wait_gone(&guest, "__balloon")?;
    let left = guest.shell("ls /sys/bus/virtio/drivers/virtio_balloon | grep -c virtio || true")?;
    ensure!(left.lines().any(|line| line.trim() == "0"), "{left}");
    // Repeated with memory in the balloon from the start.
    expect(&guest, "vm.add-balloon", &json!({"size": 32 * MIB}), 200)?;
    wait_figure(&guest, "/ballooned_bytes", |bytes| bytes == 32 * MIB)?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// Linux finds the second segment in MCFG and DSDT: a balloon that is present from the start, and a disk that is
/// hot-plugged.
fn devices_on_another_pci_segment_work_come_and_go() -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.raw");
    File::create(&path)?.set_len(16 * MIB)?;
    let mut guest = Machine {
        arguments: &[
            "--platform",
            "num_pci_segments=2",
            "--balloon",
            "size=0,pci_segment=1",
        ],
        ..Machine::default()
    }
    .serve()?;
    let found = guest.shell("ls /sys/bus/pci/devices")?;
    ensure!(found.contains("0001:00:00.0"), "{found}");
    resize(&guest, "desired_balloon", 32)?;
    wait_figure(&guest, "/ballooned_bytes", |bytes| bytes == 32 * MIB)?;

    let disk = json!({"path": path, "image_type": "Raw", "id": "data", "pci_segment": 1});
    for verb in ["disk-fill", "disk-verify"] {
        let added = expect(&guest, "vm.add-disk", &disk, 200)?;
        ensure!(added.contains("0001:00:01.0"), "{added}");
        wait_disk(&mut guest)?;
        let link = guest.shell("readlink /sys/block/vda")?;
        ensure!(link.contains("/0001:00:01.0/"), "{link}");
        guest.command(&format!("{verb} /dev/vda 8M 7"))?;
        expect(&guest, "vm.remove-device", &json!({"id": "data"}), 204)?;
        wait_gone(&guest, "data")?;
        guest.shell("! [ -e /dev/vda ]")?;
    }
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// Linux starts added vCPUs on request, and releases them automatically.
fn vcpus_come_and_go_with_their_topology() -> Result<Outcome> {
    let mut guest = Machine {
        cpus: "boot=1,max=4,topology=2:2:1:1",
        ..Machine::default()
    }
    .serve()?;
    // Two successive removals, and then vCPUs that existed before are added again.
    for count in [3_u32, 2, 1, 4] {
        expect(&guest, "vm.resize", &json!({"desired_vcpus": count}), 204)?;
        let last = count - 1;
        guest.shell_until(&format!(
            "cd /sys/devices/system/cpu && [ -d cpu{last} ] && ! [ -d cpu{count} ]"
        ))?;
        let script = "cd /sys/devices/system/cpu; \
             for cpu in cpu[1-3]; do \
                 [ ! -d $cpu ] || [ $(cat $cpu/online) = 1 ] || echo 1 > $cpu/online || exit 1; \
             done; \
             grep -c ^processor /proc/cpuinfo";
        let online = guest.shell(script)?;
        ensure!(
            online.lines().any(|line| line.trim() == count.to_string()),
            "{count} vCPUs: {online}"
        );
        wait_for("the threads of the vCPUs", GUEST_DEADLINE, || {
            let (_, threads) = guest.vmm.possessions()?;
            let vcpus = threads.iter().filter(|name| name.starts_with("vcpu"));
            Ok((vcpus.count() == count as usize).then_some(()))
        })?;
        let info = guest.vmm.get("vm.info")?;
        ensure!(info["config"]["cpus"]["boot_vcpus"] == count, "{info:#}");
        guest.vmm.put("vm.pause", None)?;
        guest.vmm.put("vm.resume", None)?;
    }
    let siblings =
        guest.shell("cat /sys/devices/system/cpu/cpu[13]/topology/thread_siblings_list")?;
    for pair in ["0-1", "2-3"] {
        ensure!(siblings.contains(pair), "{siblings}");
    }
    guest.command("alloc 64M seed=3")?;
    guest.command("verify")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

pub(crate) fn wait_disk(guest: &mut Guest) -> Result<()> {
    guest
        .shell_until("[ -b /dev/vda ]")
        .context("no /dev/vda")
        .map(drop)
}

fn disk_added_to_a_running_guest_keeps_data_and_goes() -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.raw");
    File::create(&path)?.set_len(16 * MIB)?;
    let mut guest = Machine::default().take_over()?;
    let disk = json!({"path": path, "image_type": "Raw", "id": "data"});
    expect(&guest, "vm.add-disk", &disk, 200)?;
    wait_disk(&mut guest)?;
    guest.command("disk-fill /dev/vda 8M 7")?;
    expect(&guest, "vm.remove-device", &json!({"id": "data"}), 204)?;
    wait_gone(&guest, "data")?;
    guest.shell("! [ -e /dev/vda ]")?;
    // The image is free: it can be plugged in again with its data.
    expect(&guest, "vm.add-disk", &disk, 200)?;
    wait_disk(&mut guest)?;
    guest.command("disk-verify /dev/vda 8M 7")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

pub(crate) fn resize(guest: &Guest, field: &str, mib: u64) -> Result<()> {
    expect(guest, "vm.resize", &json!({ field: mib * MIB }), 204).map(drop)
}

/// ACPI: Linux finds the memory in its memory devices, gives it back when it is free, and has what `memory.size` says
/// after a reboot.
fn memory_devices_are_used_reported_and_part_of_ram_after_a_reboot() -> Result<Outcome> {
    const DIMM: &str = "/zones/2/resident_bytes";
    let mut guest = Machine {
        memory: "size=512M,hotplug_size=1G",
        arguments: &["--balloon", "size=0,free_page_reporting=on"],
        ..Machine::default()
    }
    .serve()?;
    let before = guest.memory_bytes("total")?;
    let sizes = |guest: &Guest| -> Result<[Option<u64>; 2]> {
        let info = guest.vmm.get("vm.info")?;
        let sizes = [
            &info["config"]["memory"]["size"],
            &info["memory_actual_size"],
        ];
        Ok(sizes.map(|bytes| bytes.as_u64().map(|bytes| bytes / MIB)))
    };
    for total in [640, 1024] {
        resize(&guest, "desired_ram", total)?;
        ensure!(sizes(&guest)? == [Some(total); 2], "{:?}", sizes(&guest)?);
        let blocks = total / 128;
        guest.shell_until(&format!(
            "cd /sys/devices/system/memory && [ $(ls -d memory[0-9]* | wc -l) -ge {blocks} ]"
        ))?;
        let script = "cd /sys/devices/system/memory; \
             for block in memory[0-9]*; do \
                 [ $(cat $block/state) = online ] || echo online > $block/state || exit 1; \
             done";
        guest.shell(script)?;
        let now = guest.memory_bytes("total")?;
        let least = before + (total - 512) * MIB * 9 / 10;
        ensure!(now >= least, "{total} MiB: {before} became {now}");
    }
    wait_figure(&guest, "/configured_bytes", |bytes| bytes == 1024 * MIB)?;
    guest.command("alloc 700M seed=5")?;
    guest.command("verify")?;
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    let resident = stats.pointer(DIMM).and_then(Value::as_u64);
    let resident = resident.context("no figures of the second memory device")?;
    ensure!(resident > 100 * MIB, "{stats:#}");
    guest.vmm.put("vm.pause", None)?;
    guest.vmm.put("vm.resume", None)?;
    guest.command("verify")?;
    guest.command("free")?;
    wait_figure(&guest, DIMM, |bytes| bytes < resident / 2)?;

    for refused in [1025, 2048] {
        expect(
            &guest,
            "vm.resize",
            &json!({"desired_ram": refused * MIB}),
            400,
        )?;
    }
    resize(&guest, "desired_ram", 768)?;
    ensure!(
        sizes(&guest)? == [Some(768), Some(1024)],
        "{:?}",
        sizes(&guest)?
    );
    guest.command("alloc 700M seed=6")?;
    guest.command("verify")?;
    guest.vmm.put("vm.reboot", None)?;
    guest.wait_init()?;
    guest.wait_serving()?;
    ensure!(sizes(&guest)? == [Some(768); 2], "{:?}", sizes(&guest)?);
    let now = guest.memory_bytes("total")?;
    let expected = before + 256 * MIB * 9 / 10..before + 256 * MIB;
    ensure!(expected.contains(&now), "{now} not in {expected:?}");
    // The slots are free again.
    resize(&guest, "desired_ram", 1024)?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// virtio-mem: plugged memory works like any other, and returns to the host when it is unplugged. Pages in use are
/// migrated.
fn memory_plugged_in_is_used_ballooned_and_comes_back() -> Result<Outcome> {
    const PLUGGED: &str = "/zones/1/configured_bytes";
    const RESIDENT: &str = "/zones/1/resident_bytes";
    let mut guest = Machine {
        memory: "size=512M,hotplug_method=virtio-mem,hotplug_size=512M",
        arguments: &["--balloon", "size=0"],
        command_line: "memhp_default_state=online_movable",
        ..Machine::default()
    }
    .serve()?;
    let before = guest.memory_bytes("total")?;
    wait_figure(&guest, "/configured_bytes", |bytes| bytes == 512 * MIB)?;
    expect(
        &guest,
        "vm.resize",
        &json!({"desired_ram": 1025 * MIB}),
        400,
    )?;

    resize(&guest, "desired_ram", 1024)?;
    wait_figure(&guest, PLUGGED, |bytes| bytes == 512 * MIB)?;
    let info = guest.vmm.get("vm.info")?;
    ensure!(info["memory_actual_size"] == 1024 * MIB, "{info:#}");
    wait_for("the memory in the guest", GUEST_DEADLINE, || {
        let total = guest.memory_bytes("total")?;
        Ok((total >= before + 480 * MIB).then_some(()))
    })?;
    guest.command("alloc 600M seed=11")?;
    guest.command("verify")?;
    wait_figure(&guest, RESIDENT, |bytes| bytes > 300 * MIB)?;
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    let resident = stats.pointer(RESIDENT).and_then(Value::as_u64);
    let resident = resident.context("no figures of what was plugged in")?;
    guest.command("free")?;

    // Linux takes pages for the balloon from movable memory, which is the plugged memory.
    resize(&guest, "desired_balloon", 128)?;
    wait_figure(&guest, "/ballooned_bytes", |bytes| bytes == 128 * MIB)?;
    wait_figure(&guest, RESIDENT, |bytes| bytes + 100 * MIB < resident)?;
    resize(&guest, "desired_balloon", 0)?;
    wait_figure(&guest, "/ballooned_bytes", |bytes| bytes == 0)?;

    guest.command("alloc 200M seed=12")?;
    resize(&guest, "desired_ram", 512)?;
    wait_figure(&guest, PLUGGED, |bytes| bytes == 0)?;
    wait_figure(&guest, RESIDENT, |bytes| bytes == 0)?;
    guest.command("verify")?;
    let counters = guest.vmm.get("vm.counters")?;
    let figure = |name: &str| counters["mem0"][name].as_u64();
    ensure!(
        figure("unplug_discarded_bytes") == Some(512 * MIB)
            && figure("unplug_requested_bytes") == Some(512 * MIB)
            && figure("requests_wrong") == Some(0),
        "{counters:#}"
    );
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    ensure!(stats["configured_bytes"] == 512 * MIB, "{stats:#}");
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}
