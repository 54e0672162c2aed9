//! `[thresholds]` and `[reporting]`: the host's states, and the guests' reporting policy in each.

use api::ReportingPolicy;
use serde::{Deserialize, Serialize};

use crate::model::{Fraction, HostState};

/// Two values with a dead band between them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Band {
    /// The state begins when the free fraction of the usable memory is below this.
    pub enter: Fraction,
    /// The state ends when it is above this.
    pub leave: Fraction,
}

/// `[thresholds]`
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Thresholds {
    /// Getting scarce.
    pub yellow: Band,
    /// Scarce.
    pub orange: Band,
    /// About to run out.
    pub red: Band,
    /// Memory pressure (PSI some, mean of 10 s, as a fraction of time) at which yellow, orange and red begin; they end
    /// at half of it.
    pub pressure: [Fraction; 3],
    /// Pressure counts only while less than this fraction of the usable memory is free. With more free memory, the VMs
    /// are not its cause, and taking memory from them would not help.
    pub pressure_below: Fraction,
}

impl Default for Thresholds {
    fn default() -> Self {
        let band = |enter, leave| Band {
            enter: Fraction(enter),
            leave: Fraction(leave),
        };
        Self {
            yellow: band(0.20, 0.25),
            orange: band(0.10, 0.15),
            red: band(0.05, 0.08),
            pressure: [Fraction(0.01), Fraction(0.05), Fraction(0.20)],
            pressure_below: Fraction(0.5),
        }
    }
}

impl Thresholds {
    /// The values of a state; green has none.
    pub fn band(&self, state: HostState) -> Option<Band> {
        match state {
            HostState::Green => None,
            HostState::Yellow => Some(self.yellow),
            HostState::Orange => Some(self.orange),
            HostState::Red => Some(self.red),
        }
    }
}

/// `[reporting]`: the first measure. It costs guests least, because it takes only memory that is free in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReportingConfig {
    /// While memory is plentiful: do not report hot memory.
    pub relaxed: ReportingPolicy,
    /// While memory is plentiful, for guests that take back most of what they report: report only memory that stayed
    /// free for long.
    pub calm: ReportingPolicy,
    /// While memory is scarce: report everything at once.
    pub eager: ReportingPolicy,
    /// Ratio of repopulated to discarded memory, percent, above which a guest counts as churning.
    pub churn_percent: u64,
}

impl ReportingConfig {
    /// Each policy with its key.
    pub(super) fn policies(&self) -> [(&'static str, &ReportingPolicy); 3] {
        [
            ("relaxed", &self.relaxed),
            ("calm", &self.calm),
            ("eager", &self.eager),
        ]
    }
}

impl Default for ReportingConfig {
    fn default() -> Self {
        let policy = ReportingPolicy::default();
        Self {
            relaxed: policy,
            calm: ReportingPolicy {
                age_ms_min: 10_000,
                // The guest's interval must exceed the required age of free blocks, otherwise it never finds any due.
                delay_ms_max: 20_000,
                ..policy
            },
            eager: ReportingPolicy {
                pending_blocks: 1,
                delay_ms_max: 200,
                ..policy
            },
            churn_percent: 80,
        }
    }
}
