//! `cargo xtask bench` and `guest qemu-test`: programs of the integration tests that
//! are started with what they need.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::SystemTime;

use anyhow::{Context as _, Result};

use crate::guest::{self, Wanted};
use crate::testbed::{self, KernelChoice, Surroundings};
use crate::{apt, cargo, experiment, other_vmm, paths};

/// Memory of the testbed's host: the guest's 1 GiB and room to spare.
const HOST_BYTES: u64 = 3 << 30;

#[derive(Debug, clap::Args)]
pub(crate) struct BenchOptions {
    /// The guests' kernel
    #[arg(long, value_enum, default_value = "stock")]
    kernel: KernelChoice,
    /// Count instructions instead of time: figures that repeat, no measure of parallel work
    #[arg(long)]
    icount: bool,
    /// A VMM with our command line and API to measure beside ours, in turns
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Folder for the figures, one file each
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Which figures, or the group `vmm`; if none is named, those that take no minutes
    names: Vec<OsString>,
    /// Options of the one figure that is named
    #[arg(last = true)]
    options: Vec<OsString>,
}

/// Measures the VMM with a Linux guest and prints one JSON object a figure.
pub(crate) fn bench(options: BenchOptions) -> Result<ExitCode> {
    let mut arguments: Vec<OsString> = Vec::new();
    if let Some(vmm) = &options.vmm {
        arguments.extend(["--vmm".into(), other_vmm::found(vmm)?.into()]);
    }
    if let Some(out) = &options.out {
        std::fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
        arguments.extend(["--out".into(), "/share".into()]);
    }
    let begin = SystemTime::now();
    let mut command = vec![build("vm-bench")?.into()];
    command.extend(arguments);
    command.extend(options.names);
    if !options.options.is_empty() {
        command.push("--".into());
        command.extend(options.options);
    }
    let status = testbed::run_command(
        command,
        Surroundings {
            memory: HOST_BYTES,
            icount: options.icount,
            kernel: options.kernel,
            share: options.out.clone(),
            ..Surroundings::default()
        },
    )?;
    if let Some(out) = &options.out {
        for path in written_since(out, begin)? {
            experiment::say_what_was_measured(&path)?;
        }
    }
    Ok(status)
}

/// The figures in `folder` that are not from an earlier run.
fn written_since(folder: &Path, begin: SystemTime) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let modified = path.metadata()?.modified()?;
        if name.starts_with("bench-") && name.ends_with(".json") && modified >= begin {
            found.push(path);
        }
    }
    Ok(found)
}

#[derive(Debug, clap::Args)]
pub(crate) struct QemuTestOptions {
    /// Only tests whose name contains one of these
    filters: Vec<OsString>,
}

/// Tests the patched kernel under QEMU as its host, on this machine and without KVM.
pub(crate) fn qemu_test(options: &QemuTestOptions) -> Result<ExitCode> {
    if guest::build(Wanted::Both)?.patched.is_none() {
        return Ok(ExitCode::SUCCESS);
    }
    apt::ensure_from_backports(testbed::QEMU)?;
    let status = Command::new(build("qemu-tests")?)
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

/// Builds a program of the integration tests and tells where it is. It is selected from the whole
/// workspace, as the unit tests are: a package alone has other features, and all that it depends on
/// would be built twice.
pub(crate) fn build(program: &str) -> Result<PathBuf> {
    cargo::run(["build", "--quiet", "--workspace", "--bin", program])?;
    Ok(cargo::folder("dev").join(program))
}
