//! The commands: one for each name in the endpoint table, with the arguments that the endpoint's body needs.

use std::fs::File;
use std::io::Read;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api::config::{
    BalloonConfig, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig,
    PmemConfig, VsockConfig,
};
use api::options::{OptionError, parse_bytes};
use api::{
    Endpoint, HintingAction, ReclaimThresholdsChange, ReportingAction, RestoreConfig,
    VmBalloonHinting, VmBalloonReporting, VmCoredumpData, VmReceiveMigrationData, VmRemoveDevice,
    VmResize, VmResizeDisk, VmResizeZone, VmSendMigrationData, VmSnapshotConfig,
    VmSnapshotMergeConfig, VmUpdateRateLimiter, to_ascii_json,
};
use clap::error::ErrorKind;
use clap::{Arg, ArgGroup, ArgMatches, Args, FromArgMatches, Subcommand, ValueEnum};
use serde::Serialize;

/// Minimum time between two samples of `reclaim-stats --watch`, because each measures residency on the host.
const INTERVAL_SECONDS_MIN: f64 = 0.05;
/// Maximum time between two samples; it must fit a `Duration`.
const INTERVAL_SECONDS_MAX: f64 = 86_400.0;

/// Maximum size of a configuration, the VMM's limit for a body.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// The action of a command.
#[derive(Debug)]
pub(crate) enum Command {
    /// Sends a request and prints the response.
    Call(Request),
    /// Sends the configuration in this file.
    Create(PathBuf),
    /// Prints the reclaim statistics.
    ReclaimStats(ReclaimStatsArguments),
    /// Prints the part of the reclaim statistics about hinting.
    HintingStatus,
    /// Prints the part of the reclaim statistics about reporting.
    ReportingStatus,
}

/// A request to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) endpoint: Endpoint,
    pub(crate) body: Option<String>,
    /// Open descriptors of this process that are sent with it.
    pub(crate) fds: Vec<RawFd>,
}

impl Request {
    fn new(endpoint: Endpoint, body: Option<String>) -> Self {
        let fds = Vec::new();
        Self {
            endpoint,
            body,
            fds,
        }
    }

    /// The request to create the VM of the configuration at `path`; `input` stands for standard input.
    pub(crate) fn create(path: &Path, input: &mut dyn Read) -> Result<Self> {
        let config = read_config(path, input)?;
        Ok(Self::new(Endpoint::VmCreate, Some(config)))
    }
}

fn call(endpoint: Endpoint, body: &impl Serialize) -> Command {
    Command::Call(Request::new(endpoint, Some(json(body))))
}

fn json(body: &impl Serialize) -> String {
    to_ascii_json(body).expect("wire types are always JSON")
}

type Parsed = Result<Command, clap::Error>;

/// The arguments of a command: their declaration, and the command that they make.
struct Arguments {
    declare: Box<dyn Fn(clap::Command) -> clap::Command>,
    read: Box<dyn Fn(&ArgMatches) -> Parsed>,
}

