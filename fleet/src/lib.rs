//! The fleet manager: how much memory each VM keeps, which VMs fit, and where the next one goes.
//!
//! The crate has a pure half and a half that touches the world. The pure half decides: [`model`] is what was measured,
//! [`config`] what the operator wants, [`planner`] turns both into a plan, [`admission`] and [`placement`] say yes or
//! no, and [`sim`] runs all of them on virtual time against guests of every character. Nothing of it reads a clock or a
//! socket, so the simulator and the agent run the same code.
//!
//! Of our other crates only `api` may be used here: a fleet manager sees of a VMM what its socket tells.

pub mod admission;
pub mod agent;
pub mod agent_config;
pub mod cluster;
pub mod config;
pub mod execute;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod host;
pub mod http;
mod metrics;
pub mod model;
pub mod placement;
pub mod planner;
pub mod reservations;
pub mod sample;
mod secret_file;
#[cfg(feature = "sim")]
pub mod sim;
mod state_file;
pub mod store;
pub mod worker;
