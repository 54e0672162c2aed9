//! The first measure: the guests' reporting policy. It costs guests least, because it takes only free memory.

use crate::config::{Config, ReportingConfig};
use crate::model::{FeatureLevel, HostState};

use super::view::View;
use super::{ActionKind, Reporting};

/// Percentage points below `churn_percent` at which a guest stops counting as churning.
const CHURN_BAND: u64 = 20;

/// The reporting policy for a VM, if it differs from the last requested one.
pub(super) fn lever(view: &View<'_>, state: HostState, config: &Config) -> Option<Reporting> {
    let reclaim = view.sample.reclaim?;
    let free = view.facts.level >= FeatureLevel::L2
        && view.facts.policy.reporting
        && view.facts.interlock.is_none();
    if !free || !reclaim.policy_in_effect || reclaim.inhibited {
        return None;
    }
    let way = if state > HostState::Green {
        Reporting::Eager
    } else if churns(view, &config.reporting) {
        Reporting::Calm
    } else {
        Reporting::Relaxed
    };
    (view.memory.reporting != Some(way)).then_some(way)
}

/// The action that requests it.
pub(super) fn action(way: Reporting, reporting: &ReportingConfig) -> ActionKind {
    ActionKind::Reporting {
        policy: match way {
            Reporting::Relaxed => reporting.relaxed,
            Reporting::Calm => reporting.calm,
            Reporting::Eager => reporting.eager,
        },
    }
}

fn churns(view: &View<'_>, reporting: &ReportingConfig) -> bool {
    let Some(reclaim) = view.sample.reclaim else {
        return false;
    };
    let limit = match view.memory.reporting {
        Some(Reporting::Calm) => reporting.churn_percent.saturating_sub(CHURN_BAND),
        _ => reporting.churn_percent,
    };
    // Memory that was discarded once and is still absent is not churn, so a minimum must have been discarded first.
    reclaim.discarded > view.facts.configured
        && reclaim.repopulated.ratio(reclaim.discarded) * 100.0 > limit as f64
}
