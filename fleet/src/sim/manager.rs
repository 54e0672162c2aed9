//! What every memory manager of a simulated host can do, ours and those it is compared with.

use crate::model::{Bytes, HostState, Inventory};
use crate::planner::Plan;

/// What a manager can have done to a guest, by the guest's place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Order {
    Balloon(usize, Bytes),
    Eager(usize, bool),
    Limit(usize, Option<Bytes>),
    Pause(usize),
    Resume(usize),
    Kill(usize),
}

/// A manager. It is called on its own interval, with what is known then.
pub(super) trait Manager: Send {
    /// Time between two calls, ms.
    fn interval_ms(&self) -> u64;
    /// Decides. The inventory is handed out for change so that nobody has to copy it; it comes back as it was.
    fn act(&mut self, inventory: &mut Inventory, orders: &mut Vec<Order>);
    /// The state it sees the host in, where it has states.
    fn state(&self) -> HostState {
        HostState::Green
    }
    /// Its last plan, where it makes plans.
    fn plan(&self) -> Option<&Plan> {
        None
    }
}
