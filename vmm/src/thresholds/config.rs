//! The operator's settings, changed atomically.

use api::{ReclaimThresholds, ReclaimThresholdsChange, ReportingPolicy};

use super::ThresholdError;
use crate::alerts::{AlertList, Needs, Sources, Transition};
use crate::reporting_policy::{self, GuestPolicy};

/// Alerts with their states, and the policy.
#[derive(Clone, Debug, Default)]
pub(super) struct ThresholdConfig {
    alerts: AlertList,
    /// The operator's policy; until it is set, nothing is sent to any guest.
    policy: Option<ReportingPolicy>,
}

impl ThresholdConfig {
    /// Applies `change` atomically.
    pub(super) fn change(
        &mut self,
        change: &ReclaimThresholdsChange,
        now_ms: u64,
    ) -> Result<(), ThresholdError> {
        let mut next = self.clone();
        next.alerts
            .change(&change.remove_alerts, &change.alerts, now_ms)?;
        if let Some(change) = change.reporting_policy {
            let policy = change.applied_to(next.policy.unwrap_or_default());
            policy.check()?;
            next.policy = Some(policy);
        }
        *self = next;
        Ok(())
    }

    /// Clears everything.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Whether there is anything to evaluate.
    pub(super) fn has_alerts(&self) -> bool {
        !self.alerts.is_empty()
    }

    /// The data to read for an evaluation.
    pub(super) fn needs(&self) -> Needs {
        self.alerts.needs()
    }

    /// Evaluates every alert; at most one transition each.
    pub(super) fn step(&mut self, now_ms: u64, sources: &Sources) -> Vec<Transition> {
        self.alerts.step(now_ms, sources)
    }

    /// The policy, if one was set.
    pub(super) fn policy(&self) -> Option<ReportingPolicy> {
        self.policy
    }

    /// The representation in the API.
    pub(super) fn status(&self, now_ms: u64, guest: GuestPolicy) -> ReclaimThresholds {
        ReclaimThresholds {
            alerts: self.alerts.status(now_ms),
            reporting_policy: reporting_policy::status(self.policy.unwrap_or_default(), guest),
        }
    }
}
