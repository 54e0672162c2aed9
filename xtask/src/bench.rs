//! `cargo xtask bench`: figures of the VMM with a Linux guest, in the testbed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Context as _, Result};

use crate::testbed::{self, KernelChoice, Surroundings};
use crate::{experiment, other_vmm, test_programs};

/// Memory of the testbed's host: a guest of 1 GiB and room to spare.
const HOST_BYTES: u64 = 3 << 30;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Kernel of the guests
    #[arg(long, value_enum, default_value = "stock")]
    kernel: KernelChoice,
    /// Count instructions instead of time: repeatable figures, without a measure of parallel work
    #[arg(long)]
    icount: bool,
    /// Also measure another VMM with the same command line and API, in turns
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Folder for the figures, one file each
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Which figures, or the group `vmm`; if none is named, those that take no minutes
    names: Vec<OsString>,
    /// Options of the named figure
    #[arg(last = true)]
    options: Vec<OsString>,
}

/// Measures the VMM with a Linux guest and prints one JSON object per figure.
pub(crate) fn run(options: Options) -> Result<ExitCode> {
    let mut arguments: Vec<OsString> = Vec::new();
    if let Some(vmm) = &options.vmm {
        arguments.extend(["--vmm".into(), other_vmm::found(vmm)?.into()]);
    }
    if let Some(out) = &options.out {
        std::fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
        arguments.extend(["--out".into(), "/share".into()]);
    }
    let begin = SystemTime::now();
    let mut command = vec![test_programs::build("vm-bench")?.into()];
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
            experiment::say_what_was_measured(&path, options.kernel)?;
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
