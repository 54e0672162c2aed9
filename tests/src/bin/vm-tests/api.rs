//! Tests the API with a real guest, by `ch-remote`.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use integration_tests::linux::Guest;
use integration_tests::outcome::{Outcome, Test};
use integration_tests::paths::program;
use integration_tests::tests;
use integration_tests::vmm::PROCESS_DEADLINE;
use serde_json::Value;

use crate::balloon::REPORTING;

/// A test that ends a shared guest.
pub(crate) fn sharing_reporting() -> Vec<Test> {
    tests![ch_remote_steers_a_whole_life]
}

/// Runs `ch-remote` and returns its standard output.
fn remote(guest: &Guest, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program("ch-remote")?)
        .arg("--api-socket")
        .arg(guest.vmm.socket())
        .args(arguments)
        .output()
        .context("run ch-remote")?;
    ensure!(
        output.status.success(),
        "ch-remote {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn ch_remote_steers_a_whole_life() -> Result<Outcome> {
    let mut guest = REPORTING.take_over()?;
    let ping: Value = serde_json::from_str(&remote(&guest, &["ping"])?)?;
    ensure!(ping["pid"] == guest.vmm.pid(), "{ping:#}");
    for command in [
        "info",
        "counters",
        "balloon-stats",
        "reclaim-stats",
        "reclaim-thresholds",
    ] {
        let text = remote(&guest, &[command])?;
        let json: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        ensure!(json.is_object(), "{command}: {json:#}");
    }
    remote(&guest, &["resize", "--balloon", "64M"])?;
    remote(&guest, &["pause"])?;
    remote(&guest, &["resume"])?;
    remote(&guest, &["reboot"])?;
    guest.wait_init()?;
    remote(&guest, &["shutdown"])?;
    remote(&guest, &["boot"])?;
    guest.wait_init()?;
    guest.wait_serving()?;
    remote(&guest, &["power-button"])?;
    guest.vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    Ok(Outcome::Passed)
}
