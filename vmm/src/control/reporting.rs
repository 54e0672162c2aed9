//! The operator's settings of a guest's reports, which every new balloon of the VM gets.

use std::sync::Arc;

use api::{ReclaimThresholdsChange, ReportingAction, VmBalloonReporting};

use crate::thresholds::{ThresholdError, Thresholds};
use crate::vm::Machine;

/// The thresholds with the reporting policy, and whether reporting is paused.
pub(super) struct Reporting {
    thresholds: Arc<Thresholds>,
    /// The operator has paused reporting.
    pub(super) paused: bool,
}

impl Reporting {
    pub(super) fn new(thresholds: Arc<Thresholds>) -> Self {
        Self {
            thresholds,
            paused: false,
        }
    }

    pub(super) fn thresholds(&self) -> Arc<Thresholds> {
        Arc::clone(&self.thresholds)
    }

    /// Changes the thresholds, and the policy of the machine if the change has one.
    pub(super) fn change(
        &self,
        change: &ReclaimThresholdsChange,
        machine: Option<&dyn Machine>,
    ) -> Result<(), ThresholdError> {
        self.thresholds.change(change)?;
        if let (Some(_), Some(policy), Some(machine)) =
            (change.reporting_policy, self.thresholds.policy(), machine)
        {
            machine.set_reporting_policy(policy);
        }
        Ok(())
    }

    /// Records a request that the balloon has accepted.
    pub(super) fn note(&mut self, action: ReportingAction) {
        match action {
            ReportingAction::Pause => self.paused = true,
            ReportingAction::Resume => self.paused = false,
            ReportingAction::ReportNow => {}
        }
    }

    /// Passes the settings to a new balloon.
    pub(super) fn steer(&self, machine: &dyn Machine) {
        if let Some(policy) = self.thresholds.policy() {
            machine.set_reporting_policy(policy);
        }
        if self.paused {
            let request = VmBalloonReporting {
                action: ReportingAction::Pause,
                again: false,
            };
            if let Err(error) = machine.balloon_reporting(request) {
                // There is no balloon, or its reporting is off.
                log::info!("Reporting cannot be paused, because it is not active: {error}");
            }
        }
    }

    /// Drops the settings, which belong to the configuration.
    pub(super) fn clear(&mut self) {
        self.thresholds.clear();
        self.paused = false;
    }
}
