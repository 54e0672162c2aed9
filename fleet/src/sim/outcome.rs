//! The outcome of a run.

use serde::Serialize;
use strum::VariantArray as _;

use crate::model::HostState;

use super::scenario::{Check, ManagerKind};

/// Sums over hosts and time, from the end of settling on.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Guest time, s.
    pub guest_s: f64,
    /// Of it, stalled for lack of memory, in the guest or on the host, s.
    pub stalled_s: f64,
    /// Of it, because the host had none, s.
    pub starved_s: f64,
    /// Guests that the host's kernel killed.
    pub killed: u64,
    /// Guests that were killed on purpose, as the last resort.
    pub sacrificed: u64,
    /// Requests to balloons.
    pub requests: u64,
    /// Changes of direction of the balloon that changed it most often.
    pub reversals_worst: u64,
    /// Host time, s.
    pub seconds: f64,
    /// Host time by state, s.
    pub state_s: [f64; HostState::VARIANTS.len()],
    /// Part of the guests' memory that was in balloons when it was most.
    pub ballooned_peak: f64,
    /// Used part of the host, summed over time.
    pub used_sum: f64,
    /// The course of things. Of the first host.
    #[serde(skip)]
    pub points: Vec<Point>,
}

/// One moment.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Point {
    /// When, s.
    pub at_s: u64,
    /// Host memory that guests occupy, GiB.
    pub resident_gib: f64,
    /// In balloons, GiB.
    pub ballooned_gib: f64,
    /// Part of the guests that stall.
    pub stalled: f64,
    /// The host's state as the manager sees it.
    pub state: HostState,
}

impl Outcome {
    /// Part of the guests' time that was stalled.
    pub fn stalled(&self) -> f64 {
        self.stalled_s / self.guest_s.max(1.0)
    }

    /// Changes of direction in an hour of the balloon that changed it most often.
    pub fn reversals_per_hour(&self, hosts: u32) -> f64 {
        self.reversals_worst as f64 * 3600.0 * f64::from(hosts) / self.seconds.max(1.0)
    }

    /// Mean used part of the hosts.
    pub fn used(&self) -> f64 {
        self.used_sum / self.seconds.max(1.0)
    }

    /// Adds another host's.
    pub(super) fn add(&mut self, other: &Self) {
        self.guest_s += other.guest_s;
        self.stalled_s += other.stalled_s;
        self.starved_s += other.starved_s;
        self.killed += other.killed;
        self.sacrificed += other.sacrificed;
        self.requests += other.requests;
        self.reversals_worst = self.reversals_worst.max(other.reversals_worst);
        self.seconds += other.seconds;
        self.ballooned_peak = self.ballooned_peak.max(other.ballooned_peak);
        self.used_sum += other.used_sum;
        for (sum, more) in self.state_s.iter_mut().zip(other.state_s) {
            *sum += more;
        }
        if self.points.is_empty() {
            self.points.clone_from(&other.points);
        }
    }
}

/// A run of one manager.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Whose.
    pub manager: ManagerKind,
    /// Guests on each host.
    pub guests: u32,
    /// How it went.
    pub outcome: Outcome,
}

/// What did not hold.
#[derive(Clone, Debug, PartialEq, Serialize, thiserror::Error)]
pub enum CheckFault {
    /// Too much guest time was stalled.
    #[error("guests stalled for {found:.4} of their time; the limit is {allowed:.4}")]
    Stalled {
        /// What came out.
        found: f64,
        /// What may.
        allowed: f64,
    },
    /// Guests were killed.
    #[error("{found} guests were killed, {allowed} may be")]
    Killed {
        /// What came out.
        found: u64,
        /// What may.
        allowed: u64,
    },
    /// A balloon went to and fro.
    #[error("a balloon reversed {found:.1} times per hour; the limit is {allowed:.1}")]
    LimitCycle {
        /// What came out.
        found: f64,
        /// What may.
        allowed: f64,
    },
    /// Nothing much was taken.
    #[error("balloons held up to {found:.3} of the guests' memory; {wanted:.3} was expected")]
    Idle {
        /// What came out.
        found: f64,
        /// What should.
        wanted: f64,
    },
    /// Far too much was taken.
    #[error("balloons held up to {found:.3} of the guests' memory; the limit is {allowed:.3}")]
    Greedy {
        /// What came out.
        found: f64,
        /// What may.
        allowed: f64,
    },
    /// The host was red for too long.
    #[error("hosts were red for {found:.4} of the time; the limit is {allowed:.4}")]
    Red {
        /// What came out.
        found: f64,
        /// What may.
        allowed: f64,
    },
    /// Too many requests.
    #[error("{found:.1} balloon requests per guest and hour; the limit is {allowed:.1}")]
    Busy {
        /// What came out.
        found: f64,
        /// What may.
        allowed: f64,
    },
    /// Not enough more than the others.
    #[error("{found:.3} more guests than the best other manager; {wanted:.3} was expected")]
    Gain {
        /// What came out.
        found: f64,
        /// What should.
        wanted: f64,
    },
}

/// Everything about this run of ours that does not hold.
pub(super) fn faults(outcome: &Outcome, hosts: u32, check: &Check) -> Vec<CheckFault> {
    let mut faults = Vec::new();
    let (found, allowed) = (outcome.stalled(), check.stalled_max.0);
    if found > allowed {
        faults.push(CheckFault::Stalled { found, allowed });
    }
    let (found, allowed) = (outcome.killed, check.killed_max);
    if found > allowed {
        faults.push(CheckFault::Killed { found, allowed });
    }
    let found = outcome.reversals_per_hour(hosts);
    let allowed = check.reversals_per_hour_max;
    if found > allowed {
        faults.push(CheckFault::LimitCycle { found, allowed });
    }
    let (found, wanted) = (outcome.ballooned_peak, check.ballooned_peak_min.0);
    if found < wanted {
        faults.push(CheckFault::Idle { found, wanted });
    }
    let allowed = check.ballooned_peak_max.0;
    if found > allowed {
        faults.push(CheckFault::Greedy { found, allowed });
    }
    let red = outcome.state_s[HostState::Red as usize] / outcome.seconds.max(1.0);
    if red > check.red_max.0 {
        let allowed = check.red_max.0;
        faults.push(CheckFault::Red {
            found: red,
            allowed,
        });
    }
    let found = outcome.requests as f64 * 3600.0 / outcome.guest_s.max(1.0);
    let allowed = check.requests_per_guest_hour_max;
    if found > allowed {
        faults.push(CheckFault::Busy { found, allowed });
    }
    faults
}
