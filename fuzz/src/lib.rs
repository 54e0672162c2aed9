//! Runs of the targets `boot`, `options` and `snapshot`, for the targets themselves and for the canaries.

pub mod boot;
pub mod options;
pub mod snapshot;
