//! The manager's data: facts about the host and its VMs, and the ledger computed from them.
//!
//! All data from a guest is a claim. The types separate claims ([`GuestClaims`]) from the host's own measurements
//! (`resident`), so that code that relies on a claim names it.

mod burst;
mod bytes;
mod host;
mod ledger;
mod lessons;
mod policy;
mod state;
mod vm;

pub use burst::BurstHistogram;
pub(crate) use bytes::split_number;
pub use bytes::{Amount, Bytes, Fraction, ParseQuantityError};
pub use host::{CgroupMemory, HostFacts, HugePool, Pressure};
pub use ledger::Ledger;
pub use lessons::Lessons;
pub use policy::{PriorityClass, VmPolicy};
pub use state::HostState;
pub use vm::{
    FeatureLevel, GuestClaims, InForce, Interlock, Inventory, ReclaimFigures, VmFacts, VmId,
    VmSample,
};
