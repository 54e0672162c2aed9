//! The first lever: how guests report free memory. It costs them least, because what it takes is free.

use crate::config::{Config, ReportingConfig};
use crate::model::{FeatureLevel, HostState};

use super::view::View;
use super::{ActionKind, Reporting};

/// Percentage points below `churn_percent` at which a guest is no churner any more.
const CHURN_BAND: u64 = 20;

/// The way of reporting that a VM should be asked for, if that is another one than it was asked for last.
pub(super) fn lever(view: &View<'_>, state: HostState, config: &Config) -> Option<Reporting> {
    let reclaim = view.sample.reclaim?;
    let free = view.facts.level >= FeatureLevel::L2
        && view.facts.policy.reporting
        && view.facts.interlock.is_none();
    if !free || !reclaim.policy_in_effect {
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

/// The action that asks for it.
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
    // What was discarded once and is still away does not make a churner, so a little must have gone round first.
    reclaim.discarded > view.facts.configured
        && reclaim.repopulated.ratio(reclaim.discarded) * 100.0 > limit as f64
}
