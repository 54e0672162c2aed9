//! The parameters of a run, and the result of its command.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::guest::{Artefacts, Wanted};

/// Exit status for a command that ran out of time, as in timeout(1).
const TIMED_OUT: u8 = 124;

/// One: with several, QEMU's emulation of nested guests occasionally loses inter-processor requests, and a guest
/// crashes or the whole machine hangs.
pub(super) const DEFAULT_CPUS: u32 = 1;
pub(super) const DEFAULT_PROFILE: &str = "release";

/// The caller's request.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Memory of the emulated host (such as 4G or 1.5GiB)
    #[arg(long, default_value = "4G", value_parser = parse_size)]
    pub(super) memory: u64,
    /// Processors of the emulated host
    #[arg(long, default_value_t = DEFAULT_CPUS)]
    pub(super) cpus: u32,
    /// Directory that the command can read and write at /share
    #[arg(long, value_name = "DIR")]
    pub(super) share: Option<PathBuf>,
    /// Stop after this many seconds, with exit status 124
    #[arg(long, value_name = "SECONDS")]
    pub(super) timeout: Option<u64>,
    /// Count instructions instead of time: repeatable, one processor, always emulated
    #[arg(long)]
    pub(super) icount: bool,
    /// Swap space of the emulated host (such as 4G or 1.5GiB) [default: none]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) swap: Option<u64>,
    /// Host of the command: this machine if its KVM boots Linux (auto), or always one of the two
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) host: HostChoice,
    /// Cargo profile of the programs, which are built first
    #[arg(long, default_value = DEFAULT_PROFILE)]
    pub(super) profile: String,
    /// Kernel of the guests
    #[arg(long, value_enum, default_value = "stock")]
    pub(super) kernel: KernelChoice,
    /// Also offer Debian's kernels of several series and a disk with Debian on it
    #[arg(long)]
    pub(super) distributions: bool,
    /// Build only these programs [default: all]
    #[arg(long = "program", value_name = "NAME")]
    pub(super) programs: Vec<String>,
    /// The programs are already built
    #[arg(skip)]
    pub(super) are_built: bool,
    /// An emulated host is ended when its command has printed nothing for this long
    #[arg(skip)]
    pub(super) silence_max: Option<Duration>,
    /// Further options for QEMU, separated by spaces (for devices of the emulated host)
    #[arg(long, value_name = "OPTIONS", allow_hyphen_values = true)]
    pub(super) qemu: Option<String>,
    /// Give the emulated host an IOMMU and devices that its guests can drive: three empty NVMe disks of 1 GiB, two of them
    /// in one IOMMU group, an igb network interface, and QEMU's edu; always emulated
    #[arg(long)]
    pub(super) assignable: bool,
    /// Show the console of the emulated host on stderr
    #[arg(long)]
    pub(super) console: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(super) command: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum HostChoice {
    Auto,
    Direct,
    Emulated,
}

/// The kernel that our own tests and programs boot, unless they name one.
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
    /// Debian's 6.12 for cloud guests, and the same with a balloon driver that inflates by blocks
    Inflation,
    /// The patched kernel with mainline's tracking of free memory; it suffices for most tests
    Mainline,
}

impl KernelChoice {
    /// Its value of the environment variable `GUEST_KERNEL`.
    pub(crate) fn name(self) -> &'static str {
        self.into()
    }

    /// The kernel to build for it.
    pub(super) fn wanted(self) -> Wanted {
        match self {
            Self::Debian => Wanted::Debian,
            Self::Stock => Wanted::Stock,
            Self::Patched | Self::Mainline => Wanted::Patched,
            Self::Rival => Wanted::Rival,
            Self::Inflation => Wanted::Inflation,
        }
    }
}

/// Everything a host needs to run the command.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) options: Options,
    pub(super) artefacts: Artefacts,
    pub(super) bins: Vec<PathBuf>,
    pub(super) share: Option<PathBuf>,
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
    /// The status that this program ends with; reports why it is not the command's.
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
    pub(super) fn timeout(&self) -> Option<Duration> {
        self.options.timeout.map(Duration::from_secs)
    }
}

/// A size of at least one byte.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    match byte_size::parse_bytes(text) {
        Ok(0) => Err("must be at least one byte".to_owned()),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn size_is_never_zero() {
        assert_eq!(parse_size("4.5G"), Ok(9 << 29));
        for text in ["", "0", "0G", "4GB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
