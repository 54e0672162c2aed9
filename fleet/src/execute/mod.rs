//! Executes plans action by action. Actions that free memory run immediately, grants run when their memory is
//! available, and outdated actions are dropped.
//!
//! The executor makes no decisions. It checks an action against the current state with [`Action::check`] right before
//! sending it to its VM's thread. A grant waits for memory until its plan expires; by then, a newer plan exists.

mod group;
mod order;
mod save;

#[cfg(test)]
mod tests;

pub use group::{GroupError, GroupFile, GroupFiles};
pub(crate) use order::{Addressed, OrderTarget};
pub use order::{Order, OrderError};
pub use save::SaveError;

use crate::planner::{Action, Block, Present};

/// Pending actions of the last plan.
#[derive(Debug, Default)]
pub struct Executor {
    waiting: Vec<Action>,
}

/// The result of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It was sent.
    Ordered,
    /// It was dropped.
    Dropped(Block),
    /// Its VM has no thread any more.
    Gone,
}

impl Executor {
    /// Replaces the plan. Pending grants of the previous plan are dropped, because the new plan is based on newer data.
    pub fn replace(&mut self, actions: Vec<Action>) {
        self.waiting = actions;
    }

    /// Grants that wait for memory.
    pub fn waiting(&self) -> &[Action] {
        &self.waiting
    }

    /// Sends the actions that are possible now. `present` is called for each action right before it; `order` sends an
    /// action and returns whether its VM has a thread. Returns the results, in order.
    pub fn run(
        &mut self,
        mut present: impl FnMut(&Action) -> Option<Present>,
        mut order: impl FnMut(&Action) -> bool,
    ) -> Vec<(Action, Settled)> {
        let mut settled = Vec::new();
        let mut waiting = Vec::new();
        for action in self.waiting.drain(..) {
            let Some(now) = present(&action) else {
                settled.push((action, Settled::Gone));
                continue;
            };
            match action.check(&now) {
                Ok(()) if order(&action) => settled.push((action, Settled::Ordered)),
                Ok(()) => settled.push((action, Settled::Gone)),
                Err(Block::HostShort { .. }) => waiting.push(action),
                Err(block) => settled.push((action, Settled::Dropped(block))),
            }
        }
        self.waiting = waiting;
        settled
    }
}
