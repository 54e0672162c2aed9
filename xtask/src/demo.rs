//! `cargo xtask demo`: demonstrates that memory that a Linux guest frees returns to the host.
//!
//! By default only our own programs are compiled: the guest and, if needed, the emulated host boot Debian's binary
//! kernels. Downloads and builds run concurrently:
//!
//! ```text
//! packages, kernels ─┐
//! VMM, programs     ─┴─ testbed: the program `demo` of the integration tests
//! ```
//!
//! With `--fleet` it runs three guests under one agent, whose page is forwarded to this machine.

use std::ffi::OsString;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::guest::debian::{self, DebianKernel};
use crate::process;
use crate::progress::Plan;
use crate::testbed::{self, KernelChoice, Surroundings};
use crate::{apt, cargo, disk, fleet, guest, paths};

/// Memory of the testbed's host: the guest's 1 GiB and room to spare.
const HOST_BYTES: u64 = 3 << 30;
/// The profile of our programs. This program has been built with it, and so have many dependencies that they share.
const PROFILE: &str = "dev";
const PROGRAMS: [&str; 2] = ["cloud-hypervisor", "ch-remote"];
/// The program of the integration tests that shows it.
const DEMO: &str = "demo";
/// Timeout from the start of the emulated host to the last line.
const RUN_EXPECTED: Duration = Duration::from_secs(30);
/// Total size of builds and downloads, as measured, rounded up.
const TARGET_BYTES: u64 = 1 << 30;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Kernel of the guest
    #[arg(long, value_enum, default_value = "debian")]
    kernel: KernelChoice,
    /// Run three guests under one fleet agent and serve its page to this machine's browser
    #[arg(long)]
    fleet: bool,
    /// Serve the page on this port of 127.0.0.1
    #[arg(long, default_value_t = 9273, requires = "fleet")]
    port: u16,
    /// Run until interrupted
    #[arg(long, requires = "fleet")]
    keep: bool,
    /// Take a picture of the page with Chromium, then exit
    #[arg(long, value_name = "FILE", requires = "fleet", conflicts_with = "keep")]
    picture: Option<PathBuf>,
}

impl Options {
    fn programs(&self) -> Vec<&'static str> {
        let mut programs = PROGRAMS.to_vec();
        programs.extend(self.fleet.then_some("ch-fleet"));
        programs
    }
}

/// Runs the demonstration; its chart and figures are left in `target/demo`.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if options.fleet {
        // Before anything is built for it.
        TcpListener::bind((Ipv4Addr::LOCALHOST, options.port)).with_context(|| {
            format!(
                "port {} of 127.0.0.1 is not free for the page; choose another with --port",
                options.port
            )
        })?;
    }
    let results = paths::target().join("demo");
    std::fs::create_dir_all(&results).with_context(|| format!("creating {}", results.display()))?;
    disk::require_in_all(&paths::target(), TARGET_BYTES, "building the demonstration")?;
    prepare(options)?;
    let mut command: Vec<OsString> = vec![cargo::folder(PROFILE).join(DEMO).into()];
    let mut around = Surroundings {
        memory: HOST_BYTES,
        share: Some(results.clone()),
        kernel: options.kernel,
        profile: Some(PROFILE.into()),
        programs: options
            .programs()
            .iter()
            .map(|name| (*name).to_string())
            .collect(),
        are_built: true,
        ..Surroundings::default()
    };
    if !options.fleet {
        command.push("/share".into());
        return testbed::run_command(command, around);
    }
    around.qemu = Some(forwarding(options.port));
    command.extend(["--fleet".into(), options.port.to_string().into()]);
    command.extend(options.keep.then(|| "keep".into()));
    let Some(picture) = &options.picture else {
        return testbed::run_command(command, around);
    };
    around.timeout = Some(PICTURE_MAX.as_secs());
    command.extend(["until".into(), format!("/share/{PICTURE}").into()]);
    with_picture(&results.join(PICTURE), options.port, picture, || {
        testbed::run_command(command, around)
    })
}

