//! The commands: their arguments, and conversion to requests.

use std::fs::File;
use std::io::Read;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api::config::{
    BalloonConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig, VsockConfig,
};
use api::options::{OptionError, parse_bytes};
use api::{
    Endpoint, HintingAction, ReclaimThresholdsChange, ReportingAction, RestoreConfig,
    VmBalloonHinting, VmBalloonReporting, VmCoredumpData, VmRemoveDevice, VmResize, VmResizeDisk,
    VmSnapshotConfig, VmUpdateRateLimiter, to_ascii_json,
};
use clap::error::ErrorKind;
use clap::{ArgGroup, ArgMatches, Args, FromArgMatches, Subcommand, ValueEnum};

/// Minimum time between two samples of `reclaim-stats --watch`, because each measures residency on the host.
const INTERVAL_SECONDS_MIN: f64 = 0.05;
/// Maximum time between two samples; it must fit a `Duration`.
const INTERVAL_SECONDS_MAX: f64 = 86_400.0;

/// Maximum size of a configuration, the VMM's limit for a body.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// The commands. Names are those of the endpoint table, which a test checks.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Bare(Bare),
    /// Store the configuration of a VM without booting it
    Create(CreateArguments),
    /// Change the VM's vCPUs, RAM or balloon
    Resize(ResizeArguments),
    /// Change the size of a disk of a running VM
    ResizeDisk(ResizeDiskArguments),
    /// Change the rate limit of a disk, a network interface or a group
    UpdateRateLimiter(UpdateRateLimiterArguments),
    /// Add a disk to the VM
    AddDisk(AddDiskArguments),
    /// Add a network interface to the VM
    AddNet(AddNetArguments),
    /// Add a shared folder to the VM
    AddFs(AddFsArguments),
    /// Add a device that a vhost-user back end serves to the VM
    AddGenericVhostUser(AddGenericVhostUserArguments),
    /// Add persistent memory to the VM
    AddPmem(AddPmemArguments),
    /// Add the vsock device to the VM
    AddVsock(AddVsockArguments),
    /// Add the balloon to the VM
    AddBalloon(AddBalloonArguments),
    /// Save the paused VM to files
    Snapshot(SnapshotArguments),
    /// Write a core file of the guest
    Coredump(CoredumpArguments),
    /// Create a VM from saved files
    Restore(RestoreArguments),
    /// Remove a disk, a network interface, a shared folder, persistent memory, the vsock device or the balloon from the VM
    RemoveDevice(RemoveDeviceArguments),
    /// Show how much of the VM's memory returned to the host, and how
    ReclaimStats(ReclaimStatsArguments),
    /// Show or change alerts and the reporting policy
    ReclaimThresholds(ReclaimThresholdsArguments),
    /// Start or stop a run of free page hinting, or show its progress
    BalloonHinting(BalloonHintingArguments),
    /// Pause or resume free page reporting, request a full report, or show the state
    BalloonReporting(BalloonReportingArguments),
}

/// A command without arguments. Name and help text come from the endpoint table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bare(pub(crate) Endpoint);

impl Bare {
    fn endpoints() -> impl Iterator<Item = Endpoint> {
        // The commands of these two endpoints have arguments nevertheless.
        let has_arguments =
            |it| matches!(it, Endpoint::VmReclaimStats | Endpoint::VmReclaimThresholds);
        let all = Endpoint::ALL.iter().copied();
        all.filter(move |it| it.request().is_none() && !has_arguments(*it))
    }

    fn named(name: &str) -> Option<Self> {
        Self::endpoints().find(|it| it.command() == name).map(Self)
    }
}

impl Subcommand for Bare {
    fn augment_subcommands(command: clap::Command) -> clap::Command {
        Self::endpoints().fold(command, |command, endpoint| {
            let about = endpoint.about().trim_end_matches('.');
            command.subcommand(clap::Command::new(endpoint.command()).about(about))
        })
    }

    fn augment_subcommands_for_update(command: clap::Command) -> clap::Command {
        Self::augment_subcommands(command)
    }

    fn has_subcommand(name: &str) -> bool {
        Self::named(name).is_some()
    }
}

