//! All alerts of a VM: changed atomically, evaluated together.

use std::collections::BTreeSet;

use api::{AlertChange, AlertDirection, AlertRule, AlertStatus};

use super::alert::{Alert, Transition};
use super::error::{AlertError, AlertFault};
use super::figure::{Figure, Needs, Sources};
use super::{ALERTS_MAX, NAME_LENGTH_MAX};

/// A day.
const DURATION_MS_MAX: u64 = 86_400_000;

/// Alerts with their states.
#[derive(Clone, Debug, Default)]
pub(crate) struct AlertList(Vec<Alert>);

impl AlertList {
    /// Removes and changes alerts. After an error, some of the change is applied.
    pub(crate) fn change(
        &mut self,
        removed: &[String],
        changed: &[AlertChange],
        now_ms: u64,
    ) -> Result<(), AlertError> {
        self.remove(removed)?;
        let mut seen = BTreeSet::new();
        for alert in changed {
            let repeated = !seen.insert(&alert.name);
            let changed = match repeated {
                true => Err(AlertFault::Twice),
                false => self.set_alert(alert, now_ms),
            };
            changed.map_err(|fault| of_alert(&alert.name, fault))?;
            // Checked after each alert, so that an overlong request fails early.
            if self.0.len() > ALERTS_MAX {
                return Err(AlertError::TooManyAlerts);
            }
        }
        Ok(())
    }

    fn remove(&mut self, names: &[String]) -> Result<(), AlertError> {
        for name in names {
            let known = self.0.iter().position(|alert| alert.rule.name == *name);
            let index = known.ok_or_else(|| of_alert(name, AlertFault::Unknown))?;
            self.0.remove(index);
        }
        Ok(())
    }

    fn set_alert(&mut self, change: &AlertChange, now_ms: u64) -> Result<(), AlertFault> {
        let mut alerts = self.0.iter_mut();
        match alerts.find(|alert| alert.rule.name == change.name) {
            Some(alert) => {
                let rule = changed_rule(&alert.rule, change);
                let figure = check_rule(&rule)?;
                alert.replace(rule, figure, now_ms);
            }
            None => {
                let rule = new_rule(change)?;
                let figure = check_rule(&rule)?;
                self.0.push(Alert::new(rule, figure, now_ms));
            }
        }
        Ok(())
    }

    /// Whether there is nothing to evaluate.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The data to read for an evaluation.
    pub(crate) fn needs(&self) -> Needs {
        let mut needs = Needs::default();
        for alert in &self.0 {
            alert.figure.add_needs(&mut needs);
        }
        needs
    }

    /// Evaluates every alert; at most one transition each.
    pub(crate) fn step(&mut self, now_ms: u64, sources: &Sources) -> Vec<Transition> {
        self.0
            .iter_mut()
            .filter_map(|alert| alert.step(now_ms, sources))
            .collect()
    }

    /// The representation in the API.
    pub(crate) fn status(&self, now_ms: u64) -> Vec<AlertStatus> {
        self.0.iter().map(|alert| alert.status(now_ms)).collect()
    }
}

fn of_alert(name: &str, fault: AlertFault) -> AlertError {
    AlertError::Alert {
        // Truncates a name that is too long.
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
