//! The command line of `ch-fleet`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::options::parse_bytes;
#[cfg(feature = "simulate")]
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use fleet::agent_config::{DEFAULT_FILE, DEFAULT_SOCKET};
#[cfg(feature = "simulate")]
use fleet::config::SafetyRule;

/// Memory overcommit for VMs with Cloud Hypervisor's API.
#[derive(Debug, Parser)]
#[command(
    name = "ch-fleet",
    version = concat!("v", env!("CARGO_PKG_VERSION")),
    after_help = "Exit status: 0 success; 1 error, failed check (doctor) or unmet expectation (simulate); 2 usage error; \
                  3 refused; 5 timeout. run and wake exit with the status of the VMM, or with 128+N if signal N ended it.\n\n\
                  --generate-docs DIR, as the only option, writes manual pages and completions to DIR.\n\nExamples:\n  \
                  ch-fleet agent --config /etc/ch-fleet/agent.toml\n  \
                  ch-fleet status\n  \
                  ch-fleet explain web-1\n  \
                  ch-fleet reserve web-2 --memory 4G --min 2G --dry-run\n  \
                  ch-fleet run -- cloud-hypervisor --api-socket /run/ch/web-2.sock --memory size=4G …\n  \
                  ch-fleet standby web-2\n  \
                  ch-fleet wake web-2"
)]
pub(crate) struct Arguments {
    /// Socket of the agent [default: /run/ch-fleet/agent.sock, and for `agent` the one in its settings]
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// Output format
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,

