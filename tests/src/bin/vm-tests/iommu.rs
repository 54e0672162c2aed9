//! Tests disks behind the virtual IOMMU of a Linux guest.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::vmm::PROCESS_DEADLINE;
use integration_tests::{paths, tests};
use serde_json::json;

use crate::debian::DISTRIBUTION_DEADLINE;
use crate::hotplug::{expect, wait_disk, wait_gone};
use crate::snapshot::restore;

pub(crate) fn tests() -> Vec<Test> {
    tests![debian_6_12_disks_behind_the_iommu_keep_data_come_and_go_and_are_saved]
}

/// Debian's first kernel with a driver for the IOMMU on x86.
pub(crate) const KERNEL: &str = "debian-6.12/vmlinuz";

/// A counter of the IOMMU.
pub(crate) fn counter(guest: &Guest, name: &str) -> Result<u64> {
    let counters = guest.vmm.get("vm.counters")?;
    let found = counters["__iommu"][name].as_u64();
    found.with_context(|| format!("no {name} in {counters:#}"))
}

fn image(folder: &Path, name: &str) -> Result<String> {
    let path = folder.join(name);
    File::create(&path)?.set_len(64 * MIB)?;
    let path = path.into_os_string().into_string();
    path.ok().context("path is not UTF-8")
}

/// Writes the disk, and reads it back past the page cache.
pub(crate) fn write_and_verify(guest: &mut Guest, disk: &str, seed: u32) -> Result<()> {
    guest.command(&format!("disk-fill /dev/{disk} 32M {seed}"))?;
    guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    guest
        .command(&format!("disk-verify /dev/{disk} 32M {seed}"))
        .map(drop)
}

/// The domain of the disk translates: `DMA` or, with deferred invalidation, `DMA-FQ`.
fn ensure_translated(guest: &mut Guest, disk: &str) -> Result<()> {
    let script = format!("cat $(readlink -f /sys/block/{disk}/device)/../iommu_group/type");
    let found = guest.shell(&script)?;
    ensure!(found.contains("DMA"), "{disk}: {found}");
    Ok(())
}

fn debian_6_12_disks_behind_the_iommu_keep_data_come_and_go_and_are_saved() -> Result<Outcome> {
    if paths::guest(KERNEL).is_err() {
        return Ok(Outcome::Skipped(format!("there is no guest {KERNEL}")));
    }
    let folder = tempfile::tempdir()?;
    let first = image(folder.path(), "first.raw")?;
    let second = image(folder.path(), "second.raw")?;
    let disk = format!("path={first},image_type=raw,iommu=on,num_queues=2");
    let machine = Machine {
        kernel: KERNEL,
        cpus: "boot=2",
        arguments: &[
            "--disk",
            &disk,
            "--platform",
            "num_pci_segments=2,iommu_segments=[1],iommu_address_width=48",
            "--balloon",
            "size=0,free_page_reporting=on",
        ],
        ..Machine::default()
    };
    let mut guest = Guest::on_socket(machine.start()?, "serial.sock")?;
    guest.expect("guest: init", DISTRIBUTION_DEADLINE)?;
    guest.wait_serving()?;
    wait_disk(&mut guest)?;
    ensure_translated(&mut guest, "vda")?;
    write_and_verify(&mut guest, "vda", 7)?;
    ensure!(counter(&guest, "requests")? > 0);
    ensure!(counter(&guest, "mappings")? > 0, "the rings are mapped");

    // Only the segment that is behind it as a whole accepts a disk later.
    let add = |segment: u16| json!({"path": second, "image_type": "Raw", "id": "later", "iommu": true, "pci_segment": segment});
    let refused = expect(&guest, "vm.add-disk", &add(0), 400)?;
    ensure!(refused.contains("iommu_segments"), "{refused}");
    for seed in [8, 9] {
        expect(&guest, "vm.add-disk", &add(1), 200)?;
        guest
            .shell_until("[ -b /dev/vdb ]")
            .context("no /dev/vdb")?;
        ensure_translated(&mut guest, "vdb")?;
        write_and_verify(&mut guest, "vdb", seed)?;
        expect(&guest, "vm.remove-device", &json!({"id": "later"}), 204)?;
        wait_gone(&guest, "later")?;
    }
    guest.command("disk-verify /dev/vda 32M 7")?;

    guest.vmm.put("vm.pause", None)?;
    let saved = folder.path().join("saved");
    fs::create_dir(&saved)?;
    let url = format!("file://{}", saved.display());
    let body = json!({"destination_url": url}).to_string();
    guest.vmm.put("vm.snapshot", Some(&body))?;
    guest.vmm.put("vmm.shutdown", None)?;
    guest.vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    let mut guest = restore(&guest, &url)?;
    guest.vmm.put("vm.resume", None)?;
    guest.wait_serving()?;
    guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    guest.command("disk-verify /dev/vda 32M 7")?;
    write_and_verify(&mut guest, "vda", 10)?;
    for name in ["faults", "bad_requests", "refused_requests"] {
        let count = counter(&guest, name)?;
        ensure!(count == 0, "{name}: {count}");
    }
    println!(
        "     {} requests, {} mappings",
        counter(&guest, "requests")?,
        counter(&guest, "mappings")?
    );
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}
