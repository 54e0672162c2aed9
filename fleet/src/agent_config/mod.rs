//! The agent's settings: one TOML file with drop-ins.
//!
//! `agent.toml` is read first, then every `*.toml` in the folder `agent.d` next to it, by name; later values win. Only
//! the lists of sockets and of VM rules are concatenated, so that a package can install and remove its own file. Every
//! file is first checked separately, so that an error names its file.

mod load;
#[cfg(test)]
mod reference;
mod rules;
mod store;

#[cfg(test)]
mod tests;

pub use load::{LoadError, Loaded, SettingsFault, load, load_for};
pub use rules::RuleFault;
pub use store::{StoreFault, StoreSection};

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::ranges::{self, Entry, POLICY, Quantity, Range, Row, rows};
use crate::config::{Config, Millis, PolicyConfig};
use crate::model::{Bytes, VmPolicy};

/// Default path of the file.
pub const DEFAULT_FILE: &str = "/etc/ch-fleet/agent.toml";
/// Default path of the agent's socket.
pub const DEFAULT_SOCKET: &str = "/run/ch-fleet/agent.sock";

/// All settings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AgentConfig {
    /// `[agent]`
    pub agent: AgentSection,
    /// `[discovery]`
    pub discovery: DiscoverySection,
    /// `[store]`
    pub store: StoreSection,
    /// `[[vm]]`, first match wins.
    pub vms: Vec<VmRule>,
    /// All other sections: the settings of the planner.
    pub planning: Config,
}

/// `[agent]`: the agent itself. Read at the start; a reload does not change it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct AgentSection {
    /// Socket on which the agent accepts requests.
    pub socket: PathBuf,
    /// Folder for persistent state.
    pub state_dir: PathBuf,
    /// Address of the metrics and the page; without it, neither is served.
    pub listen: Option<SocketAddr>,
    /// Names of this host that clients of the page may use. Its own name and addresses are always allowed.
    pub listen_names: Vec<String>,
    /// File with the token that clients of the page must send. Without it, no token is required.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// File with the certificate of the page; without it, the page is served without TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_certificate: Option<PathBuf>,
    /// File with the key of the certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
    /// Time between two scans for sockets.
    pub scan: Millis,
    /// Time between two readings of the host.
    pub host: Millis,
    /// Stall within `trigger_window` after which the agent plans immediately.
    pub trigger_stall: Millis,
    /// Time over which the kernel adds up the stall.
    pub trigger_window: Millis,
    /// Treatment of the balloons when the agent ends.
    pub on_stop: OnStop,
    /// Folder for VMs in standby; without it, standby is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub standby_dir: Option<PathBuf>,
    /// Time limit of each request that saves a VM.
    pub standby_deadline: Millis,
    /// The VMM that `ch-fleet wake` starts, with arguments. `--api-socket` and `--restore` are added.
    pub wake_command: Vec<String>,
    /// Address of this host for VMs that other hosts send. Without it, this host neither sends nor receives VMs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub move_address: Option<IpAddr>,
    /// The first TCP port for them.
    pub move_port: u32,
    /// Number of these ports.
    pub move_ports: u32,
    /// The program that starts a VMM for a received VM, with arguments. `--api-socket` and the path are added.
    pub move_command: Vec<String>,
    /// Folder with the keys for moves with TLS; without it, they are not encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub move_tls_dir: Option<PathBuf>,
    /// Decide and report, but change nothing.
    pub dry_run: bool,
}

impl Default for AgentSection {
    fn default() -> Self {
        Self {
            socket: PathBuf::from(DEFAULT_SOCKET),
            state_dir: PathBuf::from("/var/lib/ch-fleet"),
            listen: None,
            listen_names: Vec::new(),
            token_file: None,
            tls_certificate: None,
            tls_key: None,
            scan: Millis::seconds(2),
            host: Millis::seconds(1),
            trigger_stall: Millis(150),
            trigger_window: Millis::seconds(1),
            on_stop: OnStop::Keep,
            standby_dir: None,
            standby_deadline: Millis::seconds(600),
            wake_command: vec!["cloud-hypervisor".to_owned()],
            move_address: None,
            move_port: 49152,
            move_ports: 64,
            move_command: Vec::new(),
            move_tls_dir: None,
            dry_run: false,
        }
    }
}

impl AgentSection {
    /// The read-only socket next to [`AgentSection::socket`]: `agent.read.sock` next to `agent.sock`.
    pub fn read_socket(&self) -> PathBuf {
        self.socket.with_extension("read.sock")
    }
}

