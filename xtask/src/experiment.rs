//! `cargo xtask experiment`: measures how many guests a host holds, and how fast bursts can follow each other. Guests
//! report with an unmodified kernel, with our patches, or not at all.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::guest;
use crate::other_vmm;
use crate::paths;
use crate::test_programs;
use crate::testbed::{self, KernelChoice, Surroundings, parse_size};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Experiment {
    /// Guests start one after another; each touches its memory, frees it, idles
    Overcommit(Overcommit),
    /// Guests take turns in allocating most of their memory, holding it and freeing it
    Burst(Burst),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Reporting {
    /// No free page reporting
    Off,
    /// The reporting of an unmodified kernel
    Mainline,
    /// The bitmap tracker of the patched kernel
    Bitmap,
}

impl Reporting {
    fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Mainline => "mainline",
            Self::Bitmap => "bitmap",
        }
    }
}

/// Options of all experiments.
#[derive(Debug, clap::Args)]
struct Common {
    /// How the guests report freed memory
    #[arg(long, value_enum)]
    reporting: Reporting,
    /// Kernel of the guests [default: stock, and patched for bitmap]
    #[arg(long, value_enum)]
    kernel: Option<KernelChoice>,
    /// Smallest block that guests report, 4 KiB << ORDER [default: the kernel's own, 9]
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=10))]
    order: Option<u32>,
    /// Factor for all sizes
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Use another VMM with the same command line and API
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Folder for the table as JSON and the curves as SVG [default: target/experiment]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Count instructions instead of time: repeatable figures, also on a busy machine
    #[arg(long)]
    icount: bool,
    /// Profile of our binaries
    #[arg(long, default_value = "release")]
    profile: String,
    /// Stop after this many seconds, with exit status 124
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Overcommit {
    #[command(flatten)]
    common: Common,
    /// Memory of the host, which has no swap
    #[arg(long, default_value = "15G", value_parser = parse_size)]
    host: u64,
    /// Memory of each guest
    #[arg(long, default_value = "5G", value_parser = parse_size)]
    guest: u64,
    /// Memory that each guest touches and frees
    #[arg(long, default_value = "4.5G", value_parser = parse_size)]
    touch: u64,
    /// Seconds between one guest's free and the next guest's start
    #[arg(long, default_value_t = 0.0)]
    settle: f64,
    /// Maximum number of guests
    #[arg(long, default_value_t = 200)]
    max: usize,
    /// Fail if fewer guests run
    #[arg(long, default_value_t = 0)]
    expect: usize,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Burst {
    #[command(flatten)]
    common: Common,
    /// Memory of the host, which has no swap [default: room for the idle guests and two bursts]
    #[arg(long, value_parser = parse_size)]
    host: Option<u64>,
    /// Memory of each guest
    #[arg(long, default_value = "1G", value_parser = parse_size)]
    guest: u64,
    /// Number of guests
    #[arg(long, default_value_t = 12)]
    guests: usize,
    /// Share of its memory that a guest allocates in its turn, percent
    #[arg(long, default_value_t = 80)]
    share: u64,
    /// Seconds for which a turn holds its memory
    #[arg(long, default_value_t = 2.0)]
    hold: f64,
    /// Seconds for which an interval must be sustained
    #[arg(long, default_value_t = 600)]
    duration: u64,
    /// Seconds between the starts of two turns [default: search for the shortest that is sustained]
    #[arg(long)]
    interval: Option<f64>,
    /// Start turns at random times with the interval as their mean; the seed is printed
    #[arg(long, requires = "interval")]
    seed: Option<u64>,
}

/// Memory that an idle guest uses besides its page structures, and memory that the host itself needs.
const IDLE_BYTES: u64 = 60 << 20;
const HOST_OWN_BYTES: u64 = 250 << 20;
/// A page structure takes 64 bytes per 4096.
const PAGE_STRUCTURES_SHARE: u64 = 64;

/// Runs one experiment in the testbed and returns the status the program ends with.
pub(crate) fn run(experiment: &Experiment) -> Result<ExitCode> {
    let (name, common, host, mut plan) = match experiment {
        Experiment::Overcommit(options) => options.plan()?,
        Experiment::Burst(options) => options.plan()?,
    };
    plan["reporting"] = common.reporting.word().into();
    plan["order"] = common.order.into();
    plan["host_bytes"] = host.into();
    let out = common
        .out
        .clone()
        .unwrap_or_else(|| paths::target().join("experiment"));
    std::fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    let mut command: Vec<OsString> = Vec::new();
    if let Some(vmm) = &common.vmm {
        let mut word = OsString::from("OTHER_VMM=");
        word.push(other_vmm::found(vmm)?);
        command.extend(["env".into(), word]);
    }
    command.push(test_programs::build("experiment")?.into());
    command.extend([name.into(), plan.to_string().into(), "/share".into()]);
    let kernel = common.kernel.unwrap_or(match common.reporting {
        Reporting::Bitmap => KernelChoice::Patched,
        Reporting::Off | Reporting::Mainline => KernelChoice::Stock,
    });
    let status = testbed::run_command(
        command,
        Surroundings {
            memory: host,
            icount: common.icount,
            kernel,
            timeout: common.timeout,
            profile: Some(common.profile.clone()),
            share: Some(out.clone()),
            ..Surroundings::default()
        },
    )?;
    let arrivals = if plan["seed"].is_u64() {
        "-arrivals"
    } else {
        ""
    };
    let figures = format!("{name}-{}{arrivals}.json", common.reporting.word());
    say_what_was_measured(&out.join(figures), kernel)?;
    Ok(status)
}

impl Overcommit {
    fn plan(&self) -> Result<(&'static str, &Common, u64, Value)> {
        let scaled = |bytes| self.common.scaled(bytes);
        ensure!(
            self.touch < self.guest,
            "--touch must be below --guest: the guest's kernel needs memory too"
        );
        let plan = json!({
            "guest_bytes": scaled(self.guest)?,
            "touch_bytes": scaled(self.touch)?,
            "settle_ms": milliseconds(self.settle)?,
            "guests_max": self.max,
            "expect": self.expect,
        });
        Ok(("overcommit", &self.common, scaled(self.host)?, plan))
    }
}

impl Burst {
    fn plan(&self) -> Result<(&'static str, &Common, u64, Value)> {
        ensure!(self.guests > 0, "--guests must be above 0");
        ensure!(
            (1..100).contains(&self.share),
            "--share must be between 1 and 99"
        );
        let guest = self.common.scaled(self.guest)?;
        let burst = guest / 100 * self.share;
        let idle = IDLE_BYTES + guest / PAGE_STRUCTURES_SHARE;
        let host = match self.host {
            Some(host) => self.common.scaled(host)?,
            None => HOST_OWN_BYTES + idle * self.guests as u64 + 2 * burst,
        };
        let plan = json!({
            "guest_bytes": guest,
            "burst_bytes": burst,
            "guests": self.guests,
            "hold_ms": milliseconds(self.hold)?,
            "duration_ms": self.duration * 1000,
            "interval_ms": self.interval.map(milliseconds).transpose()?,
            "seed": self.seed,
        });
        Ok(("burst", &self.common, host, plan))
    }
}

impl Common {
    /// Whole pages of `bytes` times the scale.
    fn scaled(&self, bytes: u64) -> Result<u64> {
        ensure!(
            self.scale > 0.0 && self.scale <= 100.0,
            "--scale must be above 0 and at most 100"
        );
        Ok((bytes as f64 * self.scale) as u64 >> 21 << 21)
    }
}

fn milliseconds(seconds: f64) -> Result<u64> {
    ensure!(
        (0.0..=86_400.0).contains(&seconds),
        "a time must be between 0 and 86400 seconds; got {seconds}"
    );
    Ok((seconds * 1000.0) as u64)
}

/// Adds the environment of the measurement to the figures.
pub(crate) fn say_what_was_measured(path: &Path, kernel: KernelChoice) -> Result<()> {
    let Ok(text) = std::fs::read_to_string(path) else {
        // A run that failed early has no figures.
        return Ok(());
    };
    let mut figures: Value =
        serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let words: Vec<String> = std::env::args().skip(1).collect();
    figures["command"] = format!("cargo xtask {}", words.join(" ")).into();
    figures["commit"] = output("git", &["describe", "--always", "--dirty"]).into();
    figures["date"] = output("date", &["-u", "+%Y-%m-%d"]).into();
    figures["kernel"] = match kernel {
        KernelChoice::Debian => "Debian's".into(),
        KernelChoice::Stock => guest::source_version()?.into(),
        KernelChoice::Patched | KernelChoice::Mainline => {
            format!("{}, patched", guest::source_version()?).into()
        }
        KernelChoice::Rival => format!("{}, rival", guest::source_version()?).into(),
        KernelChoice::Inflation => {
            let version = guest::source_version()?;
            format!("Debian's {version}, without and with patches 5xx").into()
        }
    };
    let text = serde_json::to_string_pretty(&figures)?;
    std::fs::write(path, text + "\n").with_context(|| path.display().to_string())
}

/// One line of a program's output; empty if the program is missing.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(paths::workspace())
        .output();
    output.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    )
}
