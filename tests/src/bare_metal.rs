//! Runs a scenario of the guest without an operating system.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use test_skip::skip;

use crate::paths::workspace;
use crate::vmm::Vmm;
use crate::wait::wait_for;

/// If KVM emulates guest code, a scenario takes seconds, and minutes on a busy machine.
pub const SCENARIO_DEADLINE: Duration = Duration::from_secs(300);

/// False if there is no KVM; the test is then marked as skipped.
pub fn kvm_opens() -> bool {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            skip(format!("/dev/kvm does not open: {error}"));
            false
        }
    }
}

/// Builds the guest and returns its image.
///
/// # Errors
/// The build failed.
pub fn image() -> Result<PathBuf> {
    let folder = workspace().join("tests/guest/bare-metal");
    let output = Command::new("cargo")
        .args(["build", "--release", "--quiet"])
        .current_dir(&folder)
        // Flags for programs of the host would break a program without an operating system.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        .env("CARGO_TARGET_DIR", folder.join("target"))
        // Its warnings about a target without vector registers are expected.
        .output()
        .context("run cargo")?;
    ensure!(
        output.status.success(),
        "the bare-metal guest does not build: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(folder.join("target/x86_64-unknown-linux-gnu/release/bare-metal-guest"))
}

/// Starts a machine that runs `scenario`, with `arguments` for the VMM. A command line or memory option there replaces
/// the default.
///
/// # Errors
/// The VMM does not start.
pub fn start(scenario: &str, arguments: &[&str]) -> Result<Vmm> {
    let image = image()?;
    let command_line = format!("scenario={scenario}");
    let kernel = image.to_str().context("path is not UTF-8")?;
    let mut all = vec!["--kernel", kernel, "--serial", "file=@/serial"];
    if !arguments.contains(&"--console") {
        all.extend(["--console", "off"]);
    }
    if !arguments.contains(&"--cmdline") {
        all.extend(["--cmdline", &command_line]);
    }
    if !arguments.contains(&"--memory") {
        all.extend(["--memory", "size=256M"]);
    }
    all.extend(arguments);
    Vmm::spawn(&all)
}

/// Waits for the closing line and requires that no check failed.
///
/// # Errors
/// A check failed, or the guest did not finish.
pub fn expect_all_passed(vmm: &mut Vmm) -> Result<()> {
    expect_all_passed_while(vmm, |_| Ok(()))
}

/// As [`expect_all_passed`]; calls `meanwhile` at every poll.
///
/// # Errors
/// As above, or `meanwhile` failed.
pub fn expect_all_passed_while(
    vmm: &mut Vmm,
    mut meanwhile: impl FnMut(&Vmm) -> Result<()>,
) -> Result<()> {
    let text = wait_for("the guest's closing line", SCENARIO_DEADLINE, || {
        // In this order: the guest's last output is complete when the VMM has ended.
        let ended = vmm.has_ended()?;
        let text = vmm.text("serial");
        let done = text.contains("DONE ");
        ensure!(done || !ended, "the VMM ended before the guest was done");
        if !ended {
            meanwhile(vmm)?;
        }
        Ok(done.then_some(text))
    })
    .with_context(|| format!("serial: {}\nerrors: {}", vmm.text("serial"), vmm.stderr()))?;
    ensure!(
        !text.contains("FAIL ") && text.contains("PASS "),
        "the guest says:\n{text}\nerrors: {}",
        vmm.stderr()
    );
    Ok(())
}
