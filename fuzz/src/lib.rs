//! Runs of the targets whose subject is in no crate of its own, for the targets and for the canaries.

pub mod boot;
pub mod options;
pub mod snapshot;
