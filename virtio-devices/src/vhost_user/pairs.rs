//! The number of pairs of queues that the driver of a network interface uses. The VMM serves the control queue, and the
//! back end learns the number as rings that are enabled.

use std::sync::Arc;

use super::counters::Shared;
use super::gate::Gate;
use crate::net::Controlled;

pub(super) struct Pairs {
    gate: Arc<Gate>,
    shared: Arc<Shared>,
    /// Number of pairs of the device.
    most: u16,
}

impl Pairs {
    /// One pair is in use.
    pub(super) fn new(gate: Arc<Gate>, shared: Arc<Shared>, most: u16) -> Self {
        gate.set_pairs(1);
        Self { gate, shared, most }
    }

    pub(super) fn enabled(&self) -> u16 {
        self.gate.pairs()
    }
}

impl Controlled for Pairs {
    fn activated(&self, _features: u64) {}

    /// The link tells the back end.
    fn enable_pairs(&self, count: u16) -> bool {
        let possible = (1..=self.most).contains(&count);
        if possible {
            self.gate.set_pairs(count);
        }
        possible
    }

    /// The feature is not offered.
    fn set_offloads(&self, _features: u64) -> bool {
        false
    }

    fn count_bad(&self) {
        self.shared.bad_requests.count();
    }
}