impl Arguments {
    /// The arguments of the command whose first endpoint this is, if it has any.
    fn of(endpoint: Endpoint) -> Option<Self> {
        /// One argument: a section of the configuration, with the descriptors that it names.
        macro_rules! section {
            ($section:ty, $id:literal, $name:literal) => {
                section!($section, $id, $name, |_| Vec::new())
            };
            ($section:ty, $id:literal, $name:literal, $fds:expr) => {{
                let argument = Arg::new($id).value_name($name).help(<$section>::syntax());
                Self::one(endpoint, argument, <$section>::parse, $fds)
            }};
        }
        Some(match endpoint {
            Endpoint::VmCreate => Self::derived::<CreateArguments>(),
            Endpoint::VmResize => Self::derived::<ResizeArguments>(),
            Endpoint::VmResizeZone => Self::derived::<ResizeZoneArguments>(),
            Endpoint::VmResizeDisk => Self::derived::<ResizeDiskArguments>(),
            Endpoint::VmUpdateRateLimiter => section!(VmUpdateRateLimiter, "limit", "LIMIT"),
            Endpoint::VmAddDisk => section!(DiskConfig, "disk", "DISK"),
            Endpoint::VmAddNet => {
                section!(NetConfig, "net", "NET", |it| {
                    it.fds.clone().unwrap_or_default()
                })
            }
            Endpoint::VmAddFs => section!(FsConfig, "fs", "FS"),
            Endpoint::VmAddGenericVhostUser => section!(GenericVhostUserConfig, "device", "DEVICE"),
            Endpoint::VmAddDevice => section!(DeviceConfig, "device", "DEVICE"),
            Endpoint::VmAddPmem => section!(PmemConfig, "pmem", "PMEM"),
            Endpoint::VmAddVsock => section!(VsockConfig, "vsock", "VSOCK"),
            Endpoint::VmAddBalloon => section!(BalloonConfig, "balloon", "BALLOON"),
            Endpoint::VmRestore => section!(RestoreConfig, "restore", "RESTORE", |it| {
                let nets = it.net_fds.iter().flatten();
                nets.flat_map(|net| net.fds.iter().copied()).collect()
            }),
            Endpoint::VmSendMigration => section!(VmSendMigrationData, "migration", "MIGRATION"),
            Endpoint::VmReceiveMigration => Self::one(
                endpoint,
                Arg::new("migration")
                    .value_name("MIGRATION")
                    .help(VmReceiveMigrationData::syntax()),
                receive_migration,
                |_| Vec::new(),
            ),
            Endpoint::VmSnapshot => Self::derived::<SnapshotArguments>(),
            Endpoint::VmSnapshotMerge => Self::derived::<SnapshotMergeArguments>(),
            Endpoint::VmCoredump => Self::text(
                endpoint,
                Arg::new("url")
                    .value_name("URL")
                    .help("A file that does not exist yet, as file:// and its absolute path"),
                |destination_url| VmCoredumpData { destination_url },
            ),
            Endpoint::VmRemoveDevice => Self::text(
                endpoint,
                Arg::new("id")
                    .value_name("ID")
                    .help("Name of the device, as vm.info shows it"),
                |id| VmRemoveDevice { id },
            ),
            Endpoint::VmReclaimStats => Self::derived::<ReclaimStatsArguments>(),
            Endpoint::VmReclaimThresholds => Self::derived::<ReclaimThresholdsArguments>(),
            Endpoint::VmBalloonHinting => Self::derived::<BalloonHintingArguments>(),
            Endpoint::VmBalloonReporting => Self::derived::<BalloonReportingArguments>(),
            _ => return None,
        })
    }

    fn derived<T: Args + Into<Command> + 'static>() -> Self {
        Self {
            declare: Box::new(T::augment_args),
            read: Box::new(|matches| T::from_arg_matches(matches).map(T::into)),
        }
    }

    /// One argument, which is a field of the body.
    fn text<T: Serialize + 'static>(
        endpoint: Endpoint,
        argument: Arg,
        body: fn(String) -> T,
    ) -> Self {
        let parse = move |text: &str| Ok(body(text.to_owned()));
        Self::one(endpoint, argument, parse, |_| Vec::new())
    }

    /// One argument, from which `parse` makes the body.
    fn one<T: Serialize + 'static>(
        endpoint: Endpoint,
        argument: Arg,
        parse: impl Fn(&str) -> Result<T, OptionError> + Clone + Send + Sync + 'static,
        fds: fn(&T) -> Vec<RawFd>,
    ) -> Self {
        let id = argument.get_id().clone();
        let argument = argument.required(true).value_parser(move |text: &str| {
            let value = one_line(parse(text))?;
            Ok::<_, String>(Request {
                endpoint,
                body: Some(json(&value)),
                fds: fds(&value),
            })
        });
        Self {
            declare: Box::new(move |command| command.arg(argument.clone())),
            read: Box::new(move |matches| {
                let request = matches.get_one::<Request>(id.as_str()).cloned();
                let missing = || clap::Error::new(ErrorKind::MissingRequiredArgument);
                request.map(Command::Call).ok_or_else(missing)
            }),
        }
    }
}

/// The first endpoint of each command. Commands without arguments come first.
fn endpoints() -> impl Iterator<Item = Endpoint> {
    let is_first = |it: &Endpoint| first_of(it.command()) == Some(*it);
    let all = Endpoint::ALL.iter().copied().filter(is_first);
    let (with_arguments, bare): (Vec<_>, Vec<_>) = all.partition(|it| Arguments::of(*it).is_some());
    bare.into_iter().chain(with_arguments)
}

fn first_of(command: &str) -> Option<Endpoint> {
    let mut all = Endpoint::ALL.iter().copied();
    all.find(|it| it.command() == command)
}

