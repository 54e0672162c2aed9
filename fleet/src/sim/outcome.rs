//! The outcome of a simulated run, and its comparison with what a scenario expects.

use serde::Serialize;
use strum::VariantArray as _;

use crate::model::HostState;

use super::scenario::{Check, ManagerKind};

/// Sums over hosts and time, after the settling time.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Guest time, s.
    pub guest_s: f64,
    /// Part of it that was stalled for lack of memory, in the guest or on the host, s.
    pub stalled_s: f64,
    /// Part of it that was stalled because the host had no memory, s.
    pub starved_s: f64,
    /// Guests that the host's kernel killed.
    pub killed: u64,
    /// Guests that were killed deliberately, as the last resort.
    pub sacrificed: u64,
    /// Requests to balloons.
    pub requests: u64,
    /// Changes of direction of the balloon that changed it most often.
    pub reversals_worst: u64,
    /// Host time, s.
    pub seconds: f64,
    /// Host time by state, s.
    pub state_s: [f64; HostState::VARIANTS.len()],
    /// Peak fraction of the guests' memory in balloons.
    pub ballooned_peak: f64,
    /// Used fraction of the host, summed over time.
    pub used_sum: f64,
    /// The time series of the first host.
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
    /// Memory in balloons, GiB.
    pub ballooned_gib: f64,
    /// Fraction of the guests that stall.
    pub stalled: f64,
    /// The host's state as assessed by the manager.
    pub state: HostState,
}

impl Outcome {
    /// Fraction of the guests' time that was stalled.
    pub fn stalled(&self) -> f64 {
        self.stalled_s / self.guest_s.max(1.0)
    }

    /// Changes of direction per hour of the balloon that changed it most often.
    pub fn reversals_per_hour(&self, hosts: u32) -> f64 {
        self.reversals_worst as f64 * 3600.0 * f64::from(hosts) / self.seconds.max(1.0)
    }

    /// Mean used fraction of the hosts.
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
    /// The manager.
    pub manager: ManagerKind,
    /// Guests on each host.
    pub guests: u32,
    /// Its outcome.
    pub outcome: Outcome,
}

/// An expectation that was not met.
#[derive(Clone, Debug, PartialEq, Serialize, thiserror::Error)]
pub enum CheckFault {
    /// Too much guest time was stalled.
    #[error("guests stalled for {found:.4} of their time; the limit is {allowed:.4}")]
    Stalled {
        /// The measured value.
        found: f64,
        /// The allowed value.
        allowed: f64,
    },
    /// Guests were killed.
    #[error("{found} guests were killed; the limit is {allowed}")]
    Killed {
        /// The measured value.
        found: u64,
        /// The allowed value.
        allowed: u64,
    },
    /// A balloon oscillated.
    #[error("a balloon reversed {found:.1} times per hour; the limit is {allowed:.1}")]
    LimitCycle {
        /// The measured value.
        found: f64,
        /// The allowed value.
        allowed: f64,
    },
    /// Too little was taken.
    #[error("balloons held up to {found:.3} of the guests' memory; {wanted:.3} was expected")]
    Idle {
        /// The measured value.
        found: f64,
        /// The required value.
        wanted: f64,
    },
    /// Too much was taken.
    #[error("balloons held up to {found:.3} of the guests' memory; the limit is {allowed:.3}")]
    Greedy {
        /// The measured value.
        found: f64,
        /// The allowed value.
        allowed: f64,
    },
    /// The host was red for too long.
    #[error("hosts were red for {found:.4} of the time; the limit is {allowed:.4}")]
    Red {
        /// The measured value.
        found: f64,
        /// The allowed value.
        allowed: f64,
    },
    /// Too many requests.
    #[error("{found:.1} balloon requests per guest and hour; the limit is {allowed:.1}")]
    Busy {
        /// The measured value.
        found: f64,
        /// The allowed value.
        allowed: f64,
    },
    /// Too little gain over the other managers.
    #[error("{found:.3} more guests than the best other manager; {wanted:.3} was expected")]
    Gain {
        /// The measured value.
        found: f64,
        /// The required value.
        wanted: f64,
    },
}

/// All expectations that this run of our manager did not meet.
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
