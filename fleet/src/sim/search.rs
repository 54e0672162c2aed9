//! Searches for the largest number of guests that a manager can carry.

use serde::Serialize;

use super::outcome::Run;
use super::run::run;
use super::scenario::{ManagerKind, Scenario, Search};

/// The largest number of guests that a manager carried within the limits.
#[derive(Clone, Debug, Serialize)]
pub struct Capacity {
    /// The manager.
    pub manager: ManagerKind,
    /// Guests on each host; 0 if even the smallest number was too many.
    pub guests: u32,
    /// The run with this number.
    pub run: Run,
}

/// The largest number such that all tried numbers up to it succeed. Numbers are tried upwards in steps of a tenth, and
/// then by bisection. Stalls need not grow with every single guest, and a number that succeeds above one that fails is
/// not reliable.
pub(super) fn capacity(scenario: &Scenario, manager: ManagerKind, search: &Search) -> Capacity {
    let attempt = |guests: u32| {
        let run = run(&scenario.scaled(guests), manager);
        let holds = run.outcome.killed == 0 && run.outcome.stalled() <= search.stalled_max.0;
        (run, holds)
    };
    let (mut best, mut holds) = attempt(search.from);
    let mut capacity = if holds { search.from } else { 0 };
    let mut low = search.from;
    let mut high = search.to + 1;
    while holds && low < search.to {
        let next = (low + (low / 10).max(1)).min(search.to);
        let (run, fits) = attempt(next);
        holds = fits;
        if fits {
            (low, capacity, best) = (next, next, run);
        } else {
            high = next;
        }
    }
    while capacity > 0 && high - low > 1 && low < search.to {
        let middle = u32::midpoint(low, high);
        let (run, fits) = attempt(middle);
        if fits {
            (low, capacity, best) = (middle, middle, run);
        } else {
            high = middle;
        }
    }
    Capacity {
        manager,
        guests: capacity,
        run: best,
    }
}