impl Subcommand for Command {
    fn augment_subcommands(program: clap::Command) -> clap::Command {
        endpoints().fold(program, |program, endpoint| {
            let about = endpoint.about().trim_end_matches('.');
            let command = clap::Command::new(endpoint.command()).about(about);
            program.subcommand(match Arguments::of(endpoint) {
                Some(arguments) => (arguments.declare)(command),
                None => command,
            })
        })
    }

    fn augment_subcommands_for_update(program: clap::Command) -> clap::Command {
        Self::augment_subcommands(program)
    }

    fn has_subcommand(name: &str) -> bool {
        first_of(name).is_some()
    }
}

impl FromArgMatches for Command {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let (name, matches) = matches
            .subcommand()
            .ok_or_else(|| clap::Error::new(ErrorKind::MissingSubcommand))?;
        let endpoint =
            first_of(name).ok_or_else(|| clap::Error::new(ErrorKind::InvalidSubcommand))?;
        match Arguments::of(endpoint) {
            Some(arguments) => (arguments.read)(matches),
            None => Ok(Self::Call(Request::new(endpoint, None))),
        }
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Upstream also accepts a URL alone.
fn receive_migration(text: &str) -> Result<VmReceiveMigrationData, OptionError> {
    match text.starts_with("tcp:") || text.starts_with("unix:") {
        true => VmReceiveMigrationData::parse(&format!("receiver_url={text}")),
        false => VmReceiveMigrationData::parse(text),
    }
}

/// Pause or resume free page reporting, request a full report, or show the state
#[derive(Debug, Args)]
struct BalloonReportingArguments {
    /// Action
    #[arg(value_enum)]
    action: BalloonReportingAction,

    /// With report-now: include memory reported before, for example after a restore
    #[arg(long)]
    again: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BalloonReportingAction {
    /// Pause reporting, and wait until reported memory is no longer discarded
    Pause,
    /// Resume reporting
    Resume,
    /// Ask the guest to report all its free memory now
    ReportNow,
    /// Show the state
    Status,
}

impl From<BalloonReportingArguments> for Command {
    fn from(BalloonReportingArguments { action, again }: BalloonReportingArguments) -> Self {
        let action = match action {
            BalloonReportingAction::Pause => ReportingAction::Pause,
            BalloonReportingAction::Resume => ReportingAction::Resume,
            BalloonReportingAction::ReportNow => ReportingAction::ReportNow,
            BalloonReportingAction::Status => return Self::ReportingStatus,
        };
        let body = VmBalloonReporting { action, again };
        call(Endpoint::VmBalloonReporting, &body)
    }
}

/// Start or stop a run of free page hinting, or show its progress
#[derive(Debug, Args)]
struct BalloonHintingArguments {
    /// Action
    #[arg(value_enum)]
    action: BalloonHintingAction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BalloonHintingAction {
    /// Ask the guest to hint all its free memory, which returns to the host
    Start,
    /// End the run; the guest keeps its free memory
    Stop,
    /// Show the state of the run and the memory returned
    Status,
}

impl From<BalloonHintingArguments> for Command {
    fn from(hinting: BalloonHintingArguments) -> Self {
        let action = match hinting.action {
            BalloonHintingAction::Start => HintingAction::Start,
            BalloonHintingAction::Stop => HintingAction::Stop,
            BalloonHintingAction::Status => return Self::HintingStatus,
        };
        call(Endpoint::VmBalloonHinting, &VmBalloonHinting { action })
    }
}

#[derive(Debug, Args)]
struct CreateArguments {
    /// File with the configuration as JSON; - reads standard input
    #[arg(value_name = "PATH", default_value = "-")]
    path: PathBuf,
}

impl From<CreateArguments> for Command {
    fn from(create: CreateArguments) -> Self {
        Self::Create(create.path)
    }
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("change").required(true).multiple(true))]
struct ResizeArguments {
    /// Number of vCPUs
    #[arg(long, value_name = "COUNT", group = "change", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,

    /// RAM, in bytes or with a suffix such as M or GiB
    #[arg(long, value_name = "SIZE", group = "change", value_parser = parse_bytes)]
    memory: Option<u64>,

    /// Target size of the balloon; accepts a suffix such as M or GiB
    #[arg(long, value_name = "SIZE", group = "change", value_parser = parse_bytes)]
    balloon: Option<u64>,
}

impl From<ResizeArguments> for Command {
    fn from(resize: ResizeArguments) -> Self {
        let body = VmResize {
            desired_vcpus: resize.cpus,
            desired_ram: resize.memory,
            desired_balloon: resize.balloon,
        };
        call(Endpoint::VmResize, &body)
    }
}

#[derive(Debug, Args)]
struct SnapshotArguments {
    /// An existing folder without a snapshot, as file:// and its absolute path
    #[arg(value_name = "URL")]
    url: String,

