//! Conditions between values of a configuration.

use api::PolicyError;

use super::{Config, Thresholds, ranges};
use crate::model::HostState;

/// A contradiction between keys.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigFault {
    /// The `leave` value of a state is not above its `enter` value.
    #[error("thresholds.{0}: leave must be above enter")]
    BandReversed(HostState),
    /// A worse state begins at more free memory than a better one.
    #[error("thresholds.{0}: must be below the values of the preceding state")]
    BandOrder(HostState),
    /// The pressures are not ascending.
    #[error("thresholds.pressure: the three values must increase")]
    PressureOrder,
    /// A value is out of range.
    #[error("{key} must be {range}")]
    Range {
        /// The key.
        key: String,
        /// The valid range.
        range: String,
    },
    /// A policy's minimum exceeds its maximum.
    #[error("policy.{0}: max must not be below min or floor")]
    PolicyOrder(String),
    /// The VMM rejects this reporting policy, so guests would never follow it.
    #[error("reporting.{policy}: {low} must not be above {high}")]
    ReportingOrder {
        /// The policy.
        policy: &'static str,
        /// The setting that is above the other.
        low: &'static str,
        /// The other one.
        high: &'static str,
    },
    /// Giving and taking would alternate forever.
    #[error("control.give_above must be between thresholds.orange.leave and control.relax_above")]
    GiveOrder,
    /// Idle guests would receive memory that is then taken from them.
    #[error("control.relax_above must be above thresholds.yellow.leave")]
    RelaxOrder,
    /// A guest would keep less memory than the threshold of suffering.
    #[error(
        "control.suffer must be below control.keep, and control.suffer_min below control.keep_min"
    )]
    KeepOrder,
    /// The kernel rejects the trigger.
    #[error("agent.trigger_stall must be shorter than agent.trigger_window")]
    TriggerOrder,
    /// The interval between samples exceeds the maximum age of a sample.
    #[error("control.sample must be shorter than control.sample_age_max")]
    SampleAge,
}

/// All contradictions.
pub(super) fn faults(config: &Config) -> Vec<ConfigFault> {
    let mut faults = Vec::new();
    bands(&config.thresholds, &mut faults);
    let control = &config.control;
    faults.extend(ranges::faults(ranges::config(config)));
    for (name, policy) in &config.policy {
        let entries = ranges::entries(&format!("policy.{name}."), ranges::POLICY, policy);
        faults.extend(ranges::faults(entries));
        if policy.contradicts_itself() {
            faults.push(ConfigFault::PolicyOrder(name.clone()));
        }
    }
    for (name, policy) in config.reporting.policies() {
        if let Err(PolicyError::Reversed { low, high, .. }) = policy.check_order() {
            faults.push(ConfigFault::ReportingOrder {
                policy: name,
                low,
                high,
            });
        }
    }
    if control.give_above < config.thresholds.orange.leave
        || control.give_above > control.relax_above
    {
        faults.push(ConfigFault::GiveOrder);
    }
    if control.relax_above <= config.thresholds.yellow.leave {
        faults.push(ConfigFault::RelaxOrder);
    }
    if control.suffer >= control.keep || control.suffer_min >= control.keep_min {
        faults.push(ConfigFault::KeepOrder);
    }
    if control.sample >= control.sample_age_max {
        faults.push(ConfigFault::SampleAge);
    }
    faults
}

fn bands(thresholds: &Thresholds, faults: &mut Vec<ConfigFault>) {
    let bands = [
        (HostState::Yellow, thresholds.yellow),
        (HostState::Orange, thresholds.orange),
        (HostState::Red, thresholds.red),
    ];
    for (state, band) in bands {
        if band.leave <= band.enter {
            faults.push(ConfigFault::BandReversed(state));
        }
    }
    for pair in bands.windows(2) {
        let ((_, better), (state, worse)) = (pair[0], pair[1]);
        if worse.enter >= better.enter || worse.leave >= better.leave {
            faults.push(ConfigFault::BandOrder(state));
        }
    }
    if !thresholds.pressure.is_sorted() {
        faults.push(ConfigFault::PressureOrder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Millis;
    use crate::model::{Bytes, Fraction};

    #[test]
    fn every_contradiction_is_told_at_once() {
        let mut config = Config::default();
        config.thresholds.yellow.leave = Fraction(0.1);
        config.control.plan = Millis(0);
        config.control.keep_min = Bytes::ZERO;
        config.control.step_part = Fraction(5.0);
        let faults = faults(&config);
        assert!(faults.contains(&ConfigFault::BandReversed(HostState::Yellow)));
        assert!(faults.contains(&range("control.plan", "50ms to 1min")));
        assert!(faults.contains(&ConfigFault::KeepOrder));
        assert!(faults.contains(&range("control.step_part", "0.1% to 100%")));
    }

    fn range(key: &str, range: &str) -> ConfigFault {
        ConfigFault::Range {
            key: key.to_owned(),
            range: range.to_owned(),
        }
    }

    #[test]
    fn policy_that_leaves_a_guest_nothing_is_refused_by_name() {
        for (text, word) in [
            ("max = \"4\"", "policy.default.max must be 64MiB"),
            ("max = \"1GiB\"\nfloor = \"2GiB\"", "policy.default: max"),
            ("max = \"40%\"\nmin = \"60%\"", "policy.default: max"),
            ("max = \"1GiB\"\nmin = \"2GiB\"", "policy.default: max"),
        ] {
            let error = Config::from_toml(&format!("[policy.default]\n{text}")).unwrap_err();
            assert!(error.to_string().contains(word), "{text}: {error}");
        }
    }
}