/// File name in the folder for results.
const PICTURE: &str = "fleet.png";
/// Time for the guests to boot and have their turns, on a busy machine.
const PICTURE_MAX: Duration = Duration::from_secs(900);

/// Options for QEMU: a network between its process and the emulated host, with one forwarded port.
fn forwarding(port: u16) -> String {
    format!(
        "-netdev user,id=page,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{port} \
         -device virtio-net-pci,netdev=page,romfile="
    )
}

/// Runs `work` with a browser beside it, which takes a picture and passes it to `taken`.
fn with_picture(
    taken: &Path,
    port: u16,
    to: &Path,
    work: impl FnOnce() -> Result<ExitCode>,
) -> Result<ExitCode> {
    if taken.exists() {
        std::fs::remove_file(taken).with_context(|| format!("removing {}", taken.display()))?;
    }
    let photographer = fleet::photographer(port, taken)?;
    let mut browser = process::spawn_tied_group(&photographer, Stdio::null(), Stdio::inherit())?;
    let status = work()?;
    if !taken.exists() {
        // The fleet failed, and has reported the reason. The browser ends with this process.
        return Ok(status);
    }
    let seen = browser.wait().context("waiting for the browser's test")?;
    ensure!(
        seen.success(),
        "the browser's test took no picture ({seen})"
    );
    std::fs::copy(taken, to).with_context(|| format!("writing {}", to.display()))?;
    Ok(status)
}

/// Downloads and builds what the run needs; the run itself then finds all of it in place.
fn prepare(options: &Options) -> Result<()> {
    let kernel = options.kernel;
    let picture = options.picture.is_some();
    let emulated = testbed::is_emulation_certain()?;
    let debian = kernel == KernelChoice::Debian;
    let mut downloads = vec![("Debian packages", 25)];
    if debian {
        downloads.push(("Debian's kernel for the guest", 8));
    }
    if debian && emulated {
        downloads.push(("Debian's kernel for the emulated host", 20));
    }
    let mut builds = vec![("guest program", 12), ("the VMM and its tools", 60)];
    if picture {
        builds.push(("what takes the picture", 90));
    }
    let plan = Plan::new(&[&downloads, &builds], RUN_EXPECTED);
    plan.show(|| {
        thread::scope(|scope| {
            let downloading = scope.spawn(|| -> Result<()> {
                plan.next(0, |_| packages(emulated, picture))?;
                if debian {
                    fetch(&plan, debian::CLOUD)?;
                }
                if debian && emulated {
                    fetch(&plan, debian::GENERIC)?.quickest()?;
                }
                Ok(())
            });
            let built = build(&plan, options);
            let downloaded = downloading
                .join()
                .expect("the downloading thread does not panic");
            downloaded.and(built)
        })
    })
}

fn packages(emulated: bool, picture: bool) -> Result<()> {
    guest::ensure_tools()?;
    if emulated {
        apt::ensure_from_backports(testbed::QEMU)?;
    }
    if picture {
        fleet::ensure_browser()?;
    }
    Ok(())
}

fn fetch(plan: &Plan, packages: &[&str]) -> Result<DebianKernel> {
    plan.next(0, |task| {
        DebianKernel::fetch(packages, |done, all| task.at(done, all))
    })
}

/// Builds all of our programs at once: one selection has the same features for shared dependencies, which are then
/// built once.
fn build(plan: &Plan, options: &Options) -> Result<()> {
    let programs = options.programs();
    plan.next(1, |_| guest::programs::build())?;
    let mut more = vec!["--profile", PROFILE, "--bin", DEMO];
    more.extend(programs.iter().flat_map(|program| ["--bin", program]));
    let mut packages = programs.to_vec();
    packages.push("integration-tests");
    plan.next(1, |task| {
        cargo::build(&packages, &more, |done, all| task.at(done, all))
    })?;
    if options.picture.is_some() {
        plan.next(1, |_| fleet::build_photographer())?;
    }
    Ok(())
}