    /// Give up after this many seconds
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,

    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Arguments {
    /// The socket of the agent that is asked.
    pub(crate) fn socket(&self) -> &Path {
        self.socket.as_deref().unwrap_or(Path::new(DEFAULT_SOCKET))
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// Human-readable
    Table,
    /// Machine-readable
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the agent that manages the memory of this host's VMs
    Agent(AgentOptions),
    /// Show the host, its memory accounts and its VMs
    Status,
    /// Show the VMs
    Vms,
    /// Show the latest decisions with their reasons and figures
    Explain {
        /// Name of the VM [default: all VMs]
        vm: Option<String>,
    },
    /// Show recent events
    Events {
        /// Number of the first event, from `next` of the previous output
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        since: u64,
    },
    /// Show the host and its VMs, refreshed continuously
    Top(TopOptions),
    /// Reserve memory for a VM before it starts
    Reserve(ReserveOptions),
    /// Release a reservation
    Release {
        /// Id of the reservation or name of the VM
        reservation: String,
    },
    /// Show the reservations
    Reservations,
    /// Reserve memory, start a VMM, and release the memory when it ends
    Run(RunOptions),
    /// Save a VM to disk and end its VMM, so that its memory is free
    Standby {
        /// The VM
        vm: String,
    },
    /// Reserve memory, start the VMM of a VM in standby, and release the memory when it ends
    Wake(WakeOptions),
    /// Remove a VM in standby and its memory, which cannot be undone
    Discard {
        /// The VM in standby
        vm: String,

        /// Confirm the removal
        #[arg(long, required = true)]
        yes: bool,
    },
    /// Exclude a VM from memory management
    Pin {
        /// The VM
        vm: String,
    },
    /// Include a pinned VM in memory management again
    Unpin {
        /// The VM
        vm: String,
    },
    /// Show all hosts of the fleet and place VMs on them, through the shared store
    Fleet(FleetArguments),
    /// Make the agent reload its settings
    Reload,
    /// Check or show settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Run scenarios on virtual time, without an agent
    #[cfg(feature = "simulate")]
    Simulate(SimulateArguments),
    /// Check what this host and its VMs support
    Doctor,
    /// Print shell completions
    Completions {
        /// The shell
        shell: program_docs::Shell,
    },
    /// Print the manual page
    Man,
}

#[derive(Debug, Args)]
pub(crate) struct AgentOptions {
    /// Settings file; the files in agent.d/*.toml next to it are read after it
    #[arg(long, value_name = "PATH", default_value = DEFAULT_FILE)]
    pub(crate) config: PathBuf,

    /// Decide and report, but change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Mount point of the host's /proc, for an agent in a container
    #[arg(long, value_name = "PATH", default_value = "/proc")]
    pub(crate) proc: PathBuf,

    /// Mount point of the host's control groups, for an agent in a container
    #[arg(long, value_name = "PATH", default_value = "/sys/fs/cgroup")]
    pub(crate) cgroup_root: PathBuf,

    /// Log format on standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,

    /// Log more; give it twice to log everything
    #[arg(long, short, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// key=value
    Text,
    /// One JSON object per line
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct TopOptions {
    /// Print one round after another instead of a full screen; always on without a terminal
    #[arg(long, short)]
    pub(crate) batch: bool,

    /// Number of rounds [default: unlimited]
    #[arg(long, short = 'n', value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,

    /// Time between rounds, from 0.1 to 3600 seconds
    #[arg(long, short, value_name = "SECONDS", default_value_t = 2.0, value_parser = delay)]
    pub(crate) delay: f64,
}

fn delay(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be between 0.1 and 3600 seconds".to_owned()),
    }
}

#[cfg(feature = "simulate")]
#[derive(Debug, Args)]
pub(crate) struct SimulateArguments {
    /// Scenario files
    #[arg(required = true, value_name = "FILE")]
    pub(crate) scenarios: Vec<PathBuf>,

    /// Seed [default: that of the file]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) seed: Option<u64>,

    /// Switch off a safety rule, to show its effect
    #[arg(long, value_name = "RULE", value_parser = safety_rule())]
    pub(crate) without: Vec<SafetyRule>,

    /// Write a chart of the run to this SVG file
    #[arg(long, value_name = "PATH")]
    pub(crate) plot: Option<PathBuf>,
}

#[cfg(feature = "simulate")]
fn safety_rule() -> impl TypedValueParser<Value = SafetyRule> {
    PossibleValuesParser::new(SafetyRule::NAMES).try_map(|name| name.parse::<SafetyRule>())
}

#[derive(Debug, Args)]
pub(crate) struct ReserveOptions {
    /// Name of the VM, or its socket
    pub(crate) vm: String,

    /// Memory of the VM, in bytes or with a suffix such as M or GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) memory: u64,

    /// Memory that must be available [default: that of the VM's policy]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) min: Option<u64>,

    /// The VM is backed by huge pages, all from the host's pool
    #[arg(long)]
    pub(crate) huge_pages: bool,

    /// Only report whether it would fit
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct FleetArguments {
    /// Settings file with [store], policies and limits
    #[arg(long, value_name = "PATH", default_value = DEFAULT_FILE)]
    pub(crate) config: PathBuf,

    /// Store member to use instead of those in the settings; repeatable
    #[arg(long, value_name = "URL")]
    pub(crate) endpoint: Vec<String>,

    #[command(subcommand)]
    pub(crate) command: FleetCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum FleetCommand {
    /// Show the hosts and the memory that they can reserve
    Status,
    /// Find a host for a VM, and optionally reserve the memory there
    Place(PlaceOptions),
    /// Release a reservation made by place --reserve
    Release {
        /// Id of the reservation
        id: String,
    },
    /// Stop placing VMs on a host, and list targets for its VMs or move them there
    Drain(DrainOptions),
    /// List VMs that should leave hosts short of memory
    Advice,
}

#[derive(Debug, Args)]
pub(crate) struct DrainOptions {
    /// The host
    pub(crate) host: String,

    /// Allow VMs there again, and begin no further moves
    #[arg(long)]
    pub(crate) undo: bool,

    /// Move the VMs to other hosts by live migration, and wait for the end
    #[arg(long, conflicts_with = "undo")]
    pub(crate) execute: bool,

    /// Maximum number of moves at a time
    #[arg(long, value_name = "N", default_value_t = 1, requires = "execute",
          value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) parallel: u32,

    /// Maximum bytes per second of all moves together, such as 400M [default: unlimited]
    #[arg(long, value_name = "SIZE", requires = "execute", value_parser = parse_bytes)]
    pub(crate) bandwidth: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct PlaceOptions {
    /// Memory of the VM, in bytes or with a suffix such as M or GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) memory: u64,

    /// Memory that must be available [default: that of the VM's policy]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) min: Option<u64>,

    /// Name of the VM, as discovery will see it on its host [default: generated]
    #[arg(long)]
    pub(crate) name: Option<String>,

    /// Reserve the memory on the host
    #[arg(long)]
    pub(crate) reserve: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RunOptions {
    /// Memory that must be available [default: that of the VM's policy]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) min: Option<u64>,

    /// Retry a refused reservation for this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) wait: u64,

    /// The VMM with its arguments, including --api-socket and --memory or --restore
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct WakeOptions {
    /// The VM in standby
    pub(crate) vm: String,

    /// Memory that must be available [default: that of the VM's policy]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) min: Option<u64>,

    /// Retry a refused reservation for this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) wait: u64,

    /// How the VMM loads the memory [default: ondemand, or copy if the memory is shared, prefaulted or in huge pages]
    #[arg(long, value_enum)]
    pub(crate) mode: Option<WakeMode>,

    /// Wake the VM even if its memory may be older than its disks
    #[arg(long)]
    pub(crate) force: bool,

    /// The VMM and its arguments [default: agent.wake_command]; --api-socket and --restore are added
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WakeMode {
    /// Load pages while the VM runs
    #[value(name = "ondemand")]
    OnDemand,
    /// Load all pages before the VM runs
    Copy,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Check settings without applying them
    Check {
        /// The file
        #[arg(long, value_name = "PATH", default_value = DEFAULT_FILE)]
        config: PathBuf,
    },
    /// Show settings with all defaults: the agent's, or those of a file
    Show {
        /// Settings file [default: the settings in use]
        #[arg(long, value_name = "PATH")]
        config: Option<PathBuf>,
    },
}
