//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use api::options::parse_bytes;
use clap::{Args, Parser, Subcommand, ValueEnum};
use fleet::agent_config::{DEFAULT_FILE, DEFAULT_SOCKET};
#[cfg(feature = "simulate")]
use fleet::config::SafetyRule;

/// Memory overcommit for VMs with Cloud Hypervisor's API.
#[derive(Debug, Parser)]
#[command(
    name = "ch-fleet",
    version = concat!("v", env!("CARGO_PKG_VERSION")),
    after_help = "Exit status: 0 done, 1 error, 2 usage, 3 refused, 5 no answer in time; run ends with its VMM's.\n\nExamples:\n  \
                  ch-fleet agent --config /etc/ch-fleet/agent.toml\n  \
                  ch-fleet status\n  \
                  ch-fleet explain web-1\n  \
                  ch-fleet reserve web-2 --memory 4G --min 2G --dry-run\n  \
                  ch-fleet run -- cloud-hypervisor --api-socket /run/ch/web-2.sock --memory size=4G …"
)]
pub(crate) struct Arguments {
    /// Socket of the agent
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub(crate) socket: PathBuf,

    /// Form of answers
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
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    Table,
    /// For programs
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Look after the VMs of this host
    Agent(AgentOptions),
    /// Show the host, its books and its VMs
    Status,
    /// Show the VMs
    Vms,
    /// Show what was decided last and why, with every figure that was looked at
    Explain {
        /// The VM; all of them without
        vm: Option<String>,
    },
    /// Show what happened lately
    Events {
        /// From this number on, as the last answer's `next` gave it
        #[arg(long, default_value_t = 0)]
        since: u64,
    },
    /// Show the host and the VMs again and again
    Top(TopOptions),
    /// Promise memory to a VM that is going to start
    Reserve(ReserveOptions),
    /// Give a promise back
    Release {
        /// Id of the reservation or name of the VM
        reservation: String,
    },
    /// Show the promises
    Reservations,
    /// Reserve memory, start a VMM, and give the memory back when it ends
    Run(RunOptions),
    /// Leave a VM's memory as it is
    Pin {
        /// The VM
        vm: String,
    },
    /// Look after a pinned VM again
    Unpin {
        /// The VM
        vm: String,
    },
    /// See all hosts and place VMs on them, by way of the store they share
    Fleet(FleetArguments),
    /// Have the agent read its settings anew
    Reload,
    /// Check settings or show them
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Run scenarios on virtual time, without an agent
    #[cfg(feature = "simulate")]
    Simulate(SimulateArguments),
    /// Find out what is missing on this host
    Doctor,
    /// Write the completions of a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual page
    Man,
}

#[derive(Debug, Args)]
pub(crate) struct AgentOptions {
    /// Settings; *.toml in the folder of the same name with the ending .d are read as well
    #[arg(long, value_name = "PATH", default_value = DEFAULT_FILE)]
    pub(crate) config: PathBuf,

    /// Decide and tell, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Where the host's /proc is, for an agent in a container
    #[arg(long, value_name = "PATH", default_value = "/proc")]
    pub(crate) proc: PathBuf,

    /// Where the host's control groups are, for an agent in a container
    #[arg(long, value_name = "PATH", default_value = "/sys/fs/cgroup")]
    pub(crate) cgroup_root: PathBuf,

    /// Form of the log on standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,

    /// Log more; twice for everything
    #[arg(long, short, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// key=value
    Text,
    /// One JSON object a line
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct TopOptions {
    /// Print rounds one after the other instead of filling the terminal; so it does anyway where there is none
    #[arg(long, short)]
    pub(crate) batch: bool,

    /// Rounds; for ever without
    #[arg(long, short = 'n', value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,

    /// Seconds between rounds
    #[arg(long, short, default_value_t = 2.0)]
    pub(crate) delay: f64,
}

#[cfg(feature = "simulate")]
#[derive(Debug, Args)]
pub(crate) struct SimulateArguments {
    /// Scenario files
    #[arg(required = true, value_name = "FILE")]
    pub(crate) scenarios: Vec<PathBuf>,

    /// Another seed than the file's
    #[arg(long)]
    pub(crate) seed: Option<u64>,

    /// Switch a safety rule off, to see what it is good for
    #[arg(long, value_name = "RULE")]
    pub(crate) without: Vec<SafetyRule>,

    /// Draw the course of things into this SVG file
    #[arg(long, value_name = "PATH")]
    pub(crate) plot: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ReserveOptions {
    /// Name of the VM, or its socket
    pub(crate) vm: String,

    /// Memory of the VM, in bytes or with a suffix K, M, G or T
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) memory: u64,

    /// Memory that must be there [default: that of the VM's policy]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) min: Option<u64>,

    /// The VM is backed by huge pages: all of its memory is taken from the host's pool
    #[arg(long)]
    pub(crate) huge_pages: bool,

    /// Only tell whether it would fit
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct FleetArguments {
    /// Settings with [store], and with the policies and limits that are placed by
    #[arg(long, value_name = "PATH", default_value = DEFAULT_FILE)]
    pub(crate) config: PathBuf,

    /// A member of the store instead of those in the settings; may be given several times
    #[arg(long, value_name = "URL")]
    pub(crate) endpoint: Vec<String>,

    #[command(subcommand)]
    pub(crate) command: FleetCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum FleetCommand {
    /// Show the hosts and what they can promise
    Status,
    /// Say which host takes a VM, and have it promise the memory
    Place(PlaceOptions),
    /// Give back a promise that was made by place --reserve
    Release {
        /// Id of the reservation
        id: String,
    },
    /// Let nothing new go to a host, and say where its VMs should go
    Drain {
        /// The host
        host: String,
        /// Let VMs go there again
        #[arg(long)]
        undo: bool,
    },
    /// Say which VMs should leave hosts that are short of memory
    Advice,
}

#[derive(Debug, Args)]
pub(crate) struct PlaceOptions {
    /// Memory of the VM, in bytes or with a suffix K, M, G or T
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) memory: u64,

    /// Memory that must be there [default: that of the VM's policy]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) min: Option<u64>,

    /// Name of the VM, as discovery will see it on its host [default: one made up]
    #[arg(long)]
    pub(crate) name: Option<String>,

    /// Have the host promise it
    #[arg(long)]
    pub(crate) reserve: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RunOptions {
    /// Memory that must be there [default: that of the VM's policy]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) min: Option<u64>,

    /// Keep asking for so many seconds while the answer is no
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) wait: u64,

    /// The VMM and its arguments, among them --api-socket and --memory
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Check settings without using them
    Check {
        /// The file
        #[arg(long, value_name = "PATH", default_value = DEFAULT_FILE)]
        config: PathBuf,
    },
    /// Show settings with all defaults: those in use by the agent, or those of a file
    Show {
        /// The file; those in use without
        #[arg(long, value_name = "PATH")]
        config: Option<PathBuf>,
    },
}
