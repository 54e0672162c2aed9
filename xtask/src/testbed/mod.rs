//! `cargo xtask testbed run -- COMMAND…`: runs COMMAND as root on a host whose KVM boots Linux.
//!
//! That host is this machine if its KVM can boot Linux, otherwise an outer machine emulated by QEMU. COMMAND has the
//! same environment in both: our binaries in PATH, kernels and initramfs under `/guest`, and the shared directory at
//! `/share`. The variables `TESTBED` and `GUEST_CMDLINE_EXTRA` are set.

pub(crate) mod bins;
mod direct;
mod emulated;
mod guest_memory;
mod job;
mod plan;
mod probe;
mod saved;
mod swap;
mod tsc;

pub(crate) use emulated::{PROGRAM as QEMU_PROGRAM, QEMU};
pub(crate) use job::{KernelChoice, Options, Outcome, parse_size};
pub(crate) use probe::is_emulation_certain;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::guest::{self, Artefacts};
use job::{DEFAULT_CPUS, DEFAULT_PROFILE, HostChoice, Job};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Run a command as root on a host whose KVM boots Linux
    Run(Options),
    /// The half of a direct run that is inside its own namespaces
    #[command(hide = true)]
    Inside(direct::Inside),
}

/// Testbed settings of our other commands; the rest are the defaults of `testbed run`.
#[derive(Debug, Default)]
pub(crate) struct Surroundings {
    /// Memory of the emulated host, bytes.
    pub(crate) memory: u64,
    /// Directory that the command finds at /share.
    pub(crate) share: Option<PathBuf>,
    pub(crate) icount: bool,
    pub(crate) kernel: KernelChoice,
    /// Profile of our binaries, if not the default.
    pub(crate) profile: Option<String>,
    /// Our binaries that the command needs; all if empty.
    pub(crate) programs: Vec<String>,
    /// The caller has built them.
    pub(crate) are_built: bool,
    /// More options for QEMU, if the host is emulated.
    pub(crate) qemu: Option<String>,
    /// Ends with status 124 after this many seconds.
    pub(crate) timeout: Option<u64>,
    /// An emulated host ends when the command has printed nothing for this long: its clock, by which the command has
    /// bounds of its own, can stop.
    pub(crate) silence_max: Option<Duration>,
}

/// Runs `command` as `testbed run` does.
pub(crate) fn run_command(command: Vec<OsString>, around: Surroundings) -> Result<ExitCode> {
    outcome_of(command, around).map(|outcome| outcome.status())
}

/// Runs `command` as `testbed run` does and returns how it ended.
pub(crate) fn outcome_of(command: Vec<OsString>, around: Surroundings) -> Result<Outcome> {
    run_job(Options {
        memory: around.memory,
        cpus: DEFAULT_CPUS,
        share: around.share,
        timeout: around.timeout,
        icount: around.icount,
        swap: None,
        host: HostChoice::Auto,
        profile: around.profile.unwrap_or_else(|| DEFAULT_PROFILE.into()),
        kernel: around.kernel,
        distributions: false,
        programs: around.programs,
        are_built: around.are_built,
        silence_max: around.silence_max,
        qemu: around.qemu,
        assignable: false,
        console: false,
        command,
    })
}

/// Runs one subcommand and returns the status the program ends with.
pub(crate) fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run(options) => run_job(options).map(|outcome| outcome.status()),
        Command::Inside(inside) => direct::inside(&inside).map(ExitCode::from),
    }
}

fn run_job(options: Options) -> Result<Outcome> {
    let share = match &options.share {
        Some(dir) => Some(
            dir.canonicalize()
                .with_context(|| format!("--share {}", dir.display()))?,
        ),
        None => None,
    };
    let mut artefacts = guest::build(options.kernel.wanted())?;
    if options.distributions {
        artefacts.add_distributions()?;
    }
    let bins = if options.are_built {
        bins::built(&options.profile, &options.programs)
    } else {
        bins::build(&options.profile, &options.programs)?
    };
    let direct = match options.host {
        _ if options.icount && options.host == HostChoice::Direct => {
            bail!("--icount requires an emulated host")
        }
        _ if options.assignable && options.host == HostChoice::Direct => {
            bail!("--assignable requires an emulated host")
        }
        HostChoice::Direct => true,
        HostChoice::Emulated => false,
        HostChoice::Auto => {
            !options.icount && !options.assignable && kvm_boots_linux(&artefacts, &bins)?
        }
    };
    let job = Job {
        options,
        artefacts,
        bins,
        share,
    };
    if direct {
        direct::run(&job)
    } else {
        emulated::run(&job)
    }
}

/// Builds our programs as a testbed uses them.
pub(crate) fn build_programs(profile: &str) -> Result<()> {
    bins::build(profile, &[]).map(drop)
}

/// Builds everything for a run with `profile` and this kernel, and returns whether the host will be emulated.
pub(crate) fn emulates(profile: &str, kernel: KernelChoice) -> Result<bool> {
    let artefacts = guest::build(kernel.wanted())?;
    Ok(!kvm_boots_linux(&artefacts, &bins::build(profile, &[])?)?)
}

/// Prepares the files for `--distributions`.
pub(crate) fn prepare_distributions() -> Result<()> {
    guest::build_distributions()
}

fn kvm_boots_linux(artefacts: &Artefacts, bins: &[PathBuf]) -> Result<bool> {
    let vmm = bins
        .iter()
        .find(|bin| bin.ends_with("cloud-hypervisor"))
        .context("cloud-hypervisor is not among our binaries")?;
    probe::kvm_boots_linux(artefacts, vmm)
}
