//! The closed loop on virtual time: the manager acts on guests, and guests react.
//!
//! The planner, the checks before an action, admission and placement are those of the agent. Only the guests, the hosts
//! and the store are simulated, as described by [`scenario`]. All randomness comes from the scenario's seed, so a run
//! can be repeated. The rules of other managers run in the same scenarios for comparison.
//!
//! A simulation shows how the rules behave with such guests, not that real guests behave this way.

mod baselines;
mod cli;
mod fleet;
mod guests;
mod host;
mod manager;
mod managers;
mod outcome;
mod report;
mod run;
mod scenario;
mod search;

use rayon::prelude::*;

pub use cli::{SimulateOptions, run_cli};
pub use fleet::FleetOutcome;
pub use outcome::{CheckFault, Outcome, Point, Run};
pub use report::{Report, svg};
pub use run::run;
pub use scenario::{
    Character, Check, GuestGroup, Hosts, Load, ManagerKind, Scenario, Search, Steps, Trouble,
};
pub use search::Capacity;

/// Reasons why a scenario cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// The file cannot be read.
    #[error("cannot read scenario {path}{suggestion}")]
    Read {
        /// Its path.
        path: String,
        /// The file next to it with a similar name, as part of the message.
        suggestion: String,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a valid scenario.
    #[error("cannot parse the scenario")]
    Syntax(#[from] crate::config::SyntaxFault),
    /// The configuration in it contradicts itself.
    #[error("the configuration of the scenario is invalid")]
    Config(#[from] crate::config::ConfigError),
    /// A duration that must not be zero.
    #[error("time.{0} must not be zero")]
    NoTime(&'static str),
    /// Too many guests for one host of the simulation.
    #[error("{0} guests per host exceed the limit of the simulation")]
    TooMany(u64),
    /// The outcome cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// Its path.
        path: String,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
}

/// Maximum number of guests per host, because names have six digits.
const GUESTS_MAX: u64 = 100_000;

impl Scenario {
    /// Reads a scenario.
    ///
    /// # Errors
    /// [`SimError`] with the reason.
    pub fn from_toml(text: &str) -> Result<Self, SimError> {
        let scenario: Self = toml::from_str(text).map_err(crate::config::SyntaxFault::from)?;
        scenario.config.check()?;
        let time = &scenario.time;
        for (name, value) in [
            ("tick", time.tick.0),
            ("sample", time.sample.0),
            ("plan", time.plan.0),
        ] {
            if value == 0 {
                return Err(SimError::NoTime(name));
            }
        }
        let guests = scenario.guests.iter().map(|g| u64::from(g.count)).sum();
        if guests > GUESTS_MAX {
            return Err(SimError::TooMany(guests));
        }
        Ok(scenario)
    }
}

/// Runs all parts of the scenario.
pub fn simulate(scenario: &Scenario) -> Report {
    let fleet = fleet::wanted(scenario).then(|| fleet::run(scenario));
    let capacities: Vec<Capacity> = match scenario.search {
        Some(search) => scenario
            .managers
            .par_iter()
            .map(|&manager| search::capacity(scenario, manager, &search))
            .collect(),
        None => Vec::new(),
    };
    let runs: Vec<Run> = match &fleet {
        Some(fleet) => vec![fleet.run.clone()],
        None => scenario
            .managers
            .iter()
            .map(|&manager| run(scenario, manager))
            .collect(),
    };
    Report::new(scenario, runs, capacities, fleet.map(|fleet| fleet.outcome))
}

#[cfg(test)]
mod tests;