/// The numbers of `[agent]`.
const AGENT: &[Row<AgentSection>] = rows! { AgentSection:
    scan = Range::Time(100, 3_600_000);
    host = Range::Time(50, 60_000);
    trigger_stall = Range::Time(1, 10_000);
    // The range that the kernel accepts (`kernel/sched/psi.c`: WINDOW_MIN_US, WINDOW_MAX_US).
    trigger_window = Range::Time(500, 10_000);
    standby_deadline = Range::Time(1000, 86_400_000);
    move_port = Range::Count(1024, 65_535);
    move_ports = Range::Count(1, 4096);
};

/// Treatment of the balloons when the agent ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum OnStop {
    /// They stay, so that a restart of the agent does not affect guests.
    #[default]
    Keep,
    /// They are emptied, because the guests are no longer managed.
    Restore,
}

/// `[discovery]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DiscoverySection {
    /// Patterns of API sockets.
    pub sockets: Vec<String>,
    /// Query every matching socket. Otherwise, the agent skips a socket whose process is known not to be a VMM, because a
    /// request would break a back end that serves a single connection.
    pub any_program: bool,
}

impl Default for DiscoverySection {
    fn default() -> Self {
        Self {
            sockets: vec!["/run/ch/*/api.sock".to_owned(), "/run/ch/*.sock".to_owned()],
            any_program: false,
        }
    }
}

/// `[[vm]]`: assigns a policy to VMs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct VmRule {
    /// Pattern of VM names.
    pub name: String,
    /// Name of the policy of these VMs.
    pub policy: String,
}

impl AgentConfig {
    /// The policy for a VM of this name: that of the first matching rule, otherwise the policy with the VM's name,
    /// otherwise `default`.
    pub fn policy_name(&self, vm: &str) -> &str {
        let rule = self
            .vms
            .iter()
            .find(|rule| glob::Pattern::new(&rule.name).is_ok_and(|pattern| pattern.matches(vm)));
        match rule {
            Some(rule) => &rule.policy,
            None => self
                .planning
                .policy
                .get_key_value(vm)
                .map_or("default", |(name, _)| name),
        }
    }

    /// Limits of a VM of `configured` bytes under its policy.
    pub fn vm_policy(&self, vm: &str, configured: Bytes) -> VmPolicy {
        self.planning.vm_policy(self.policy_name(vm), configured)
    }

    /// Whether VMs move to and from this host.
    pub(crate) fn receives_moves(&self) -> bool {
        self.agent.move_address.is_some() && !self.agent.dry_run
    }

    /// The policy by which a VM that is idle is put in standby; `None` if it never is.
    pub(crate) fn idle_policy(&self, vm: &str) -> Option<&PolicyConfig> {
        // Most hosts have none, and a name is compared with every rule.
        let policies = &self.planning.policy;
        if !policies.values().any(PolicyConfig::watches_idle) {
            return None;
        }
        let policy = self.planning.policy(self.policy_name(vm));
        policy.filter(|policy| policy.watches_idle())
    }

    /// All settings as TOML, including defaults.
    pub fn to_toml(&self) -> String {
        // Every section consists of tables and strings, which TOML can represent.
        let table = |value: Result<toml::Table, toml::ser::Error>| value.unwrap_or_default();
        let mut all = table(toml::Table::try_from(&self.planning));
        show_sizes(&mut all, &ranges::config(&self.planning));
        for (name, policy) in &self.planning.policy {
            let shown = all.get_mut("policy").and_then(|all| all.get_mut(name));
            if let Some(shown) = shown.and_then(toml::Value::as_table_mut) {
                show_sizes(shown, &ranges::entries("", POLICY, policy));
            }
        }
        let mut put =
            |name: &str, section| all.insert(name.to_owned(), toml::Value::Table(section));
        put("agent", table(toml::Table::try_from(&self.agent)));
        put("discovery", table(toml::Table::try_from(&self.discovery)));
        put("store", table(toml::Table::try_from(&self.store)));
        let rules: Vec<toml::Value> = self
            .vms
            .iter()
            .filter_map(|rule| toml::Value::try_from(rule).ok())
            .collect();
        if !rules.is_empty() {
            all.insert("vm".to_owned(), toml::Value::Array(rules));
        }
        all.to_string()
    }
}

/// Writes the sizes among `entries` with their units.
fn show_sizes(section: &mut toml::Table, entries: &[Entry]) {
    for entry in entries {
        let Quantity::Size(bytes @ 1..) = entry.value else {
            continue;
        };
        let (path, name) = entry.key.rsplit_once('.').unwrap_or(("", &entry.key));
        let table = path
            .split('.')
            .filter(|part| !part.is_empty())
            .try_fold(&mut *section, |table, part| {
                table.get_mut(part)?.as_table_mut()
            });
        if let Some(value) = table.and_then(|table| table.get_mut(name)) {
            *value = toml::Value::String(ranges::size(bytes));
        }
    }
}
