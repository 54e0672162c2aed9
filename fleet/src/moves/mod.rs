//! Moves VMs to other hosts by live migration.
//!
//! The agents of source and target make the steps, each for its own VMM, and tell each other through the store. The
//! source reserves memory at the target before anything else; the target frees it if the move fails. Decision 29
//! explains why a VM never runs twice or not at all, whenever an agent is killed.

mod mover;
mod needs;
mod real;
mod step;
mod vmms;

#[cfg(test)]
mod tests;

pub(crate) use mover::{Home, HomeVm, MoveNews, Mover};
pub(crate) use needs::Devices;
pub(crate) use real::{MoveSettings, RealVmms};
