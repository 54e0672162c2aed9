//! The fleet manager: how much memory each VM keeps, which VMs fit, and where the next one goes.
//!
//! The crate has a pure part and a part with side effects. The pure part decides. [`model`] describes measurements, and
//! [`config`] the operator's settings. [`planner`] turns both into a plan. [`admission`] and [`placement`] accept or
//! refuse VMs. [`sim`] runs all of them on virtual time with guests of many kinds. The pure part reads no clock and no
//! socket, so the simulator and the agent run the same code.
//!
//! Of our other crates, only `api` may be used here, because a fleet manager knows a VMM only through its API socket.

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
mod moves;
pub mod placement;
pub mod planner;
pub mod reservations;
pub mod sample;
mod secret_file;
#[cfg(feature = "sim")]
pub mod sim;
pub mod standby;
mod state_file;
pub mod store;
pub mod worker;
