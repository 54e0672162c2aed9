//! The configuration, shared by the control thread, the API and the thread that evaluates them.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use api::{ReclaimThresholds, ReclaimThresholdsChange, ReportingPolicy};
use virtio_devices::Unpoisoned;

use super::ThresholdError;
use super::config::ThresholdConfig;
use crate::alerts::{Needs, Sources, Transition};
use crate::reporting_policy::GuestPolicy;

/// The thresholds of a VM, for the control thread, the API and the thread that evaluates them.
#[derive(Debug)]
pub struct Thresholds {
    start: Instant,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    config: ThresholdConfig,
    subjects: Subjects,
    stop: bool,
}

/// The subjects of evaluation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subjects {
    /// A machine, for alerts.
    pub machine: bool,
    /// A machine with a balloon, and a reader of its events.
    pub balloon: bool,
}

/// The figures to read for one evaluation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look {
    pub(crate) alerts: Needs,
    pub(crate) balloon: bool,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            state: Mutex::default(),
            wake: Condvar::new(),
        }
    }
}

impl Thresholds {
    /// Applies `change` atomically. Takes microseconds.
    ///
    /// # Errors
    /// The change is invalid.
    pub fn change(&self, change: &ReclaimThresholdsChange) -> Result<(), ThresholdError> {
        self.lock().config.change(change, self.now_ms())?;
        self.wake.notify_all();
        Ok(())
    }

    /// The current status, for the running guest. Takes microseconds.
    pub fn status(&self, guest: GuestPolicy) -> ReclaimThresholds {
        self.lock().config.status(self.now_ms(), guest)
    }

    /// The reporting policy, if one was set.
    pub fn policy(&self) -> Option<ReportingPolicy> {
        self.lock().config.policy()
    }

    /// The change that sets the same alerts, and the policy if one was set.
    ///
    /// # Panics
    /// The status is not a valid change, which a test of `api` rules out.
    pub fn as_change(&self) -> ReclaimThresholdsChange {
        let status = serde_json::to_value(self.status(GuestPolicy::NoMachine));
        let change = status.and_then(serde_json::from_value::<ReclaimThresholdsChange>);
        let mut change = change.expect("a status is a valid change");
        if self.policy().is_none() {
            change.reporting_policy = None;
        }
        change
    }

    /// Clears everything: the VM has been deleted.
    pub fn clear(&self) {
        self.lock().config.clear();
    }

    /// Sets what there is to evaluate.
    pub fn set_subjects(&self, subjects: Subjects) {
        self.lock().subjects = subjects;
        self.wake.notify_all();
    }

    /// Evaluates every alert; at most one transition each.
    pub(crate) fn step(&self, sources: &Sources) -> Vec<Transition> {
        self.lock().config.step(self.now_ms(), sources)
    }

    /// The clock of alerts.
    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Ignores poisoning: the configuration is consistent after every change, so a thread that panicked while holding
    /// the lock left no partial change.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unpoisoned()
    }

    /// Ends the wait.
    pub(crate) fn stop(&self) {
        self.lock().stop = true;
        self.wake.notify_all();
    }

    /// Waits until the next evaluation is due; `None` at the end. While there is nothing to evaluate, the thread
    /// sleeps.
    pub(crate) fn wait(&self, due: &mut Option<Instant>, interval: Duration) -> Option<Look> {
        let mut state = self.lock();
        while !state.stop {
            let Subjects { machine, balloon } = state.subjects;
            if !(balloon || (machine && state.config.has_alerts())) {
                *due = None;
                state = self.wake.wait(state).unpoisoned();
                continue;
            }
            let now = Instant::now();
            let at = *due.get_or_insert(now + interval);
            if now >= at {
                *due = Some(now + interval);
                let alerts = state.config.needs();
                return Some(Look { alerts, balloon });
            }
            let waited = self.wake.wait_timeout(state, at - now);
            state = waited.unpoisoned().0;
        }
        None
    }
}
