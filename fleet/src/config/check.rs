//! Checks conditions between values of a configuration.

use api::PolicyError;

use super::{Config, ConfigError, ConfigFault, Thresholds, ranges};
use crate::model::HostState;

impl Config {
    /// Checks that the values are consistent.
    ///
    /// # Errors
    /// [`ConfigError::Faults`] with all contradictions, so that an operator can correct the file in one pass.
    pub fn check(&self) -> Result<(), ConfigError> {
        let faults = faults(self);
        if faults.is_empty() {
            Ok(())
        } else {
            Err(ConfigError::Faults(faults))
        }
    }
}

/// All contradictions.
fn faults(config: &Config) -> Vec<ConfigFault> {
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
