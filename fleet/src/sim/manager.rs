//! The interface of memory managers of a simulated host: ours and those for comparison.

use crate::model::{Bytes, HostState, Inventory};
use crate::planner::Plan;

/// A manager's request for a guest, by the guest's index.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Order {
    Balloon(usize, Bytes),
    Eager(usize, bool),
    Limit(usize, Option<Bytes>),
    Pause(usize),
    Resume(usize),
    Kill(usize),
}

/// A manager. It is called at its own interval, with the current data.
pub(super) trait Manager: Send {
    /// Time between two calls, ms.
    fn interval_ms(&self) -> u64;
    /// Decides. The inventory is mutable only to avoid a copy; it is unchanged afterwards.
    fn act(&mut self, inventory: &mut Inventory, orders: &mut Vec<Order>);
    /// The host's state as assessed by it, if it has states.
    fn state(&self) -> HostState {
        HostState::Green
    }
    /// Its last plan, if it makes plans.
    fn plan(&self) -> Option<&Plan> {
        None
    }
}
