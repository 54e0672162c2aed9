//! Runs a scenario on all its hosts.

use rayon::prelude::*;

use super::host::Host;
use super::outcome::{Outcome, Run};
use super::scenario::{ManagerKind, Scenario};

/// Runs the scenario under one manager. Hosts are independent, and as many run at a time as there are processors.
pub fn run(scenario: &Scenario, manager: ManagerKind) -> Run {
    let outcomes: Vec<Outcome> = (0..u64::from(scenario.hosts.count))
        .into_par_iter()
        .map(|number| {
            let mut host = Host::new(scenario, manager, number);
            host.run(scenario.lasts.0);
            if number > 0 {
                host.outcome.points = Vec::new();
            }
            host.outcome
        })
        .collect();
    let mut outcome = Outcome::default();
    for one in &outcomes {
        outcome.add(one);
    }
    Run {
        manager,
        guests: scenario.guests_per_host(),
        outcome,
    }
}
