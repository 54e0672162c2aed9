//! All thresholds of a VM: changed as a whole or not at all, looked at as a whole.

use std::collections::BTreeSet;

use api::{
    AlertChange, AlertDirection, AlertRule, ReclaimThresholds, ReclaimThresholdsChange,
    ReportingPolicy, ReportingPolicyChange, ReportingPolicyStatus,
};

use super::alert::{Alert, Transition};
use super::error::{AlertFault, ThresholdError};
use super::figure::{Figure, Needs, Sources};
use super::{ALERTS_MAX, NAME_LENGTH_MAX};

/// A day.
const DURATION_MS_MAX: u64 = 86_400_000;
/// Largest order of a free block on x86 (`MAX_PAGE_ORDER` of include/linux/mmzone.h): 4 MiB.
const ORDER_MAX: u64 = 10;
/// Blocks of 4 KiB in 4 TiB; more pending ones would mean that nothing is ever reported.
const PENDING_BLOCKS_MAX: u64 = 1 << 30;
/// An hour.
const DELAY_MS_MAX: u64 = 3_600_000;
/// Why no policy is in effect: it takes a feature that no guest has been offered.
const NO_POLICY_FEATURE: &str =
    "the guest's driver does not offer VIRTIO_BALLOON_F_REPORTING_POLICY";

/// Alerts with their states, and the policy.
#[derive(Clone, Debug, Default)]
pub(super) struct Book {
    alerts: Vec<Alert>,
    policy: ReportingPolicy,
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
        if let Some(policy) = change.reporting_policy {
            next.policy = changed_policy(next.policy, policy);
            check_policy(next.policy)?;
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

    /// As the API shows it.
    pub(super) fn status(&self, now_ms: u64) -> ReclaimThresholds {
        ReclaimThresholds {
            alerts: self
                .alerts
                .iter()
                .map(|alert| alert.status(now_ms))
                .collect(),
            reporting_policy: ReportingPolicyStatus {
                policy: self.policy,
                in_effect: false,
                reason: Some(NO_POLICY_FEATURE.to_owned()),
            },
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

fn changed_policy(policy: ReportingPolicy, change: ReportingPolicyChange) -> ReportingPolicy {
    ReportingPolicy {
        order_min: change.order_min.unwrap_or(policy.order_min),
        pending_blocks: change.pending_blocks.unwrap_or(policy.pending_blocks),
        delay_ms_max: change.delay_ms_max.unwrap_or(policy.delay_ms_max),
        age_ms_min: change.age_ms_min.unwrap_or(policy.age_ms_min),
        bytes_per_second_max: change
            .bytes_per_second_max
            .unwrap_or(policy.bytes_per_second_max),
    }
}

fn check_policy(policy: ReportingPolicy) -> Result<(), ThresholdError> {
    for (setting, value, min, max) in [
        ("order_min", policy.order_min, 0, ORDER_MAX),
        (
            "pending_blocks",
            policy.pending_blocks,
            1,
            PENDING_BLOCKS_MAX,
        ),
        ("delay_ms_max", policy.delay_ms_max, 1, DELAY_MS_MAX),
    ] {
        if !(min..=max).contains(&value) {
            return Err(ThresholdError::PolicyOutOfBounds {
                setting,
                value,
                min,
                max,
            });
        }
    }
    let ReportingPolicy {
        age_ms_min,
        delay_ms_max,
        ..
    } = policy;
    if age_ms_min > delay_ms_max {
        return Err(ThresholdError::AgeAboveDelay {
            age_ms_min,
            delay_ms_max,
        });
    }
    Ok(())
}
