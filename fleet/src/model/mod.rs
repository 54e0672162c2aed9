//! What the manager knows: facts about the host and its VMs, and the ledger made from them.
//!
//! Everything a guest says is a claim. The types keep claims ([`GuestClaims`]) apart from what the host measured itself
//! (`resident`), so that a decision that believes a claim has to name it.

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
