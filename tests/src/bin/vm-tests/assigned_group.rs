//! Tests several devices of one IOMMU group in a guest. The host needs a group with two disks and a device with another
//! driver: `cargo xtask testbed run --assignable`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use integration_tests::linux::Guest;
use integration_tests::outcome::{Outcome, Test};
use integration_tests::wait::wait_for;
use integration_tests::{paths, tests};
use serde_json::json;

use crate::assigned::{
    GUEST_DEADLINE, Kind, boot_with, give, groups_of_host, no_device, wait_disk_named,
};
use crate::hotplug::{expect, wait_gone};
use crate::iommu::{KERNEL, write_and_verify};

pub(crate) fn tests() -> Vec<Test> {
    tests![debian_6_12_devices_of_one_group_come_and_go_one_by_one]
}

fn debian_6_12_devices_of_one_group_come_and_go_one_by_one() -> Result<Outcome> {
    if paths::guest(KERNEL).is_err() {
        return Ok(Outcome::Skipped(format!("there is no guest {KERNEL}")));
    }
    for group in groups_of_host()? {
        let (disks, others): (Vec<_>, Vec<_>) =
            group.into_iter().partition(|path| Kind::Nvme.is(path));
        if let ([first, second], [other]) = (&disks[..], &others[..]) {
            come_and_go([first, second], other)?;
            return Ok(Outcome::Passed);
        }
    }
    Ok(no_device())
}

fn device(id: &str, path: &Path, iommu: bool) -> serde_json::Value {
    json!({"path": path, "id": id, "iommu": iommu, "pci_segment": u16::from(iommu)})
}

fn add(guest: &Guest, id: &str, path: &Path) -> Result<()> {
    expect(guest, "vm.add-device", &device(id, path, false), 200).map(drop)
}

fn remove(guest: &Guest, id: &str) -> Result<()> {
    expect(guest, "vm.remove-device", &json!({"id": id}), 204)?;
    wait_gone(guest, id)
}

/// The file of the group, which only one process can open.
fn file_of_group(device: &Path) -> Result<PathBuf> {
    let group = fs::read_link(device.join("iommu_group"))?;
    let name = group.file_name().context("a group without a name")?;
    Ok(Path::new("/dev/vfio").join(name))
}

fn come_and_go([first, second]: [&Path; 2], other: &Path) -> Result<()> {
    for disk in [first, second] {
        give(disk, "vfio-pci")?;
    }
    let group = file_of_group(first)?;
    let mut guest = boot_with(KERNEL, "size=512M")?;
    let discards_stop = |guest: &Guest| -> Result<bool> {
        let stats = guest.vmm.get("vm.reclaim-stats")?;
        Ok(stats["inhibited"] == "assigned_device")
    };

    // A device of the group is in use by the host, which is named.
    give(other, "virtio-pci")?;
    let refused = expect(&guest, "vm.add-device", &device("a", first, false), 400)?;
    ensure!(refused.contains("(virtio-pci)"), "{refused}");
    give(other, "none")?;

    add(&guest, "a", first)?;
    wait_disk_named(&mut guest, "nvme0n1")?;
    // Another address space is impossible.
    let refused = expect(&guest, "vm.add-device", &device("b", second, true), 400)?;
    ensure!(refused.contains("in the IOMMU group of"), "{refused}");
    add(&guest, "b", second)?;
    wait_disk_named(&mut guest, "nvme1n1")?;
    for (disk, seed) in [("nvme0n1", 3), ("nvme1n1", 5)] {
        write_and_verify(&mut guest, disk, seed)?;
    }

    // The other one works when one is gone, and when it is back.
    remove(&guest, "a")?;
    ensure!(discards_stop(&guest)?, "memory is still pinned");
    write_and_verify(&mut guest, "nvme1n1", 7)?;
    add(&guest, "a", first)?;
    wait_disk_named(&mut guest, "nvme0n1")?;
    write_and_verify(&mut guest, "nvme0n1", 9)?;
    remove(&guest, "b")?;
    write_and_verify(&mut guest, "nvme0n1", 11)?;

    // The last one releases the group.
    ensure!(File::open(&group).is_err(), "the group is in use");
    remove(&guest, "a")?;
    // The device is out of the list before it is closed.
    wait_for("memory to be unpinned", GUEST_DEADLINE, || {
        Ok((!discards_stop(&guest)?).then_some(()))
    })?;
    File::open(&group).context("the group is free")?;
    add(&guest, "b", second)?;
    wait_disk_named(&mut guest, "nvme0n1")?;
    write_and_verify(&mut guest, "nvme0n1", 13)?;
    remove(&guest, "b")?;
    guest.end_cleanly()
}
