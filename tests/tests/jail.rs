//! Tests a whole machine whose VMM runs as another user in a separate root folder.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{SCENARIO_DEADLINE, image, kvm_opens};
use integration_tests::literal_client::Answer;
use integration_tests::other_user;
use integration_tests::vmm::Vmm;
use integration_tests::wait::wait_for;
use serde_json::json;

fn add_disk(vmm: &Vmm, path: &Path) -> Result<Answer> {
    other_user::file(path, 1 << 20)?;
    let disk = json!({"path": path, "image_type": "Raw"});
    vmm.request("PUT", "vm.add-disk", Some(&disk.to_string()))
}

#[test]
fn machine_of_another_user_in_a_jail_boots_reboots_measures_and_grows() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    if !other_user::is_possible()? {
        test_skip::skip("changing the user and the root folder needs root");
        return Ok(());
    }
    let start = tempfile::tempdir()?;
    let program = other_user::vmm(start.path())?;

    let (shown, outside) = (other_user::folder()?, other_user::folder()?);
    let disk = shown.path().join("boot-disk");
    other_user::file(&disk, 1 << 20)?;
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
    let mut vmm = Vmm::spawn_program(&program, &arguments, |_| ())?;
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
    other_user::pid_of_jailed(&vmm)?;
    vmm.put("vm.reboot", None)?;
    ensure!(resident(&vmm)? > 0);
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)?;
    for name in ["api.sock", "api.sock.lock", "vsock"] {
        ensure!(!vmm.folder().join(name).exists(), "{name} was left behind");
    }
    let owner = fs::metadata(vmm.folder().join("serial"))?;
    ensure!(owner.uid() == other_user::NOBODY, "{owner:?}");
    Ok(())
}
