//! What readers see: put together by the control thread once a second, read by anybody at any time.

use std::sync::{Arc, PoisonError, RwLock};

use super::{AdmissionCounts, DecisionCounts, Status};
use crate::planner::Plan;
use crate::sample::RequestCounters;

/// Everything that is shown.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// The figures.
    pub status: Status,
    /// The last plan.
    pub plan: Arc<Plan>,
    /// What was decided.
    pub decisions: DecisionCounts,
    /// What was answered to requests for memory.
    pub admissions: AdmissionCounts,
}

/// The latest [`Shown`].
#[derive(Debug, Default)]
pub struct Published {
    // Held to copy or to replace one pointer.
    shown: RwLock<Arc<Shown>>,
    /// Requests to VMMs; counted by the VMs' threads themselves.
    pub requests: Arc<RequestCounters>,
}

impl Published {
    /// The latest.
    pub fn get(&self) -> Arc<Shown> {
        Arc::clone(&self.shown.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn set(&self, shown: Shown) {
        *self.shown.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(shown);
    }
}
