//! Tests saving a Linux guest and continuing it in another process.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{BOOT_DEADLINE, Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::serial::Serial;
use integration_tests::tests;
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;
use serde_json::json;

use crate::balloon::{RECLAIM_DEADLINE, figure};

pub(crate) fn tests() -> Vec<Test> {
    tests![saved_guest_continues_with_its_memory_and_disk]
}

/// The guest from a snapshot of `first`, paused.
pub(crate) fn restore(first: &Guest, url: &str) -> Result<Guest> {
    let vmm = Vmm::start(&["--restore", &format!("source_url={url}")])?;
    wait_for("the restored VM", BOOT_DEADLINE, || {
        let info = vmm.request("GET", "vm.info", None)?;
        Ok(info
            .body
            .is_some_and(|body| body.contains(r#""state":"Paused""#))
            .then_some(()))
    })?;
    // The socket of the serial port is in the folder of the first process.
    let serial = Serial::connect(&first.vmm.folder().join("serial.sock"), BOOT_DEADLINE)?;
    Ok(Guest { vmm, serial })
}

/// Memory that the guest returned is neither in the file nor resident afterwards; memory that it kept has the same
/// contents.
fn saved_guest_continues_with_its_memory_and_disk() -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let text = |name: &str| {
        let path = folder.path().join(name).into_os_string();
        path.into_string().ok().context("path is not UTF-8")
    };
    let disk = text("disk.raw")?;
    File::create(&disk)?.set_len(64 * MIB)?;
    let mut first = Machine {
        cpus: "boot=2",
        arguments: &[
            "--disk",
            &format!("path={disk},image_type=raw"),
            "--balloon",
            "size=0,free_page_reporting=on",
            "--vsock",
            &format!("cid=3,socket={}", text("vsock")?),
        ],
        ..Machine::default()
    }
    .serve()?;
    first.command("disk-fill /dev/vda 16M 7")?;
    first.command("alloc 48M seed=5")?;
    let idle = figure(&first, "/resident_bytes")?;
    first.shell("dd if=/dev/zero of=/tmp/large bs=1M count=200 2>/dev/null && rm /tmp/large")?;
    wait_for("the memory of the removed file", RECLAIM_DEADLINE, || {
        let resident = figure(&first, "/resident_bytes")?;
        Ok((resident < idle + 64 * MIB).then_some(()))
    })?;

    first.vmm.put("vm.pause", None)?;
    let before = figure(&first, "/resident_bytes")?;
    let saved = text("saved")?;
    fs::create_dir(&saved)?;
    let url = format!("file://{saved}");
    let body = json!({"destination_url": url}).to_string();
    first.vmm.put("vm.snapshot", Some(&body))?;
    first.vmm.put("vmm.shutdown", None)?;
    first.vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    let written = fs::metadata(format!("{saved}/memory-0"))?.blocks() * 512;
    ensure!(
        written <= before + before / 20,
        "{written} bytes in the file of {before}"
    );

    let mut second = restore(&first, &url)?;
    let after = figure(&second, "/resident_bytes")?;
    ensure!(
        after <= before + before / 20,
        "{after} bytes resident, {before} before"
    );
    second.vmm.put("vm.resume", None)?;
    second.wait_serving()?;
    second.command("verify")?;
    second.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    second.command("disk-verify /dev/vda 16M 7")?;
    second.command("disk-fill /dev/vda 16M 8")?;
    second.command("disk-verify /dev/vda 16M 8")?;
    second.vmm.get("vm.balloon-stats")?;
    let discarded = figure(&second, "/report/discarded_bytes")?;
    second.command("free")?;
    wait_for("a report after the restore", RECLAIM_DEADLINE, || {
        let now = figure(&second, "/report/discarded_bytes")?;
        Ok((now >= discarded + 32 * MIB).then_some(()))
    })?;
    second.end_cleanly()?;
    println!(
        "     {} MiB resident, {} MiB in the file, {} MiB resident after the restore",
        before / MIB,
        written / MIB,
        after / MIB
    );
    Ok(Outcome::Passed)
}
