//! Tests a whole machine whose VMM may use only the files that its options name.

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{SCENARIO_DEADLINE, kvm_opens, start};
use integration_tests::literal_client::Answer;
use integration_tests::vmm::Vmm;
use integration_tests::wait::wait_for;
use serde_json::json;

fn add_disk(vmm: &Vmm, name: &str) -> Result<Answer> {
    let path = vmm.folder().join(name);
    std::fs::File::create(&path)?.set_len(1 << 20)?;
    let disk = json!({"path": path, "image_type": "Raw"});
    vmm.request("PUT", "vm.add-disk", Some(&disk.to_string()))
}

#[test]
fn machine_with_every_console_boots_reboots_and_grows_by_its_rules_alone() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let disk = tempfile::NamedTempFile::new()?;
    disk.as_file().set_len(1 << 20)?;
    let disk = format!("path={},image_type=raw", disk.path().display());
    let extra = tempfile::tempdir()?;
    let rule = format!("path={},access=rw", extra.path().display());
    let arguments = [
        "--landlock",
        "--landlock-rules",
        &rule,
        "--event-monitor",
        "path=@/events",
        "--disk",
        &disk,
        "--console",
        "pty",
        "--balloon",
        "size=0,free_page_reporting=on",
        "--vsock",
        "cid=3,socket=@/vsock",
    ];
    let mut vmm = start("hotplug", &arguments)?;
    wait_for("the guest", SCENARIO_DEADLINE, || {
        ensure!(!vmm.has_ended()?, "the VMM ended");
        Ok(vmm.text("serial").contains("READY disk").then_some(()))
    })
    .with_context(|| vmm.stderr())?;

    let refused = add_disk(&vmm, "outside")?;
    ensure!(refused.status == 400, "{refused:?}");
    let causes = refused.json()?.to_string();
    ensure!(causes.contains("outside the Landlock rules"), "{causes}");
    let inside = extra.path().join("disk");
    let added = add_disk(&vmm, inside.to_str().context("a path")?)?;
    ensure!(added.status == 200, "{added:?}");
    // Measures memory, reopens everything with a reboot, and measures again.
    vmm.get("vm.reclaim-stats")?;
    vmm.put("vm.reboot", None)?;
    vmm.get("vm.reclaim-stats")?;
    vmm.put("vmm.shutdown", None)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)?;
    for name in ["api.sock", "api.sock.lock", "vsock"] {
        ensure!(!vmm.folder().join(name).exists(), "{name} was left behind");
    }
    ensure!(!vmm.stderr().contains("denied"), "{}", vmm.stderr());
    Ok(())
}
