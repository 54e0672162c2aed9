//! Chooses hosts for VMs, and VMs that should leave a host.
//!
//! Pure functions over what hosts published. They may be wrong by the age of what was published: the chosen host's agent
//! decides again, and a no there means the next candidate. Comparing a few hosts drawn by lot instead of all keeps many
//! callers at the same moment from choosing the same host.

mod advice;
mod choose;

use serde::{Deserialize, Serialize};

pub use advice::{MovableVm, Move, MoveHistory, Moves, StayReason, cool_down, drain, rebalance};
pub(crate) use choose::SplitMix64;
pub use choose::{Candidate, HostRefusal, Placement, place};

use crate::admission::HostHeadroom;
use crate::model::Bytes;

/// What a host publishes about itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostCapacity {
    /// Its name in the fleet.
    pub id: String,
    /// When the figures were taken, ms on the placer's clock.
    pub at_ms: u64,
    /// Form of this record; others than [`HostCapacity::SCHEMA`] are no candidates.
    pub schema: u32,
    /// Whether it is being emptied.
    pub draining: bool,
    /// What it can promise, its state, and what could be freed.
    #[serde(rename = "books")]
    pub headroom: HostHeadroom,
}

impl HostCapacity {
    /// The form of the record that this software reads and writes.
    pub const SCHEMA: u32 = 1;

    /// How full it is: what is used and promised, and what the guests will call in, as a part of the usable memory.
    pub fn fullness(&self) -> f64 {
        let ledger = &self.headroom.ledger;
        (ledger.usable - ledger.available + ledger.promised + ledger.granted + ledger.burst)
            .ratio(ledger.usable)
    }

    /// Books a promise, so that a series of decisions on one picture of the fleet is right.
    pub fn book(&mut self, promise: Bytes) {
        self.headroom.ledger.promised += promise;
        self.headroom.ledger.firm_free -= promise;
    }
}

#[cfg(test)]
mod tests;
