//! The data for readers: assembled by the control loop once per second, readable at any time.

use std::sync::Arc;

use parking_lot::RwLock;

use super::journal::Journal;
use super::{AdmissionCounts, DecisionCounts, Status};
use crate::planner::Plan;
use crate::sample::RequestCounters;

/// All published data of one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The figures.
    pub status: Status,
    /// The last plan.
    pub plan: Arc<Plan>,
    /// The counts of decisions.
    pub decisions: DecisionCounts,
    /// The counts of responses to requests for memory.
    pub admissions: AdmissionCounts,
}

/// The latest [`Snapshot`].
#[derive(Debug, Default)]
pub struct Published {
    // Locked only to copy or replace one pointer.
    snapshot: RwLock<Arc<Snapshot>>,
    /// Recent events, added by the control loop.
    pub(super) journal: Journal,
    /// Requests to VMMs, counted by the VMs' threads.
    pub requests: Arc<RequestCounters>,
}

impl Published {
    /// The latest snapshot.
    pub fn get(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot.read())
    }

    pub(super) fn set(&self, snapshot: Snapshot) {
        *self.snapshot.write() = Arc::new(snapshot);
    }
}
