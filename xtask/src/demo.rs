//! `cargo xtask demo`: the main job on a fresh machine, in the testbed.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::{paths, testbed};

/// Memory of the testbed's host: the guest's 1 GiB and room to spare.
const HOST_BYTES: u64 = 3 << 30;

/// Builds the demonstration and runs it; its chart and figures are left in `target/demo`.
pub(crate) fn run() -> Result<ExitCode> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args([
            "build",
            "--quiet",
            "--package",
            "integration-tests",
            "--bin",
            "demo",
        ])
        .current_dir(paths::workspace())
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("building the demonstration failed ({status})");
    }
    let results = paths::target().join("demo");
    std::fs::create_dir_all(&results).with_context(|| format!("creating {}", results.display()))?;
    let command: Vec<OsString> = vec![paths::target().join("debug/demo").into(), "/share".into()];
    testbed::run_command(command, HOST_BYTES, results)
}
