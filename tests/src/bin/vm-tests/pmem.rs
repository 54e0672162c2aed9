//! Tests persistent memory of a Linux guest.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{BOOT_DEADLINE, Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::vmm::Vmm;
use integration_tests::wait::wait_for;
use integration_tests::{paths, tests};
use serde_json::{Value, json};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        pmem_survives_a_killed_vmm_is_not_discarded_and_goes,
        pmem_is_the_root_of_a_guest,
    ]
}

/// Time for asynchronous actions of Linux: probing, releasing.
const GUEST_DEADLINE: Duration = Duration::from_secs(120);

fn expect(guest: &Guest, endpoint: &str, body: &Value, status: u16) -> Result<()> {
    let answer = guest
        .vmm
        .request("PUT", endpoint, Some(&body.to_string()))?;
    ensure!(answer.status == status, "{endpoint} {body}: {answer:?}");
    Ok(())
}

fn wait_pmem(guest: &mut Guest) -> Result<()> {
    guest
        .shell_until("[ -b /dev/pmem0 ]")
        .context("no /dev/pmem0")
        .map(drop)
}

fn wait_gone(guest: &Guest, id: &str) -> Result<()> {
    wait_for("the device to go", GUEST_DEADLINE, || {
        let info = guest.vmm.get("vm.info")?;
        Ok(info["device_tree"][id].is_null().then_some(()))
    })
}

fn pmem_survives_a_killed_vmm_is_not_discarded_and_goes() -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("pmem");
    File::create(&path)?.set_len(16 * MIB)?;
    let option = format!("file={},id=data", path.display());
    let arguments = [
        "--pmem",
        &option,
        "--balloon",
        "size=0,free_page_reporting=on",
    ];
    let machine = Machine {
        arguments: &arguments,
        ..Machine::default()
    };
    let mut guest = machine.serve()?;
    wait_pmem(&mut guest)?;
    guest.command("disk-fill /dev/pmem0 8M 7")?;
    // Meanwhile, only RAM was reported and ballooned.
    guest.command("alloc 200M")?;
    guest.command("free")?;
    expect(
        &guest,
        "vm.resize",
        &json!({"desired_balloon": 128 * MIB}),
        204,
    )?;
    wait_for("the balloon", GUEST_DEADLINE, || {
        let stats = guest.vmm.get("vm.reclaim-stats")?;
        Ok((stats["ballooned_bytes"] == 128 * MIB).then_some(()))
    })?;
    guest.command("disk-verify /dev/pmem0 8M 7")?;
    let counters = guest.vmm.get("vm.counters")?;
    ensure!(
        counters["data"]["flushes"].as_u64() > Some(0),
        "{counters:#}"
    );
    // The VMM is killed and cannot write anything.
    drop(guest);

    let mut guest = machine.serve()?;
    wait_pmem(&mut guest)?;
    guest.command("disk-verify /dev/pmem0 8M 7")?;
    expect(&guest, "vm.remove-device", &json!({"id": "data"}), 204)?;
    wait_gone(&guest, "data")?;
    guest.shell("! [ -e /dev/pmem0 ]")?;
    // The file and its address are free again.
    let pmem = json!({"file": path, "id": "again", "discard_writes": true});
    expect(&guest, "vm.add-pmem", &pmem, 200)?;
    wait_pmem(&mut guest)?;
    guest.command("disk-verify /dev/pmem0 8M 7")?;
    guest.command("disk-fill /dev/pmem0 8M 8")?;
    let kept = fs::read(&path)?;
    guest.end_cleanly()?;
    ensure!(kept == fs::read(&path)?, "the file changed");
    let mut guest = machine.serve()?;
    wait_pmem(&mut guest)?;
    guest.command("disk-verify /dev/pmem0 8M 7")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// The guest's initramfs as an ext4 image. `None` if a tool is missing.
pub(crate) fn root_image(folder: &Path, initramfs: &Path) -> Result<Option<PathBuf>> {
    let root = folder.join("root");
    fs::create_dir(&root)?;
    for tool in ["busybox", "mke2fs"] {
        let found = Command::new(tool)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .stdin(Stdio::null())
            .status();
        if found.is_err() {
            return Ok(None);
        }
    }
    let unpack = format!("busybox zcat '{}' | busybox cpio -idm", initramfs.display());
    let unpacked = Command::new("sh")
        .args(["-c", &unpack])
        .current_dir(&root)
        .status()?;
    ensure!(unpacked.success(), "the initramfs cannot be unpacked");
    for mount in ["proc", "sys", "dev", "tmp", "mnt"] {
        fs::create_dir_all(root.join(mount))?;
    }
    let image = folder.join("root.img");
    File::create(&image)?.set_len(64 * MIB)?;
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .args([&root, &image])
        .status()?;
    ensure!(made.success(), "mke2fs failed");
    Ok(Some(image))
}

fn pmem_is_the_root_of_a_guest() -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let kernel = paths::guest(Machine::DEFAULT.kernel)?;
    let initramfs = paths::guest_initramfs(&kernel)?;
    let Some(image) = root_image(folder.path(), &initramfs)? else {
        let reason = "busybox or mke2fs is not installed";
        return Ok(Outcome::Skipped(reason.to_owned()));
    };
    let machine = Machine {
        command_line: "root=/dev/pmem0 rootfstype=ext4 rw init=/init",
        ..Machine::default()
    };
    let mut arguments = machine.vmm_arguments()?;
    let initramfs_at = arguments.iter().position(|it| it == "--initramfs");
    let initramfs_at = initramfs_at.context("no initramfs")?;
    arguments.drain(initramfs_at..initramfs_at + 2);
    let option = format!("file={},discard_writes=on", image.display());
    arguments.extend(["--pmem".to_owned(), option]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut vmm = Vmm::spawn_with(&arguments, |_| ())?;
    vmm.wait_api()?;
    let mut guest = Guest::on_socket(vmm, "serial.sock")?;
    guest.expect("guest: init", BOOT_DEADLINE)?;
    guest.wait_serving()?;
    let mounts = guest.shell("cat /proc/mounts")?;
    ensure!(mounts.contains("/dev/root / ext4 rw"), "{mounts}");
    guest.shell("echo written > /file && sync && cat /file")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}
