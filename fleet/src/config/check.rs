//! What must hold between values of a configuration.

use super::{Config, Thresholds};
use crate::model::HostState;

/// A contradiction, with the keys it is in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigFault {
    /// A state would be left before it is entered.
    #[error("thresholds.{0}: leave must be above enter")]
    BandReversed(HostState),
    /// A worse state begins at more free memory than a better one.
    #[error("thresholds.{0}: must lie below the values of the state before it")]
    BandOrder(HostState),
    /// Pressures must rise.
    #[error("thresholds.pressure: the three values must rise")]
    PressureOrder,
    /// A part of a whole is not between none and all.
    #[error("{0} must lie between 0% and 100%")]
    NoPart(&'static str),
    /// A time or size that must not be zero is.
    #[error("{0} must not be zero")]
    Zero(&'static str),
    /// Giving and taking would chase each other.
    #[error("control.give_above must lie between thresholds.orange.leave and control.relax_above")]
    GiveOrder,
    /// Idle guests would be given what is then taken from them.
    #[error("control.relax_above must lie above thresholds.yellow.leave")]
    RelaxOrder,
    /// A guest would be left with less than makes it suffer.
    #[error("control.suffer must be smaller than control.keep, and suffer_min than keep_min")]
    KeepOrder,
    /// The loop would be slower than its samples are allowed to be old.
    #[error("control.sample must be shorter than control.sample_age_max")]
    SampleAge,
}

/// Everything that is wrong.
pub(super) fn faults(config: &Config) -> Vec<ConfigFault> {
    let mut faults = Vec::new();
    bands(&config.thresholds, &mut faults);
    let control = &config.control;
    for (name, part) in [
        ("control.dead_band_part", control.dead_band_part),
        ("control.step_part", control.step_part),
        ("control.keep", control.keep),
        ("control.suffer", control.suffer),
        ("control.repopulate_max", control.repopulate_max),
        ("control.give_above", control.give_above),
        ("control.relax_above", control.relax_above),
        ("control.burst_quantile", control.burst_quantile),
        ("control.burst_prior", control.burst_prior),
        ("admission.above_min", config.admission.above_min),
        (
            "thresholds.pressure_below",
            config.thresholds.pressure_below,
        ),
    ] {
        if !(0.0..=1.0).contains(&part.0) {
            faults.push(ConfigFault::NoPart(name));
        }
    }
    for (name, value) in [
        ("control.plan", control.plan.0),
        ("control.sample", control.sample.0),
        ("control.sample_deadline", control.sample_deadline.0),
        ("control.step", control.step.0),
        ("control.stuck_after", control.stuck_after.0),
        ("control.react", control.react.0),
    ] {
        if value == 0 {
            faults.push(ConfigFault::Zero(name));
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
        assert!(faults.contains(&ConfigFault::Zero("control.plan")));
        assert!(faults.contains(&ConfigFault::KeepOrder));
        assert!(faults.contains(&ConfigFault::NoPart("control.step_part")));
    }
}