    /// Save a running VM, and pause it only for the last pages
    #[arg(long)]
    live: bool,

    /// Leave the VM paused afterwards; required if an image of it is writable
    #[arg(long, requires = "live")]
    keep_paused: bool,

    /// Record writes from now on, so that a differential snapshot can follow
    #[arg(long)]
    track_writes: bool,

    /// Write a differential snapshot based on URL, which must be the VM's last snapshot
    #[arg(long, value_name = "URL")]
    base: Option<String>,
}

#[derive(Debug, Args)]
struct SnapshotMergeArguments {
    /// Last snapshot of the chain, as file:// and the absolute path of its folder
    #[arg(value_name = "SOURCE_URL")]
    source: String,

    /// An existing folder without a snapshot, as file:// and its absolute path
    #[arg(value_name = "DESTINATION_URL")]
    destination: String,
}

impl From<SnapshotMergeArguments> for Command {
    fn from(merge: SnapshotMergeArguments) -> Self {
        let body = VmSnapshotMergeConfig {
            source_url: merge.source,
            destination_url: merge.destination,
        };
        call(Endpoint::VmSnapshotMerge, &body)
    }
}

impl From<SnapshotArguments> for Command {
    fn from(snapshot: SnapshotArguments) -> Self {
        let body = VmSnapshotConfig {
            destination_url: snapshot.url,
            live: snapshot.live,
            keep_paused: snapshot.keep_paused,
            track_writes: snapshot.track_writes,
            base_url: snapshot.base,
        };
        call(Endpoint::VmSnapshot, &body)
    }
}

#[derive(Debug, Args)]
struct ResizeZoneArguments {
    /// Name of the memory zone
    #[arg(long, value_name = "ID")]
    id: String,

    /// Its new size; accepts a suffix such as M or GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    size: u64,
}

impl From<ResizeZoneArguments> for Command {
    fn from(resize: ResizeZoneArguments) -> Self {
        let body = VmResizeZone {
            id: resize.id,
            desired_ram: resize.size,
        };
        call(Endpoint::VmResizeZone, &body)
    }
}

#[derive(Debug, Args)]
struct ResizeDiskArguments {
    /// Name of the disk, as vm.info shows it
    #[arg(long, value_name = "ID")]
    disk: String,

    /// Its new size; accepts a suffix such as M or GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    size: u64,
}

impl From<ResizeDiskArguments> for Command {
    fn from(resize: ResizeDiskArguments) -> Self {
        let body = VmResizeDisk {
            id: resize.disk,
            desired_size: resize.size,
        };
        call(Endpoint::VmResizeDisk, &body)
    }
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

    /// End after this many samples [default: unlimited]
    #[arg(long, value_name = "SAMPLES", requires = "watch", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
}

/// Show or change alerts and the reporting policy
#[derive(Debug, Args)]
struct ReclaimThresholdsArguments {
    #[arg(long, value_name = "SETTINGS", value_parser = |text: &str| one_line(ReclaimThresholdsChange::parse(text)), help = ReclaimThresholdsChange::syntax())]
    set: Vec<ReclaimThresholdsChange>,

    /// Remove the alert with this name, before anything is set
    #[arg(long, value_name = "NAME")]
    remove: Vec<String>,
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

impl From<ReclaimStatsArguments> for Command {
    fn from(stats: ReclaimStatsArguments) -> Self {
        Self::ReclaimStats(stats)
    }
}

impl From<ReclaimThresholdsArguments> for Command {
    /// All changes in one request. Without changes, the settings are shown.
    fn from(ReclaimThresholdsArguments { set, remove }: ReclaimThresholdsArguments) -> Self {
        if set.is_empty() && remove.is_empty() {
            return Self::Call(Request::new(Endpoint::VmReclaimThresholds, None));
        }
        let mut change = ReclaimThresholdsChange {
            remove_alerts: remove,
            ..ReclaimThresholdsChange::default()
        };
        set.into_iter().for_each(|set| change.extend(set));
        call(Endpoint::VmSetReclaimThresholds, &change)
    }
}

/// The value of an option, or the error with its chain of causes on one line.
fn one_line<T>(parsed: Result<T, OptionError>) -> Result<T, String> {
    parsed.map_err(|error| api::error_line(&error))
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
