//! The operator's settings as TOML, with defaults for everything.
//!
//! A file contains only values that differ from the defaults. Unknown keys are errors, so that a misspelt limit is not
//! silently ignored. Sizes, times and fractions are written with their units (`"256MiB"`, `"10s"`, `"15%"`).
//! `docs/fleet-simulation.md` has measurements with the defaults.

mod check;
mod control;
mod fault;
mod millis;
mod policy;
pub(crate) mod ranges;
mod safety;
mod thresholds;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use control::{AdmissionConfig, ControlConfig, LastResortConfig};
pub use fault::{ConfigError, ConfigFault, SyntaxFault};
pub use millis::Millis;
pub use policy::PolicyConfig;
pub use safety::{Safety, SafetyRule};
pub use thresholds::{Band, ReportingConfig, Thresholds};

use crate::model::{Amount, Bytes, Fraction, VmPolicy};

/// All settings of the planner.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The host's memory.
    pub host: HostConfig,
    /// When a host enters and leaves each state.
    pub thresholds: Thresholds,
    /// The guests' reporting policies, while memory is plentiful and while it is scarce.
    pub reporting: ReportingConfig,
    /// Speed and limits of the control loop.
    pub control: ControlConfig,
    /// Conditions for admission.
    pub admission: AdmissionConfig,
    /// Measures when nothing else helps.
    pub last_resort: LastResortConfig,
    /// Limits and weights by name; `default` applies to all other VMs.
    pub policy: BTreeMap<String, PolicyConfig>,
}

/// `[host]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct HostConfig {
    /// Memory that is never reserved for VMs.
    pub reserve: Amount,
    /// Control group of the VMs, below `/sys/fs/cgroup`. If its limit is smaller than the machine's memory, the limit
    /// is "the host".
    pub cgroup: Option<String>,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            reserve: Amount::Part(Fraction(0.03)),
            cgroup: None,
        }
    }
}

impl Config {
    /// Reads a configuration and checks it.
    ///
    /// # Errors
    /// [`ConfigError::Syntax`] with the place, or [`ConfigError::Faults`] with all errors.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(SyntaxFault::from)?;
        config.check()?;
        Ok(config)
    }

    /// The reserve of a host of this size.
    pub fn reserve(&self, host: Bytes) -> Bytes {
        self.host.reserve.of(host).min(host)
    }

    /// Memory that must stay free after a new VM's start, so that the host does not enter the state in which the other
    /// VMs' caches are taken.
    pub fn newcomers_leave(&self, usable: Bytes) -> Bytes {
        usable.part(self.thresholds.orange.enter)
    }

    /// The policy called `name`; if there is none of that name, `default`.
    pub(crate) fn policy(&self, name: &str) -> Option<&PolicyConfig> {
        self.policy.get(name).or_else(|| self.policy.get("default"))
    }

    /// Limits of a VM of `configured` bytes under the policy called `name`; if there is none of that name, `default` or
    /// the built-in values.
    pub fn vm_policy(&self, name: &str, configured: Bytes) -> VmPolicy {
        let policy = self.policy(name).cloned().unwrap_or_default();
        policy.resolve(configured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PriorityClass;

    #[test]
    fn defaults_hold() {
        Config::default().check().unwrap();
        assert_eq!(Config::from_toml("").unwrap(), Config::default());
    }

    #[test]
    fn file_changes_only_what_it_names() {
        let config = Config::from_toml(
            r#"
            [host]
            reserve = "2GiB"
            [thresholds]
            yellow = { enter = "30%", leave = 0.35 }
            [control]
            plan = "500ms"
            [policy.default]
            min = "1GiB"
            [policy.db]
            min = "75%"
            class = "high"
            "#,
        )
        .unwrap();
        assert_eq!(config.reserve(Bytes::gib(64)), Bytes::gib(2));
        assert_eq!(config.thresholds.yellow.leave, Fraction(0.35));
        assert_eq!(config.thresholds.red, Thresholds::default().red);
        assert_eq!(config.control.plan, Millis(500));
        assert_eq!(config.vm_policy("web", Bytes::gib(4)).min, Bytes::gib(1));
        let db = config.vm_policy("db", Bytes::gib(4));
        assert_eq!((db.min, db.class), (Bytes::gib(3), PriorityClass::High));
    }

    #[test]
    fn misspelt_key_is_an_error() {
        assert!(Config::from_toml("[control]\nplam = \"1s\"").is_err());
    }

    #[test]
    fn written_configuration_reads_back() {
        let mut config = Config::default();
        config
            .policy
            .insert("default".into(), PolicyConfig::default());
        let text = toml::to_string(&config).unwrap();
        assert_eq!(Config::from_toml(&text).unwrap(), config);
    }
}
