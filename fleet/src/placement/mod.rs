//! Chooses hosts for VMs, and VMs that should leave a host.
//!
//! Pure functions of published data. The data may be outdated: the chosen host's agent decides again, and if it
//! refuses, the next candidate is tried. Comparing only a few random hosts keeps concurrent callers from choosing the
//! same host.

mod advice;
mod choose;

use serde::{Deserialize, Serialize};

pub use advice::{MovableVm, Move, MoveHistory, Moves, StayReason, cool_down, drain, rebalance};
pub(crate) use choose::SplitMix64;
pub use choose::{Candidate, HostRefusal, Placement, place};

use crate::admission::HostHeadroom;
use crate::model::Bytes;

/// A host's published data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostCapacity {
    /// Its name in the fleet.
    pub id: String,
    /// When the figures were taken, ms on the placer's clock.
    pub at_ms: u64,
    /// Schema of this record; hosts with a value other than [`HostCapacity::SCHEMA`] are not candidates.
    pub schema: u32,
    /// Whether it is being drained.
    pub draining: bool,
    /// The memory that it can reserve, its state, and the memory that it could free.
    #[serde(rename = "books")]
    pub headroom: HostHeadroom,
}

impl HostCapacity {
    /// The schema that this software reads and writes.
    pub const SCHEMA: u32 = 1;

    /// Its fullness: used and reserved memory and the expected burst, as a fraction of the usable memory.
    pub fn fullness(&self) -> f64 {
        let ledger = &self.headroom.ledger;
        (ledger.usable - ledger.available + ledger.promised + ledger.granted + ledger.burst)
            .ratio(ledger.usable)
    }

    /// Books a reservation, so that a series of decisions on one picture of the fleet is correct.
    pub fn book(&mut self, promise: Bytes) {
        self.headroom.ledger.promised += promise;
        self.headroom.ledger.firm_free -= promise;
    }
}

#[cfg(test)]
mod tests;
