//! `GET` and `PUT /vm.reclaim-thresholds`: alerts, and the policy for the guest's reporting.
//!
//! Alerts are named rules on one figure each. When a figure crosses a rule's values, the event monitor reports it once,
//! and the response shows the new state. The reporting policy needs a guest that supports it; the response shows
//! whether this guest does.

use std::collections::BTreeMap;

use api_macros::{Words, section};
use device_facts::reporting_policy::Unit;
use device_facts::{ReportingPolicy, ReportingPolicyChange};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::bounded::list;
use crate::options::{OptionError, Options, parse_bytes};

/// Alerts with their states, and the reporting policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({
    "alerts": [{
        "name": "big", "figure": "resident_bytes", "direction": "above", "enter": 2_u64 << 30, "leave": 3 << 29,
        "duration_ms": 5000, "active": false, "since_ms": 61000, "value": 114_294_784, "times_entered": 0,
    }],
    "reporting_policy": ReportingPolicyStatus::example(),
})))]
pub struct ReclaimThresholds {
    /// The rules with their states, in order of creation.
    pub alerts: Vec<AlertStatus>,
    /// The host's settings for free page reporting, and whether the guest follows them.
    pub reporting_policy: ReportingPolicyStatus,
}

/// Side of its values on which an alert is active.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, Words, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AlertDirection {
    /// Active when the figure is above `enter`.
    #[default]
    #[word("above")]
    Above,
    /// Active when the figure is below `enter`.
    #[word("below")]
    Below,
}

/// A named rule on one figure.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct AlertRule {
    /// Name in events; unique in a VM.
    pub name: String,
    /// A number of `vm.reclaim-stats` by its path (`resident_bytes`, `report/failed_bytes`), or a counter of
    /// `vm.counters` (`_disk0/read_ops`).
    pub figure: String,
    /// Side of `enter` on which the alert is active.
    pub direction: AlertDirection,
    /// The alert becomes active when the figure is beyond this value, in the figure's unit.
    pub enter: u64,
    /// The alert ends when the figure is at this value or on its safe side.
    pub leave: u64,
    /// Time for which the figure must be beyond `enter` before the alert becomes active, ms.
    pub duration_ms: u64,
}

/// An alert rule and its state. Between `enter` and `leave` lies the dead band, in which the state does not change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct AlertStatus {
    /// The rule.
    #[serde(flatten)]
    pub rule: AlertRule,
    /// Whether the alert is active.
    pub active: bool,
    /// Time since the state last changed, ms.
    pub since_ms: u64,
    /// The figure at the last evaluation; absent while the figure is unavailable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<u64>,
    /// Number of times the alert became active since the rule was created.
    pub times_entered: u64,
}

/// The policy and whether this guest follows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct ReportingPolicyStatus {
    /// The policy.
    #[serde(flatten)]
    pub policy: ReportingPolicy,
    /// True if the guest has read the policy and follows all of it.
    pub in_effect: bool,
    /// Reason why `in_effect` is false; absent if it is true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Each setting by name, and the other requests to the guest: `pause`, `report_now` and `report_again`.
    #[serde(default)]
    pub settings: BTreeMap<String, SettingStatus>,
}

impl ReportingPolicyStatus {
    /// The default policy, and a guest that does not follow it. For brevity, it has only one setting.
    fn example() -> Self {
        let reason = "the guest's driver does not accept VIRTIO_BALLOON_F_REPORTING_POLICY";
        let not_followed = SettingStatus {
            in_effect: false,
            reason: Some(reason.to_owned()),
        };
        Self {
            policy: ReportingPolicy::default(),
            in_effect: false,
            reason: not_followed.reason.clone(),
            settings: [(ReportingPolicy::NAMES[0].to_owned(), not_followed)].into(),
        }
    }
}

/// Whether this guest follows one setting.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct SettingStatus {
    /// True if the guest follows it.
    pub in_effect: bool,
    /// Reason why `in_effect` is false; absent if it is true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Changes of alerts and reporting policy. Absent fields stay unchanged. Fields that only the response of `GET` has are
/// rejected, as all unknown keys are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({
    "remove_alerts": ["old"],
    "alerts": [{
        "name": "big", "figure": "resident_bytes", "direction": "above", "enter": 2_u64 << 30, "leave": 3 << 29,
    }],
    "reporting_policy": {"delay_ms_max": 100},
})))]
pub struct ReclaimThresholdsChange {
    /// Names of alerts to remove, before others are created.
    #[serde(
        default,
        deserialize_with = "list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub remove_alerts: Vec<String>,
    /// Alerts to create, or to change if the name exists.
    #[serde(
        default,
        deserialize_with = "list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub alerts: Vec<AlertChange>,
    /// Settings of the policy to change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reporting_policy: Option<ReportingPolicyChange>,
}

