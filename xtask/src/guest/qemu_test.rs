//! `cargo xtask guest qemu-test`: tests the patched kernel with QEMU as its host, without KVM.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use super::Wanted;
use crate::{apt, paths, test_programs, testbed};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only tests whose name contains one of these
    filters: Vec<OsString>,
}

/// Tests the patched kernel under QEMU as its host, on this machine and without KVM.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    super::build(Wanted::Patched)?;
    apt::ensure_from_backports(testbed::QEMU)?;
    let status = Command::new(test_programs::build("qemu-tests")?)
        .args(&options.filters)
        .current_dir(paths::workspace())
        .status()
        .context("starting the tests")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
