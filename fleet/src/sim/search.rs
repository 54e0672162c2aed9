//! Searches for the largest number of guests that a manager can hold.

use serde::Serialize;

use super::scenario::{ManagerKind, Scenario, Search};
use super::{Run, run};

/// The most guests a manager carried within the limits.
#[derive(Clone, Debug, Serialize)]
pub struct Capacity {
    /// Whose.
    pub manager: ManagerKind,
    /// Guests on each host; 0 when even the smallest number was too many.
    pub guests: u32,
    /// How they fared.
    pub run: Run,
}

/// The largest number up to which every number that is tried holds. Numbers are tried upwards, a tenth more each time,
/// then by halves in between: stalls need not grow with every single guest, and a lucky number above a bad one is not
/// what an operator can build on.
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
