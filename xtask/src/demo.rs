//! `cargo xtask demo`: a Linux guest touches memory and frees it, and the host gets it back.
//!
//! By default nothing but our own programs is compiled: guest and, if there has to be one,
//! emulated host boot Debian's binary kernels. Downloads and builds run side by side:
//!
//! ```text
//! packages, kernels ─┐
//! VMM, programs     ─┴─ testbed: the program `demo` of the integration tests
//! ```

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::guest::debian::{self, DebianKernel};
use crate::progress::Plan;
use crate::testbed::{self, KernelChoice, Surroundings};
use crate::{apt, cargo, disk, guest, paths};

/// Memory of the testbed's host: the guest's 1 GiB and room to spare.
const HOST_BYTES: u64 = 3 << 30;
/// The profile of our programs: this program has been built with it, and with it much that they
/// share.
const PROFILE: &str = "dev";
const PROGRAMS: [&str; 2] = ["cloud-hypervisor", "ch-remote"];
/// From the start of the emulated host to the last line.
const RUN_EXPECTED: Duration = Duration::from_secs(30);
/// Built and downloaded in all, by measurement, rounded up.
const TARGET_BYTES: u64 = 1 << 30;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The guest's kernel
    #[arg(long, value_enum, default_value = "debian")]
    kernel: KernelChoice,
}

/// Runs the demonstration; its chart and figures are left in `target/demo`.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let results = paths::target().join("demo");
    std::fs::create_dir_all(&results).with_context(|| format!("creating {}", results.display()))?;
    disk::require(&results, TARGET_BYTES, "building the demonstration")?;
    prepare(options.kernel)?;
    testbed::run_command(
        vec![cargo::folder(PROFILE).join("demo").into(), "/share".into()],
        Surroundings {
            memory: HOST_BYTES,
            share: Some(results),
            kernel: options.kernel,
            profile: Some(PROFILE.into()),
            programs: PROGRAMS.map(str::to_string).to_vec(),
            ..Surroundings::default()
        },
    )
}

/// Downloads and builds what the run needs; the run itself then finds all of it in place.
fn prepare(kernel: KernelChoice) -> Result<()> {
    let emulated = testbed::is_emulation_certain()?;
    let debian = kernel == KernelChoice::Debian;
    let mut downloads = vec![("Debian packages", 25)];
    if debian {
        downloads.push(("Debian's kernel for the guest, KiB", 8));
    }
    if debian && emulated {
        downloads.push(("Debian's kernel for the emulated host, KiB", 20));
    }
    let builds = [
        ("guest program", 12),
        ("the VMM and ch-remote, crates", 50),
        ("the demonstration, crates", 12),
    ];
    let plan = Plan::new(&[&downloads, &builds], RUN_EXPECTED);
    plan.show(|| {
        thread::scope(|scope| {
            let downloading = scope.spawn(|| -> Result<()> {
                plan.next(0, |_| packages(emulated))?;
                if debian {
                    fetch(&plan, debian::CLOUD)?;
                }
                if debian && emulated {
                    fetch(&plan, debian::GENERIC)?.quickest()?;
                }
                Ok(())
            });
            let built = build(&plan);
            let downloaded = downloading
                .join()
                .expect("the downloading thread does not panic");
            downloaded.and(built)
        })
    })
}

fn packages(emulated: bool) -> Result<()> {
    guest::ensure_tools()?;
    if emulated {
        apt::ensure_from_backports(testbed::QEMU)?;
    }
    Ok(())
}

fn fetch(plan: &Plan, packages: &[&str]) -> Result<DebianKernel> {
    plan.next(0, |task| {
        DebianKernel::fetch(packages, |done, all| task.at(done >> 10, all >> 10))
    })
}

fn build(plan: &Plan) -> Result<()> {
    plan.next(1, |_| guest::programs::build())?;
    let profile = ["--profile", PROFILE];
    plan.next(1, |task| {
        cargo::build(&PROGRAMS, &profile, |done, all| task.at(done, all))
    })?;
    plan.next(1, |task| {
        let more = [
            "--profile",
            PROFILE,
            "--bin",
            "demo",
            "--no-default-features",
        ];
        cargo::build(&["integration-tests"], &more, |done, all| {
            task.at(done, all);
        })
    })
}