/// Changes of one alert, which is created if none has this name. A new alert needs `figure`, `direction` and `enter`.
#[section(
    option = "set",
    about = "Set an alert or the reporting policy:",
    parse = "parse_one"
)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlertChange {
    /// Name in events; unique in a VM.
    #[key("<name>", required)]
    pub name: String,
    /// A number of `vm.reclaim-stats` by its path, or a counter of `vm.counters`.
    #[key("<figure>")]
    pub figure: Option<String>,
    /// Side of `enter` on which the alert is active.
    #[key]
    pub direction: Option<AlertDirection>,
    /// The alert becomes active when the figure is beyond this value.
    #[key("<value>", read = parse_bytes)]
    pub enter: Option<u64>,
    /// The alert ends when the figure is at this value or on its safe side.
    #[key("<value>", read = parse_bytes)]
    pub leave: Option<u64>,
    /// Time for which the figure must be beyond `enter` before the alert becomes active, ms.
    #[key("<ms>")]
    pub duration_ms: Option<u64>,
}

impl ReclaimThresholdsChange {
    /// Syntax of `ch-remote reclaim-thresholds --set`.
    pub fn syntax() -> String {
        format!(
            "{} or \"{}\"",
            AlertChange::syntax(),
            ReportingPolicy::syntax()
        )
    }

    /// Reads one `--set`: an alert if there is a `name`, otherwise settings of the policy. Values and bytes accept size
    /// suffixes.
    ///
    /// # Errors
    /// An unknown key, a malformed value, or keys of both kinds.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let alert = AlertChange::keys();
        let alert_keys = alert.names().to_vec();
        let options = Options::parse("set", text, alert.and(ReportingPolicy::NAMES))?;
        let given = |keys: &[&'static str]| keys.iter().any(|key| options.text(key).is_some());
        if given(&["name"]) {
            let alerts = vec![AlertChange::parse_one(text)?];
            return Ok(Self {
                alerts,
                ..Self::default()
            });
        }
        if given(&alert_keys) || !given(ReportingPolicy::NAMES) {
            return Err(options.missing("name"));
        }
        Ok(Self {
            reporting_policy: Some(policy_change(&options)?),
            ..Self::default()
        })
    }

    /// Adds another change, which takes precedence if both set the same thing.
    pub fn extend(&mut self, other: Self) {
        self.remove_alerts.extend(other.remove_alerts);
        self.alerts.extend(other.alerts);
        let Some(policy) = other.reporting_policy else {
            return;
        };
        self.reporting_policy = Some(policy.or(self.reporting_policy.unwrap_or_default()));
    }
}

fn policy_change(options: &Options) -> Result<ReportingPolicyChange, OptionError> {
    let mut change = ReportingPolicyChange::default();
    for setting in ReportingPolicy::TABLE {
        *setting.slot(&mut change) = match setting.unit {
            Unit::Bytes => options.read(setting.name, parse_bytes)?,
            Unit::Order | Unit::Count | Unit::Ms => options.get(setting.name)?,
        };
    }
    Ok(change)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn set_with_a_name_is_an_alert_and_sizes_take_suffixes() {
        let change = ReclaimThresholdsChange::parse(
            "name=big,figure=resident_bytes,direction=above,enter=2G,leave=1G,duration_ms=5000",
        )
        .unwrap();
        assert_eq!(
            serde_json::to_string(&change).unwrap(),
            r#"{"alerts":[{"name":"big","figure":"resident_bytes","direction":"above","enter":2147483648,"leave":1073741824,"duration_ms":5000}]}"#
        );
    }

    #[test]
    fn sets_of_the_policy_add_up_and_the_last_one_wins() {
        let mut change = ReclaimThresholdsChange::parse("order_min=9,delay_ms_max=10").unwrap();
        let more = "delay_ms_max=20,bytes_per_second_max=1M";
        change.extend(ReclaimThresholdsChange::parse(more).unwrap());
        change.extend(ReclaimThresholdsChange::default());
        assert_eq!(
            serde_json::to_string(&change).unwrap(),
            r#"{"reporting_policy":{"order_min":9,"delay_ms_max":20,"bytes_per_second_max":1048576}}"#
        );
    }

    #[test]
    fn set_that_is_neither_or_both_is_refused() {
        for text in [
            "",
            "enter=1",
            "figure=x,order_min=1",
            "name=a,order_min=1",
            "name=a,direction=beside",
            "name=a,enter=-1",
            "order_min=many",
            "no_such_key=1",
        ] {
            assert!(ReclaimThresholdsChange::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn answer_is_a_valid_body_of_a_change() {
        let answer = ReclaimThresholds {
            alerts: vec![AlertStatus {
                rule: AlertRule {
                    name: "a".to_owned(),
                    figure: "resident_bytes".to_owned(),
                    direction: AlertDirection::Below,
                    enter: 1,
                    leave: 2,
                    duration_ms: 3,
                },
                active: true,
                ..AlertStatus::default()
            }],
            ..ReclaimThresholds::default()
        };
        let text = serde_json::to_string(&answer).unwrap();
        let change: ReclaimThresholdsChange = serde_json::from_str(&text).unwrap();
        let alert = &change.alerts[0];
        assert_eq!(alert.direction, Some(AlertDirection::Below));
        assert_eq!(
            (alert.enter, alert.leave, alert.duration_ms),
            (Some(1), Some(2), Some(3))
        );
        assert_eq!(change.reporting_policy.unwrap().pending_blocks, Some(16));
    }
}
