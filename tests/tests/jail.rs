//! Tests a whole machine whose VMM runs as another user in a root folder of its own.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{SCENARIO_DEADLINE, image, kvm_opens};
use integration_tests::literal_client::Answer;
use integration_tests::paths;
use integration_tests::vmm::Vmm;
use integration_tests::wait::wait_for;
use serde_json::json;

const NOBODY: u32 = 65534;

/// Starts the VMM where every user may open `/dev/kvm`, with its socket in a folder of `NOBODY`. Neither the host's
/// device nor its owner changes.
const START: &str = r#"#!/bin/sh
set -e
folder=$(dirname "$2")
chown 65534:65534 "$folder"
mknod -m 666 "$folder/kvm" c 10 232
exec unshare --mount sh -ec 'mount --bind "$1/kvm" /dev/kvm; shift; exec "$@"' sh "$folder" PROGRAM "$@"
"#;

fn folder_of_nobody() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    chown(folder.path(), Some(NOBODY), Some(NOBODY))?;
    Ok(folder)
}

fn add_disk(vmm: &Vmm, path: &Path) -> Result<Answer> {
    File::create(path)?.set_len(1 << 20)?;
    chown(path, Some(NOBODY), Some(NOBODY))?;
    let disk = json!({"path": path, "image_type": "Raw"});
    vmm.request("PUT", "vm.add-disk", Some(&disk.to_string()))
}

#[test]
fn machine_of_another_user_in_a_jail_boots_reboots_measures_and_grows() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    if fs::metadata("/proc/self")?.uid() != 0 {
        test_skip::skip("changing the user and the root folder needs root");
        return Ok(());
    }
    let start = tempfile::tempdir()?;
    let script = start.path().join("start");
    let program = paths::program("cloud-hypervisor")?;
    let program = program.to_str().context("path is not UTF-8")?;
    fs::write(&script, START.replace("PROGRAM", program))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;

    let (shown, outside) = (folder_of_nobody()?, folder_of_nobody()?);
    let disk = shown.path().join("boot-disk");
    File::create(&disk)?.set_len(1 << 20)?;
    chown(&disk, Some(NOBODY), Some(NOBODY))?;
    let kernel = image()?;
    let arguments = [
        "--user",
        "65534",
        "--group",
        "65534",
        "--jail",
        &format!("path={},access=rw", shown.path().display()),
        "--kernel",
        kernel.to_str().context("path is not UTF-8")?,
        "--cmdline",
        "scenario=hotplug",
        "--memory",
        "size=256M",
        "--serial",
        "file=@/serial",
        "--console",
        "off",
        "--event-monitor",
        "path=@/events",
        "--disk",
        &format!("path={},image_type=raw", disk.display()),
        "--balloon",
        "size=0,free_page_reporting=on",
        "--vsock",
        "cid=3,socket=@/vsock",
    ];
    let mut vmm = Vmm::spawn_program(&script, &arguments, |_| ())?;
    wait_for("the guest", SCENARIO_DEADLINE, || {
        ensure!(!vmm.has_ended()?, "the VMM ended");
        Ok(vmm.text("serial").contains("READY disk").then_some(()))
    })
    .with_context(|| vmm.stderr())?;

    let refused = add_disk(&vmm, &outside.path().join("disk"))?;
    ensure!(refused.status == 400, "{refused:?}");
    let causes = refused.json()?.to_string();
    ensure!(causes.contains("outside the jail"), "{causes}");
    let added = add_disk(&vmm, &shown.path().join("disk"))?;
    ensure!(added.status == 200, "{added:?}");
    let resident = |vmm: &Vmm| -> Result<u64> {
        let stats = vmm.get("vm.reclaim-stats")?;
        let resident = stats["resident_bytes"].as_u64();
        resident.with_context(|| stats.to_string())
    };
    // The VMM cannot open its page map as this user any more.
    ensure!(resident(&vmm)? > 0);
    vmm.put("vm.reboot", None)?;
    ensure!(resident(&vmm)? > 0);
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)?;
    for name in ["api.sock", "api.sock.lock", "vsock"] {
        ensure!(!vmm.folder().join(name).exists(), "{name} was left behind");
    }
    let owner = fs::metadata(vmm.folder().join("serial"))?;
    ensure!(owner.uid() == NOBODY, "{owner:?}");
    Ok(())
}
