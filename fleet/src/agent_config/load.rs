//! Reads and merges the settings files.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use super::{AGENT, AgentConfig, AgentSection, RuleFault, StoreFault, rules};
use crate::config::{Config, ConfigError, ConfigFault, SyntaxFault, ranges};
use crate::host::HostFiles;
use crate::model::Bytes;
use crate::sample::{Discovery, PatternError};

/// Every section of a file.
pub(super) const SECTIONS: [&str; 11] = [
    "agent",
    "discovery",
    "store",
    "vm",
    "host",
    "thresholds",
    "reporting",
    "control",
    "admission",
    "last_resort",
    "policy",
];
/// Lists that later files add to instead of replacing them, by section.
const JOINED: [&str; 2] = ["discovery.sockets", "vm"];

/// Reasons why the settings are not used.
#[derive(Debug, Error)]
pub enum LoadError {
    /// A file or folder cannot be read.
    #[error("Cannot read {}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// A file is not TOML, or has unknown keys or invalid values.
    #[error("Cannot parse {}", path.display())]
    Syntax {
        /// Its path.
        path: PathBuf,
        /// The parser's error.
        #[source]
        source: SettingsFault,
    },
    /// The values of all files together contradict each other.
    #[error("The settings are inconsistent")]
    Config(#[source] ConfigError),
    /// A socket pattern is invalid.
    #[error("The settings contain no valid socket pattern")]
    Pattern(#[source] PatternError),
    /// The settings of the store are invalid.
    #[error("The settings contain no valid store")]
    Store(#[source] StoreFault),
    /// Only one of the two files that TLS needs is set.
    #[error("agent.tls_certificate and agent.tls_key are needed together")]
    HalfOfTls,
    /// The folder for VMs in standby depends on the working directory, or could not be an option of a VMM.
    #[error("agent.standby_dir must begin with / and have no quotes; got {}", path.display())]
    StandbyDir {
        /// The folder.
        path: PathBuf,
    },
    /// The agent's own files would count as VMs in standby.
    #[error("agent.standby_dir must not contain agent.state_dir; got {}", path.display())]
    StandbyDirOfState {
        /// The folder for VMs in standby.
        path: PathBuf,
    },
    /// Idle VMs cannot be put in standby.
    #[error("policy.{policy}.idle_standby needs agent.standby_dir")]
    IdleStandby {
        /// The policy.
        policy: String,
    },
    /// There is no program that would wake a VM.
    #[error("agent.wake_command must name a program")]
    WakeCommand,
    /// Other hosts cannot reach the address.
    #[error("agent.move_address must be the address of this host for others; got {address}")]
    MoveAddress {
        /// The address.
        address: IpAddr,
    },
    /// There is no program for received VMs.
    #[error(
        "agent.move_address needs agent.move_command, the program that starts a VMM for a received VM"
    )]
    MoveCommand,
    /// The folder depends on the working directory.
    #[error("agent.move_tls_dir must begin with /; got {}", path.display())]
    MoveKeys {
        /// The folder.
        path: PathBuf,
    },
    /// A rule for VMs has no effect.
    #[error("The settings have a rule without effect")]
    Rule(#[source] RuleFault),
    /// The reserve exceeds the machine's memory.
    #[error("host.reserve ({reserve}) must be less than this machine's memory ({total})")]
    Reserve {
        /// The reserve.
        reserve: Bytes,
        /// The machine's memory.
        total: Bytes,
    },
}

/// Reasons why a file is rejected.
#[derive(Clone, Debug, Error)]
pub enum SettingsFault {
    /// It is not TOML, or has unknown keys or invalid values.
    #[error(transparent)]
    Syntax(#[from] SyntaxFault),
    /// A section is unknown.
    #[error("unknown section `{section}`; known are {}{suggestion}", SECTIONS.join(", "))]
    Section {
        /// Its name.
        section: String,
        /// A section with a similar name, as part of the message.
        suggestion: String,
    },
}

/// The loaded settings and their files.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The settings.
    pub config: AgentConfig,
    /// The files in the order in which they were read; empty if all settings are defaults.
    pub files: Vec<PathBuf>,
}

/// Reads `file` and its drop-ins. A missing file is an error only if `required`.
///
/// # Errors
/// The first invalid file, or a contradiction between the files.
pub fn load(file: &Path, required: bool) -> Result<Loaded, LoadError> {
    let mut files = drop_ins(&file.with_extension("d"))?;
    if required || file.exists() {
        files.insert(0, file.to_owned());
    }
    let mut all = toml::Table::new();
    for path in &files {
        let text = fs::read_to_string(path).map_err(|source| LoadError::Read {
            path: path.clone(),
            source,
        })?;
        let table = parse(&text).map_err(|source| LoadError::Syntax {
            path: path.clone(),
            source,
        })?;
        merge(&mut all, table, "");
    }
    let config = split(all).map_err(|source| LoadError::Syntax {
        path: file.to_owned(),
        source,
    })?;
    check(&config)?;
    Ok(Loaded { config, files })
}

/// Like [`load`], and also checks the settings against the machine with the files `host`.
///
/// # Errors
/// As [`load`]. An unknown memory size is not an error here, because the agent reports it itself.
pub fn load_for(file: &Path, required: bool, host: &HostFiles) -> Result<Loaded, LoadError> {
    let loaded = load(file, required)?;
    if let Ok(total) = host.total() {
        loaded.config.check_machine(total)?;
    }
    Ok(loaded)
}

impl AgentConfig {
    /// Checks the settings against the machine.
    ///
    /// # Errors
    /// The reserve would leave no memory for VMs.
    pub fn check_machine(&self, total: Bytes) -> Result<(), LoadError> {
        let reserve = self.planning.reserve(total);
        if total > Bytes::ZERO && reserve >= total {
            return Err(LoadError::Reserve { reserve, total });
        }
        Ok(())
    }
}

fn drop_ins(folder: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let failed = |source| LoadError::Read {
        path: folder.to_owned(),
        source,
    };
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The contents of one file, after a check that it consists of settings.
fn parse(text: &str) -> Result<toml::Table, SettingsFault> {
    let table: toml::Table = text.parse().map_err(SyntaxFault::from)?;
    split(table.clone())?;
    Ok(table)
}

/// Separates the agent's own sections from the planner's.
fn split(mut table: toml::Table) -> Result<AgentConfig, SettingsFault> {
    fn take<T: Default + for<'de> Deserialize<'de>>(
        table: &mut toml::Table,
        name: &'static str,
    ) -> Result<T, SyntaxFault> {
        let section = table.remove(name).map(toml::Value::try_into);
        let section = section.transpose();
        Ok(section
            .map_err(|error| SyntaxFault::in_section(name, error))?
            .unwrap_or_default())
    }
    let unknown = table.keys().find(|name| !SECTIONS.contains(&name.as_str()));
    if let Some(section) = unknown {
        return Err(SettingsFault::Section {
            section: section.clone(),
            suggestion: api::suggestion_among(section, SECTIONS),
        });
    }
    Ok(AgentConfig {
        agent: take(&mut table, "agent")?,
        discovery: take(&mut table, "discovery")?,
        store: take(&mut table, "store")?,
        vms: take(&mut table, "vm")?,
        planning: Config::deserialize(table).map_err(SyntaxFault::from)?,
    })
}

fn merge(into: &mut toml::Table, from: toml::Table, prefix: &str) {
    for (key, value) in from {
        let path = format!("{prefix}{key}");
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => {
                merge(old, new, &format!("{path}."));
            }
            (Some(toml::Value::Array(old)), toml::Value::Array(new))
                if JOINED.contains(&path.as_str()) =>
            {
                old.extend(new);
            }
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

fn check_moves(agent: &AgentSection) -> Result<(), LoadError> {
    if let Some(address) = agent.move_address {
        if address.is_unspecified() || address.is_multicast() {
            return Err(LoadError::MoveAddress { address });
        }
        if agent.move_command.first().is_none_or(String::is_empty) {
            return Err(LoadError::MoveCommand);
        }
    }
    let keys = agent.move_tls_dir.as_ref();
    match keys.filter(|path| !path.is_absolute()) {
        Some(path) => Err(LoadError::MoveKeys { path: path.clone() }),
        None => Ok(()),
    }
}

fn check(config: &AgentConfig) -> Result<(), LoadError> {
    config.planning.check().map_err(LoadError::Config)?;
    let agent = &config.agent;
    let mut faults: Vec<_> = ranges::faults(ranges::entries("agent.", AGENT, agent)).collect();
    if agent.trigger_stall >= agent.trigger_window {
        faults.push(ConfigFault::TriggerOrder);
    }
    if agent.tls_certificate.is_some() != agent.tls_key.is_some() {
        return Err(LoadError::HalfOfTls);
    }
    let suits = |path: &Path| path.is_absolute() && !path.to_string_lossy().contains('"');
    if let Some(path) = agent.standby_dir.as_ref().filter(|path| !suits(path)) {
        let path = path.clone();
        return Err(LoadError::StandbyDir { path });
    }
    let contains_state = |path: &&PathBuf| agent.state_dir.starts_with(path);
    if let Some(path) = agent.standby_dir.as_ref().filter(contains_state) {
        let path = path.clone();
        return Err(LoadError::StandbyDirOfState { path });
    }
    let mut policies = config.planning.policy.iter();
    if agent.standby_dir.is_none()
        && let Some((policy, _)) = policies.find(|(_, policy)| policy.watches_idle())
    {
        let policy = policy.clone();
        return Err(LoadError::IdleStandby { policy });
    }
    if agent.wake_command.first().is_none_or(String::is_empty) {
        return Err(LoadError::WakeCommand);
    }
    check_moves(agent)?;
    if !faults.is_empty() {
        return Err(LoadError::Config(ConfigError::Faults(faults)));
    }
    Discovery::new(&config.discovery.sockets).map_err(LoadError::Pattern)?;
    config.store.check().map_err(LoadError::Store)?;
    rules::check(&config.vms, &config.planning.policy).map_err(LoadError::Rule)
}
