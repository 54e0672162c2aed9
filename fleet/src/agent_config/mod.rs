//! The agent's files: one TOML file with drop-ins beside it.
//!
//! `agent.toml` is read first, then every `*.toml` in the folder `agent.d` beside it, by name; later values win. Only
//! the lists of sockets and of VM rules are joined, so that a package can install and remove its own file. Every file
//! is first checked alone, so that an error names its file.

mod load;
mod reference;
mod rules;
mod store;

#[cfg(test)]
mod tests;

pub use load::{LoadError, Loaded, load, load_for};
pub use reference::reference;
pub use rules::RuleFault;
pub use store::{StoreFault, StoreSection};

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::ranges::{Range, Row, rows};
use crate::config::{Config, Millis};
use crate::model::{Bytes, VmPolicy};

/// Where the file is unless something else is said.
pub const DEFAULT_FILE: &str = "/etc/ch-fleet/agent.toml";
/// Where the agent takes orders unless something else is said.
pub const DEFAULT_SOCKET: &str = "/run/ch-fleet/agent.sock";

/// Everything that is configured.
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
    /// All other sections: what decisions depend on.
    pub planning: Config,
}

/// `[agent]`: the agent itself. Read at start; a reload leaves it as it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentSection {
    /// Socket on which the agent takes orders.
    pub socket: PathBuf,
    /// Folder for what must outlive the agent.
    pub state_dir: PathBuf,
    /// Address of the metrics and the page; nothing is served without.
    pub listen: Option<SocketAddr>,
    /// Names of this host besides its own and its addresses by which clients may ask for the page.
    pub listen_names: Vec<String>,
    /// File with the token that clients of the page must have; none is asked for without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// File with the certificate of the page; it is served without TLS if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_certificate: Option<PathBuf>,
    /// File with the key of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
    /// Time between two looks for sockets.
    pub scan: Millis,
    /// Time between two readings of the host.
    pub host: Millis,
    /// Stall within `trigger_window` that makes the agent plan at once.
    pub trigger_stall: Millis,
    /// See `trigger_stall`.
    pub trigger_window: Millis,
    /// What becomes of the balloons when the agent ends.
    pub on_stop: OnStop,
    /// Decide and tell, and change nothing.
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
            dry_run: false,
        }
    }
}

impl AgentSection {
    /// The socket beside [`AgentSection::socket`] for those who only look: `agent.read.sock` beside `agent.sock`.
    pub fn read_socket(&self) -> PathBuf {
        self.socket.with_extension("read.sock")
    }
}

/// The numbers of `[agent]`.
const AGENT: &[Row<AgentSection>] = rows! { AgentSection:
    scan = Range::Time(100, 3_600_000);
    host = Range::Time(50, 60_000);
    trigger_stall = Range::Time(1, 10_000);
    // What the kernel takes (`kernel/sched/psi.c`: WINDOW_MIN_US, WINDOW_MAX_US).
    trigger_window = Range::Time(500, 10_000);
};

/// What becomes of the balloons when the agent ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnStop {
    /// They stay: a restart of the agent must not be felt.
    #[default]
    Keep,
    /// They are emptied: nobody looks after the guests any more.
    Restore,
}

/// `[discovery]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiscoverySection {
    /// Patterns of API sockets.
    pub sockets: Vec<String>,
    /// Ask at every socket that matches. Otherwise one whose process is known and is no VMM is left alone: a back end
    /// that serves a single connection would not survive a request.
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

/// `[[vm]]`: which policy a VM gets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRule {
    /// Pattern of names.
    pub name: String,
    /// Name of a `[policy.…]`.
    pub policy: String,
}

impl AgentConfig {
    /// The policy for a VM of this name: that of the first rule that matches, else the one called as the VM is, else
    /// `default`.
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

    /// Checks the settings against the machine that they are for.
    ///
    /// # Errors
    /// Nothing of the machine would be left to hand out.
    pub fn check_machine(&self, total: Bytes) -> Result<(), LoadError> {
        let reserve = self.planning.reserve(total);
        if total > Bytes::ZERO && reserve >= total {
            return Err(LoadError::Reserve { reserve, total });
        }
        Ok(())
    }

    /// All settings as TOML, with what was left to the defaults.
    pub fn to_toml(&self) -> String {
        // Every section is made of plain tables and texts, all of which TOML can hold.
        let table = |value: Result<toml::Table, toml::ser::Error>| value.unwrap_or_default();
        let mut all = table(toml::Table::try_from(&self.planning));
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
