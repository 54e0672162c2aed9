//! All thresholds of a VM: changed as a whole or not at all, looked at as a whole.

use std::collections::BTreeSet;

use api::{
    AlertChange, AlertDirection, AlertRule, ReclaimThresholds, ReclaimThresholdsChange,
    ReportingPolicy,
};

use super::alert::{Alert, Transition};
use super::error::{AlertFault, ThresholdError};
use super::figure::{Figure, Needs, Sources};
use super::policy::{self, PolicySight};
use super::{ALERTS_MAX, NAME_LENGTH_MAX};

/// A day.
const DURATION_MS_MAX: u64 = 86_400_000;

/// Alerts with their states, and the policy.
#[derive(Clone, Debug, Default)]
pub(super) struct Book {
    alerts: Vec<Alert>,
    /// As the operator has set it; before that no guest is told anything.
    policy: Option<ReportingPolicy>,
}

impl Book {
    /// Makes all of `change`, or nothing.
    pub(super) fn change(
        &mut self,
        change: &ReclaimThresholdsChange,
        now_ms: u64,
    ) -> Result<(), ThresholdError> {
        let mut next = self.clone();
        next.remove(&change.remove_alerts)?;
        let mut seen = BTreeSet::new();
        for alert in &change.alerts {
            let repeated = !seen.insert(&alert.name);
            let changed = match repeated {
                true => Err(AlertFault::Twice),
                false => next.set_alert(alert, now_ms),
            };
            changed.map_err(|fault| of_alert(&alert.name, fault))?;
            // Checked for each one, so that a request of any length is given up early.
            if next.alerts.len() > ALERTS_MAX {
                return Err(ThresholdError::TooManyAlerts);
            }
        }
        if let Some(change) = change.reporting_policy {
            let policy = change.applied_to(next.policy.unwrap_or_default());
            policy::check(policy)?;
            next.policy = Some(policy);
        }
        *self = next;
        Ok(())
    }

    fn remove(&mut self, names: &[String]) -> Result<(), ThresholdError> {
        for name in names {
            let known = self
                .alerts
                .iter()
                .position(|alert| alert.rule.name == *name);
            let index = known.ok_or_else(|| of_alert(name, AlertFault::Unknown))?;
            self.alerts.remove(index);
        }
        Ok(())
    }

    fn set_alert(&mut self, change: &AlertChange, now_ms: u64) -> Result<(), AlertFault> {
        let mut alerts = self.alerts.iter_mut();
        match alerts.find(|alert| alert.rule.name == change.name) {
            Some(alert) => {
                let rule = changed_rule(&alert.rule, change);
                let figure = check_rule(&rule)?;
                alert.replace(rule, figure, now_ms);
            }
            None => {
                let rule = new_rule(change)?;
                let figure = check_rule(&rule)?;
                self.alerts.push(Alert::new(rule, figure, now_ms));
            }
        }
        Ok(())
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Whether there is anything to look at.
    pub(super) fn has_alerts(&self) -> bool {
        !self.alerts.is_empty()
    }

    /// What has to be read to look at it.
    pub(super) fn needs(&self) -> Needs {
        let mut needs = Needs::default();
        for alert in &self.alerts {
            alert.figure.add_needs(&mut needs);
        }
        needs
    }

    /// Looks at every figure; at most one transition for each alert.
    pub(super) fn step(&mut self, now_ms: u64, sources: &Sources) -> Vec<Transition> {
        self.alerts
            .iter_mut()
            .filter_map(|alert| alert.step(now_ms, sources))
            .collect()
    }

    /// The policy, if one was set.
    pub(super) fn policy(&self) -> Option<ReportingPolicy> {
        self.policy
    }

    /// As the API shows it.
    pub(super) fn status(&self, now_ms: u64, sight: PolicySight) -> ReclaimThresholds {
        ReclaimThresholds {
            alerts: self
                .alerts
                .iter()
                .map(|alert| alert.status(now_ms))
                .collect(),
            reporting_policy: policy::status(self.policy.unwrap_or_default(), sight),
        }
    }
}

fn of_alert(name: &str, fault: AlertFault) -> ThresholdError {
    ThresholdError::Alert {
        // A name that is too long is not sent back whole.
        name: name.chars().take(NAME_LENGTH_MAX).collect(),
        fault,
    }
}

fn new_rule(change: &AlertChange) -> Result<AlertRule, AlertFault> {
    let enter = change.enter.ok_or(AlertFault::Missing("enter"))?;
    let figure = change.figure.clone();
    Ok(AlertRule {
        name: change.name.clone(),
        figure: figure.ok_or(AlertFault::Missing("figure"))?,
        direction: change.direction.ok_or(AlertFault::Missing("direction"))?,
        enter,
        leave: change.leave.unwrap_or(enter),
        duration_ms: change.duration_ms.unwrap_or(0),
    })
}

fn changed_rule(rule: &AlertRule, change: &AlertChange) -> AlertRule {
    AlertRule {
        name: rule.name.clone(),
        figure: change.figure.clone().unwrap_or_else(|| rule.figure.clone()),
        direction: change.direction.unwrap_or(rule.direction),
        enter: change.enter.unwrap_or(rule.enter),
        leave: change.leave.unwrap_or(rule.leave),
        duration_ms: change.duration_ms.unwrap_or(rule.duration_ms),
    }
}

fn check_rule(rule: &AlertRule) -> Result<Figure, AlertFault> {
    if !(1..=NAME_LENGTH_MAX).contains(&rule.name.len()) {
        return Err(AlertFault::Name);
    }
    let (leave, enter) = (rule.leave, rule.enter);
    let fault = |side| Err(AlertFault::LeaveBeyondEnter { leave, enter, side });
    match rule.direction {
        AlertDirection::Above if leave > enter => return fault("above"),
        AlertDirection::Below if leave < enter => return fault("below"),
        _ => {}
    }
    if rule.duration_ms > DURATION_MS_MAX {
        return Err(AlertFault::Duration(rule.duration_ms));
    }
    Figure::parse(&rule.figure)
        .ok_or_else(|| AlertFault::Figure(rule.figure.chars().take(NAME_LENGTH_MAX).collect()))
}
