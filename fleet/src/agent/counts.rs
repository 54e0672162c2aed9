//! Counts the agent's decisions.

use std::collections::BTreeMap;

/// Actions by name, reason and result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DecisionCounts {
    /// The three labels come from closed lists in the code.
    pub actions: BTreeMap<(&'static str, &'static str, &'static str), u64>,
    /// Plans made.
    pub plans: u64,
    /// Time spent planning, µs.
    pub plan_us: u64,
    /// Balloons that changed direction within a minute.
    pub oscillations: u64,
}

impl DecisionCounts {
    pub(super) fn count(
        &mut self,
        action: &'static str,
        reason: &'static str,
        result: &'static str,
    ) {
        *self.actions.entry((action, reason, result)).or_default() += 1;
    }
}

/// Responses to requests for memory, by result and reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdmissionCounts {
    /// See [`AdmissionCounts`].
    pub answers: BTreeMap<(&'static str, &'static str), u64>,
}

impl AdmissionCounts {
    pub(super) fn count(&mut self, result: &'static str, reason: &'static str) {
        *self.answers.entry((result, reason)).or_default() += 1;
    }
}
