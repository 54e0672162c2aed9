//! `[thresholds]` and `[reporting]`: the host's states, and the guests' reporting policy in each.

use std::fmt;

use api::{ReportingPolicy, ReportingPolicyChange};
use device_facts::reporting_policy::Unit;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::model::{Bytes, Fraction, HostState};

/// Two values with a dead band between them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Band {
    /// The state begins when the free fraction of the usable memory is below this.
    pub enter: Fraction,
    /// The state ends when the free fraction is above this.
    pub leave: Fraction,
}

/// `[thresholds]`
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Thresholds {
    /// Getting scarce.
    pub yellow: Band,
    /// Scarce.
    pub orange: Band,
    /// About to run out.
    pub red: Band,
    /// Memory pressure at which yellow, orange and red begin. Each state ends at half of its value. The pressure is
    /// the mean of 10 s of PSI `some`, as a fraction of time.
    pub pressure: [Fraction; 3],
    /// Pressure counts only while less than this fraction of the usable memory is free. With more free memory, the VMs
    /// do not cause the pressure, and taking memory from them would not help.
    pub pressure_below: Fraction,
}

impl Default for Thresholds {
    fn default() -> Self {
        let band = |enter, leave| Band {
            enter: Fraction(enter),
            leave: Fraction(leave),
        };
        Self {
            yellow: band(0.20, 0.25),
            orange: band(0.10, 0.15),
            red: band(0.05, 0.08),
            pressure: [Fraction(0.01), Fraction(0.05), Fraction(0.20)],
            pressure_below: Fraction(0.5),
        }
    }
}

impl Thresholds {
    /// The values of a state; green has none.
    pub fn band(&self, state: HostState) -> Option<Band> {
        match state {
            HostState::Green => None,
            HostState::Yellow => Some(self.yellow),
            HostState::Orange => Some(self.orange),
            HostState::Red => Some(self.red),
        }
    }
}

/// `[reporting]`: the first measure. It costs guests least, because it takes only memory that is free in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "ReportingChange")]
pub struct ReportingConfig {
    /// While memory is plentiful: do not report hot memory.
    pub relaxed: ReportingPolicy,
    /// While memory is plentiful, for guests that take back most of what they report: report only memory that stayed
    /// free for long.
    pub calm: ReportingPolicy,
    /// While memory is scarce: report everything immediately.
    pub eager: ReportingPolicy,
    /// Ratio of repopulated to discarded memory, percent, above which a guest counts as churning.
    pub churn_percent: u64,
}

/// `[reporting]` in a file, which contains only settings that differ from the defaults.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ReportingChange {
    relaxed: PolicyChange,
    calm: PolicyChange,
    eager: PolicyChange,
    churn_percent: Option<u64>,
}

impl From<ReportingChange> for ReportingConfig {
    fn from(change: ReportingChange) -> Self {
        let default = Self::default();
        Self {
            relaxed: change.relaxed.0.applied_to(default.relaxed),
            calm: change.calm.0.applied_to(default.calm),
            eager: change.eager.0.applied_to(default.eager),
            churn_percent: change.churn_percent.unwrap_or(default.churn_percent),
        }
    }
}

/// Settings of a reporting policy in a file, where a size may have a unit.
#[derive(Default)]
struct PolicyChange(ReportingPolicyChange);

impl<'de> Deserialize<'de> for PolicyChange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PolicyVisitor)
    }
}

struct PolicyVisitor;

impl<'de> Visitor<'de> for PolicyVisitor {
    type Value = PolicyChange;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the settings of a reporting policy")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<PolicyChange, A::Error> {
        let mut change = ReportingPolicyChange::default();
        while let Some(key) = map.next_key::<String>()? {
            let setting = ReportingPolicy::TABLE
                .iter()
                .find(|setting| setting.name == key)
                .ok_or_else(|| A::Error::unknown_field(&key, ReportingPolicy::NAMES))?;
            let value = match setting.unit {
                Unit::Bytes => map.next_value::<Bytes>()?.0,
                Unit::Order | Unit::Count | Unit::Ms => map.next_value()?,
            };
            *setting.slot(&mut change) = Some(value);
        }
        Ok(PolicyChange(change))
    }
}

impl ReportingConfig {
    /// Each policy with its key.
    pub(super) fn policies(&self) -> [(&'static str, &ReportingPolicy); 3] {
        [
            ("relaxed", &self.relaxed),
            ("calm", &self.calm),
            ("eager", &self.eager),
        ]
    }
}

impl Default for ReportingConfig {
    fn default() -> Self {
        let policy = ReportingPolicy::default();
        Self {
            relaxed: policy,
            calm: ReportingPolicy {
                age_ms_min: 10_000,
                // The guest's interval must exceed the required age of free blocks, otherwise it never finds any due.
                delay_ms_max: 20_000,
                ..policy
            },
            eager: ReportingPolicy {
                pending_blocks: 1,
                delay_ms_max: 200,
                ..policy
            },
            churn_percent: 80,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn reporting_policy_changes_only_named_settings_and_reads_sizes_with_units() {
        let text = "[reporting.calm]\nbytes_per_second_max = \"64MiB\"\n\
                    [reporting.eager]\nbytes_per_second_max = 4096";
        let reporting = Config::from_toml(text).unwrap().reporting;
        let default = ReportingConfig::default();
        let expected = ReportingPolicy {
            bytes_per_second_max: 64 << 20,
            ..default.calm
        };
        assert_eq!(reporting.calm, expected);
        assert_eq!(reporting.eager.bytes_per_second_max, 4096);
        assert_eq!(reporting.relaxed, default.relaxed);
    }

    #[test]
    fn misspelt_setting_of_a_reporting_policy_is_rejected_by_name() {
        let error = Config::from_toml("[reporting.calm]\nage_ms = 4").unwrap_err();
        let text = api::error_line(&error);
        assert!(text.contains("unknown field `age_ms`"), "{text}");
    }
}
