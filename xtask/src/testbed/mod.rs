//! `cargo xtask testbed run -- COMMAND…`: COMMAND as root on a host whose KVM boots Linux.
//!
//! That host is this machine if its KVM can boot Linux, otherwise an outer machine emulated by QEMU. COMMAND has the
//! same environment in both: our binaries in PATH, kernels and initramfs under `/guest`, the shared directory at
//! `/share`, and the variables `TESTBED` and `GUEST_CMDLINE_EXTRA`.

pub(crate) mod bins;
mod direct;
mod emulated;
mod guest_memory;
mod plan;
mod probe;
mod saved;
mod swap;

pub(crate) use emulated::{PROGRAM as QEMU_PROGRAM, QEMU};
pub(crate) use probe::is_emulation_certain;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::guest::{self, Artefacts, Wanted};

/// Exit status for a command that ran out of time, as in timeout(1).
const TIMED_OUT: u8 = 124;

/// One: with several, QEMU's emulation of nested guests occasionally loses inter-processor requests, and a guest
/// crashes or the whole machine hangs.
const DEFAULT_CPUS: u32 = 1;
const DEFAULT_PROFILE: &str = "release";

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Run a command as root on a host whose KVM boots Linux
    Run(Options),
    /// The half of a direct run that is inside its own namespaces
    #[command(hide = true)]
    Inside(direct::Inside),
}

/// What the caller wants.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Memory of the emulated host (with suffix K, M or G)
    #[arg(long, default_value = "4G", value_parser = parse_size)]
    memory: u64,
    /// Processors of the emulated host
    #[arg(long, default_value_t = DEFAULT_CPUS)]
    cpus: u32,
    /// Directory that the command can read and write at /share
    #[arg(long, value_name = "DIR")]
    share: Option<PathBuf>,
    /// Stop after this many seconds, with exit status 124
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Count instructions instead of time: repeatable, one processor, always emulated
    #[arg(long)]
    icount: bool,
    /// Swap space of the emulated host (with suffix K, M or G) [default: none]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    swap: Option<u64>,
    /// Host of the command: this machine if its KVM boots Linux (auto), or always one of the two
    #[arg(long, value_enum, default_value = "auto")]
    host: HostChoice,
    /// Cargo profile of the programs, which are built first
    #[arg(long, default_value = DEFAULT_PROFILE)]
    profile: String,
    /// Kernel of the guests
    #[arg(long, value_enum, default_value = "stock")]
    kernel: KernelChoice,
    /// Also offer Debian's kernels of several series and a disk with Debian on it
    #[arg(long)]
    distributions: bool,
    /// Build only these programs [default: all]
    #[arg(long = "program", value_name = "NAME")]
    programs: Vec<String>,
    /// The programs are already built
    #[arg(skip)]
    are_built: bool,
    /// An emulated host is ended when its command has printed nothing for this long
    #[arg(skip)]
    silence_max: Option<Duration>,
    /// Further options for QEMU, separated by spaces (for devices of the emulated host)
    #[arg(long, value_name = "OPTIONS", allow_hyphen_values = true)]
    qemu: Option<String>,
    /// Show the console of the emulated host on stderr
    #[arg(long)]
    console: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum HostChoice {
    Auto,
    Direct,
    Emulated,
}

/// What our own tests and programs boot, unless they name a kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub(crate) enum KernelChoice {
    /// Debian's binary kernel for cloud guests, with its modules; nothing is compiled
    Debian,
    /// Debian's source, compiled with our small configuration
    #[default]
    Stock,
    /// The stock kernel with the series in guest-patches
    Patched,
    /// The stock kernel with guest-patches/rival, the baseline for measurements of the series
    Rival,
    /// The patched kernel with mainline's tracking of free memory; it suffices for most tests
    Mainline,
}

impl KernelChoice {
    /// Its value of the environment variable `GUEST_KERNEL`.
    pub(crate) fn name(self) -> &'static str {
        self.into()
    }

    /// The kernel to build for it.
    fn wanted(self) -> Wanted {
        match self {
            Self::Debian => Wanted::Debian,
            Self::Stock => Wanted::Stock,
            Self::Patched | Self::Mainline => Wanted::Patched,
            Self::Rival => Wanted::Rival,
        }
    }
}

/// Everything a host needs to run the command.
#[derive(Debug)]
struct Job {
    options: Options,
    artefacts: Artefacts,
    bins: Vec<PathBuf>,
    share: Option<PathBuf>,
}

/// How the command ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Exit(u8),
    TimedOut,
    /// Ended because it printed nothing for too long after this line, which may be incomplete.
    Silent(String),
}

impl Outcome {
    /// The status that this program ends with; says why it is not the command's.
    pub(crate) fn status(&self) -> ExitCode {
        match self {
            Self::Exit(status) => return ExitCode::from(*status),
            Self::TimedOut => eprintln!("testbed: the command reached its time limit"),
            Self::Silent(line) => eprintln!("testbed: no output after {line:?} for too long"),
        }
        ExitCode::from(TIMED_OUT)
    }
}

impl Job {
    fn timeout(&self) -> Option<Duration> {
        self.options.timeout.map(Duration::from_secs)
    }
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
        HostChoice::Direct => true,
        HostChoice::Emulated => false,
        HostChoice::Auto => !options.icount && kvm_boots_linux(&artefacts, &bins)?,
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

/// Bytes, with an optional binary suffix; 4.5G is fine, a fraction of a byte is not.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last() {
        Some('K' | 'k') => (&text[..text.len() - 1], 10),
        Some('M' | 'm') => (&text[..text.len() - 1], 20),
        Some('G' | 'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let whole = digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift));
    match whole.or_else(|| fraction(digits, 1 << shift)) {
        Some(0) | None => Err(format!("{text:?} is no size, such as 512M or 4G")),
        Some(bytes) => Ok(bytes),
    }
}

/// `digits` with one decimal point, in units of `unit` bytes, when that is a whole number.
fn fraction(digits: &str, unit: u64) -> Option<u64> {
    let (whole, tenths) = digits.split_once('.')?;
    let scale = 10u64.checked_pow(u32::try_from(tenths.len()).ok()?)?;
    let parts = tenths.parse::<u64>().ok()?.checked_mul(unit)?;
    let whole = whole.parse::<u64>().ok()?.checked_mul(unit)?;
    (parts % scale == 0).then(|| whole.checked_add(parts / scale))?
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn size_with_suffix_is_binary() {
        assert_eq!(parse_size("4G"), Ok(4 << 30));
        assert_eq!(parse_size("512m"), Ok(512 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("4.5G"), Ok(9 << 29));
    }

    #[test]
    fn size_that_is_none_is_refused() {
        for text in [
            "",
            "0",
            "G",
            "4T",
            "-1",
            "1.5",
            ".5G",
            "1.G",
            "0.3G",
            "99999999999G",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