impl FromArgMatches for Bare {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let named = matches.subcommand_name().and_then(Self::named);
        named.ok_or_else(|| clap::Error::new(ErrorKind::MissingSubcommand))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(crate) struct BalloonReportingArguments {
    /// Action
    #[arg(value_enum)]
    pub(crate) action: BalloonReportingAction,

    /// With report-now: include memory reported before, for example after a restore
    #[arg(long)]
    pub(crate) again: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BalloonReportingAction {
    /// Pause reporting, and wait until reported memory is no longer discarded
    Pause,
    /// Resume reporting
    Resume,
    /// Ask the guest to report all its free memory now
    ReportNow,
    /// Show the state
    Status,
}

#[derive(Debug, Args)]
pub(crate) struct BalloonHintingArguments {
    /// Action
    #[arg(value_enum)]
    pub(crate) action: BalloonHintingAction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BalloonHintingAction {
    /// Ask the guest to hint all its free memory, which returns to the host
    Start,
    /// End the run; the guest keeps its free memory
    Stop,
    /// Show the state of the run and the memory returned
    Status,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArguments {
    /// File with the configuration as JSON; - reads standard input
    #[arg(value_name = "PATH", default_value = "-")]
    pub(crate) path: PathBuf,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("change").required(true).multiple(true))]
pub(crate) struct ResizeArguments {
    /// Number of vCPUs
    #[arg(long, value_name = "COUNT", group = "change", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cpus: Option<u32>,

    /// RAM, in bytes or with a suffix such as M or GiB
    #[arg(long, value_name = "SIZE", group = "change", value_parser = parse_bytes)]
    pub(crate) memory: Option<u64>,

    /// Target size of the balloon, in bytes or with a suffix such as M or GiB
    #[arg(long, value_name = "SIZE", group = "change", value_parser = parse_bytes)]
    pub(crate) balloon: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct ResizeDiskArguments {
    /// Name of the disk, as vm.info shows it
    #[arg(long, value_name = "ID")]
    pub(crate) disk: String,

    /// Its new size, in bytes or with a suffix such as M or GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) size: u64,
}

#[derive(Debug, Args)]
pub(crate) struct UpdateRateLimiterArguments {
    #[arg(value_name = "LIMIT", value_parser = |text: &str| one_line(VmUpdateRateLimiter::parse(text)), help = VmUpdateRateLimiter::syntax())]
    pub(crate) limit: VmUpdateRateLimiter,
}

#[derive(Debug, Args)]
pub(crate) struct AddDiskArguments {
    #[arg(value_name = "DISK", value_parser = |text: &str| one_line(DiskConfig::parse(text)), help = DiskConfig::syntax())]
    pub(crate) disk: DiskConfig,
}

#[derive(Debug, Args)]
pub(crate) struct AddNetArguments {
    #[arg(value_name = "NET", value_parser = |text: &str| one_line(NetConfig::parse(text)), help = NetConfig::syntax())]
    pub(crate) net: NetConfig,
}

#[derive(Debug, Args)]
pub(crate) struct AddFsArguments {
    #[arg(value_name = "FS", value_parser = |text: &str| one_line(FsConfig::parse(text)), help = FsConfig::syntax())]
    pub(crate) fs: FsConfig,
}

#[derive(Debug, Args)]
pub(crate) struct AddGenericVhostUserArguments {
    #[arg(value_name = "DEVICE", value_parser = |text: &str| one_line(GenericVhostUserConfig::parse(text)), help = GenericVhostUserConfig::syntax())]
    pub(crate) device: GenericVhostUserConfig,
}

#[derive(Debug, Args)]
pub(crate) struct AddPmemArguments {
    #[arg(value_name = "PMEM", value_parser = |text: &str| one_line(PmemConfig::parse(text)), help = PmemConfig::syntax())]
    pub(crate) pmem: PmemConfig,
}

#[derive(Debug, Args)]
pub(crate) struct AddVsockArguments {
    #[arg(value_name = "VSOCK", value_parser = |text: &str| one_line(VsockConfig::parse(text)), help = VsockConfig::syntax())]
    pub(crate) vsock: VsockConfig,
}

#[derive(Debug, Args)]
pub(crate) struct AddBalloonArguments {
    #[arg(value_name = "BALLOON", value_parser = |text: &str| one_line(BalloonConfig::parse(text)), help = BalloonConfig::syntax())]
    pub(crate) balloon: BalloonConfig,
}

#[derive(Debug, Args)]
pub(crate) struct RemoveDeviceArguments {
    /// Name of the device, as vm.info shows it
    #[arg(value_name = "ID")]
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotArguments {
    /// An existing folder without a snapshot, as file:// and its absolute path
    #[arg(value_name = "URL")]
    pub(crate) url: String,
}

#[derive(Debug, Args)]
pub(crate) struct CoredumpArguments {
    /// A file that does not exist yet, as file:// and its absolute path
    #[arg(value_name = "URL")]
    pub(crate) url: String,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArguments {
    #[arg(value_name = "RESTORE", value_parser = |text: &str| one_line(RestoreConfig::parse(text)), help = RestoreConfig::syntax())]
    pub(crate) restore: RestoreConfig,
}

/// Output format of `reclaim-stats`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// Human-readable
    Table,
    /// The VMM's response
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct ReclaimStatsArguments {
    /// Output format [default: table on a terminal, otherwise json]
    #[arg(short, long, value_enum, conflicts_with = "watch")]
    output: Option<OutputFormat>,

    /// Refresh until Ctrl-C: a table on a terminal, otherwise one key=value line per sample
    #[arg(long)]
    pub(crate) watch: bool,

    /// Seconds between two samples
    #[arg(long, value_name = "SECONDS", default_value = "1", requires = "watch", value_parser = parse_interval)]
    pub(crate) interval: Duration,

    /// End after this many samples
    #[arg(long, value_name = "SAMPLES", requires = "watch", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct ReclaimThresholdsArguments {
    #[arg(long, value_name = "SETTINGS", value_parser = |text: &str| one_line(ReclaimThresholdsChange::parse(text)), help = ReclaimThresholdsChange::syntax())]
    pub(crate) set: Vec<ReclaimThresholdsChange>,

    /// Remove the alert with this name, before anything is set
    #[arg(long, value_name = "NAME")]
    pub(crate) remove: Vec<String>,
}

impl ReclaimStatsArguments {
    /// Output format for standard output, which may be a terminal.
    pub(crate) fn output(&self, terminal: bool) -> OutputFormat {
        self.output.unwrap_or(if terminal {
            OutputFormat::Table
        } else {
            OutputFormat::Json
        })
    }
}

impl ReclaimThresholdsArguments {
    /// All changes in one request; `None` if there are none.
    pub(crate) fn change(&self) -> Option<ReclaimThresholdsChange> {
        if self.set.is_empty() && self.remove.is_empty() {
            return None;
        }
        let mut change = ReclaimThresholdsChange {
            remove_alerts: self.remove.clone(),
            ..ReclaimThresholdsChange::default()
        };
        for set in &self.set {
            change.extend(set.clone());
        }
        Some(change)
    }
}

/// The value of an option, or the error with its chain of causes on one line.
fn one_line<T>(parsed: Result<T, OptionError>) -> Result<T, String> {
    parsed.map_err(|error| api::error_chain(&error).join(": "))
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| format!("{text:?} is not a number of seconds"))?;
    if !(INTERVAL_SECONDS_MIN..=INTERVAL_SECONDS_MAX).contains(&seconds) {
        return Err(format!(
            "{text:?} is not between {INTERVAL_SECONDS_MIN} and {INTERVAL_SECONDS_MAX} seconds"
        ));
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// An endpoint with the body for it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) endpoint: Endpoint,
    pub(crate) body: Option<String>,
    /// Open descriptors of this process that are sent with it.
    pub(crate) fds: Vec<RawFd>,
}

impl Request {
    /// The request of `command`; `input` stands for standard input.
    pub(crate) fn new(command: &Command, input: &mut dyn Read) -> Result<Self> {
        let endpoint = endpoint(command);
        let body = match command {
            Command::Create(create) => Some(read_config(&create.path, input)?),
            Command::Resize(resize) => Some(to_ascii_json(&resize_body(resize))?),
            Command::ReclaimThresholds(thresholds) => thresholds
                .change()
                .map(|change| to_ascii_json(&change))
                .transpose()?,
            Command::BalloonHinting(hinting) => hinting_body(hinting.action)
                .map(|body| to_ascii_json(&body))
                .transpose()?,
            Command::ResizeDisk(resize) => Some(to_ascii_json(&VmResizeDisk {
                id: resize.disk.clone(),
                desired_size: resize.size,
            })?),
            Command::UpdateRateLimiter(update) => Some(to_ascii_json(&update.limit)?),
            Command::AddDisk(add) => Some(to_ascii_json(&add.disk)?),
            Command::AddNet(add) => Some(to_ascii_json(&add.net)?),
            Command::AddFs(add) => Some(to_ascii_json(&add.fs)?),
            Command::AddGenericVhostUser(add) => Some(to_ascii_json(&add.device)?),
            Command::AddPmem(add) => Some(to_ascii_json(&add.pmem)?),
            Command::AddVsock(add) => Some(to_ascii_json(&add.vsock)?),
            Command::AddBalloon(add) => Some(to_ascii_json(&add.balloon)?),
            Command::Snapshot(snapshot) => {
                let destination_url = snapshot.url.clone();
                Some(to_ascii_json(&VmSnapshotConfig { destination_url })?)
            }
            Command::Coredump(coredump) => {
                let destination_url = coredump.url.clone();
                Some(to_ascii_json(&VmCoredumpData { destination_url })?)
            }
            Command::Restore(restore) => Some(to_ascii_json(&restore.restore)?),
            Command::RemoveDevice(remove) => {
                let id = remove.id.clone();
                Some(to_ascii_json(&VmRemoveDevice { id })?)
            }
            Command::BalloonReporting(reporting) => reporting_body(reporting)
                .map(|body| to_ascii_json(&body))
                .transpose()?,
            _ => None,
        };
        let fds = match command {
            Command::AddNet(add) => add.net.fds.clone().unwrap_or_default(),
            Command::Restore(restore) => {
                let nets = restore.restore.net_fds.iter().flatten();
                nets.flat_map(|net| net.fds.iter().copied()).collect()
            }
            _ => Vec::new(),
        };
        Ok(Self {
            endpoint,
            body,
            fds,
        })
    }
}

/// The endpoint that `command` calls.
pub(crate) fn endpoint(command: &Command) -> Endpoint {
    match command {
        Command::Bare(Bare(endpoint)) => *endpoint,
        Command::Create(_) => Endpoint::VmCreate,
        Command::Resize(_) => Endpoint::VmResize,
        Command::ResizeDisk(_) => Endpoint::VmResizeDisk,
        Command::UpdateRateLimiter(_) => Endpoint::VmUpdateRateLimiter,
        Command::AddDisk(_) => Endpoint::VmAddDisk,
        Command::AddNet(_) => Endpoint::VmAddNet,
        Command::AddFs(_) => Endpoint::VmAddFs,
        Command::AddGenericVhostUser(_) => Endpoint::VmAddGenericVhostUser,
        Command::AddPmem(_) => Endpoint::VmAddPmem,
        Command::AddVsock(_) => Endpoint::VmAddVsock,
        Command::AddBalloon(_) => Endpoint::VmAddBalloon,
        Command::RemoveDevice(_) => Endpoint::VmRemoveDevice,
        Command::Snapshot(_) => Endpoint::VmSnapshot,
        Command::Coredump(_) => Endpoint::VmCoredump,
        Command::Restore(_) => Endpoint::VmRestore,
        Command::ReclaimStats(_) => Endpoint::VmReclaimStats,
        Command::ReclaimThresholds(thresholds) if thresholds.change().is_some() => {
            Endpoint::VmSetReclaimThresholds
        }
        Command::ReclaimThresholds(_) => Endpoint::VmReclaimThresholds,
        Command::BalloonHinting(hinting) => match hinting.action {
            BalloonHintingAction::Status => Endpoint::VmReclaimStats,
            BalloonHintingAction::Start | BalloonHintingAction::Stop => Endpoint::VmBalloonHinting,
        },
        Command::BalloonReporting(reporting) => match reporting.action {
            BalloonReportingAction::Status => Endpoint::VmReclaimStats,
            _ => Endpoint::VmBalloonReporting,
        },
    }
}

fn hinting_body(action: BalloonHintingAction) -> Option<VmBalloonHinting> {
    let action = match action {
        BalloonHintingAction::Start => HintingAction::Start,
        BalloonHintingAction::Stop => HintingAction::Stop,
        BalloonHintingAction::Status => return None,
    };
    Some(VmBalloonHinting { action })
}

fn reporting_body(arguments: &BalloonReportingArguments) -> Option<VmBalloonReporting> {
    let action = match arguments.action {
        BalloonReportingAction::Pause => ReportingAction::Pause,
        BalloonReportingAction::Resume => ReportingAction::Resume,
        BalloonReportingAction::ReportNow => ReportingAction::ReportNow,
        BalloonReportingAction::Status => return None,
    };
    Some(VmBalloonReporting {
        action,
        again: arguments.again,
    })
}

fn resize_body(resize: &ResizeArguments) -> VmResize {
    VmResize {
        desired_vcpus: resize.cpus,
        desired_ram: resize.memory,
        desired_balloon: resize.balloon,
    }
}

/// The unmodified configuration in the file. The VMM validates it, and may support more than this program knows.
fn read_config(path: &Path, input: &mut dyn Read) -> Result<String> {
    let mut text = String::new();
    if path == Path::new("-") {
        input
            .take(CONFIG_BYTES_MAX + 1)
            .read_to_string(&mut text)
            .context("Cannot read standard input")?;
    } else {
        let failed = || format!("Cannot read {}", path.display());
        let file = File::open(path).with_context(failed)?;
        file.take(CONFIG_BYTES_MAX + 1)
            .read_to_string(&mut text)
            .with_context(failed)?;
    }
    ensure!(
        text.len() as u64 <= CONFIG_BYTES_MAX,
        "The configuration is longer than {CONFIG_BYTES_MAX} bytes"
    );
    Ok(text)
}
