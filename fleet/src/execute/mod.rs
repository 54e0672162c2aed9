//! Carries plans out, action by action and order by order: what frees memory at once, what grants memory when it is there, nothing that is no longer true.
//!
//! The executor decides nothing. It holds an action against the present with [`Action::check`] right before it is handed to
//! its VM's thread, and lets a grant wait for memory until its plan is too old; by then there is a newer one.

mod group;
mod order;

#[cfg(test)]
mod tests;

pub use group::{GroupError, GroupFile, GroupFiles};
pub(crate) use order::{Addressed, OrderTarget};
pub use order::{Order, OrderError};

use crate::planner::{Action, Block, Present};

/// Actions of the last plan that are not settled yet.
#[derive(Debug, Default)]
pub struct Executor {
    waiting: Vec<Action>,
}

/// What became of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It was handed over.
    Ordered,
    /// It was dropped.
    Dropped(Block),
    /// Nobody is there to carry it out.
    Gone,
}

impl Executor {
    /// Takes over a plan. Grants of the plan before that still wait are forgotten: the new plan knows better.
    pub fn replace(&mut self, actions: Vec<Action>) {
        self.waiting = actions;
    }

    /// Grants that wait for memory.
    pub fn waiting(&self) -> &[Action] {
        &self.waiting
    }

    /// Hands over what can be. `present` is asked for each action right before; `order` hands one over and says whether
    /// there was somebody to take it. Returns what is settled, in order.
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
