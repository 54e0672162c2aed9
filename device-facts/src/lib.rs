//! Tables of facts that devices, wire types and guest must agree on, one row per fact.
//!
//! | Module | Facts | Read by |
//! | --- | --- | --- |
//! | [`statistics`] | balloon statistics: tag, name, meaning | device, wire types, schema, guest patches |
//! | [`reporting_policy`] | settings of the reporting policy: bit, offset, unit, default, bounds | the same, and help texts |
//! | [`policy_space`] | the other fields of the guest/host interface | device, guest patches |
//! | [`reclaim`] | why memory was skipped, phases of pauses and of hinting | device, counters, wire types |
//! | [`disk`] | how a disk image is locked | device, wire types, options |
//!
//! `api` and `virtio-devices` use this crate; it depends on neither and contains no logic beyond its tables.
//! `guest-patches/README.md` specifies the interface with the guest. `tests/documents.rs` compares the tables with that
//! page and with the header in the patches.

pub mod disk;
pub mod policy_space;
pub mod reclaim;
pub mod reporting_policy;
pub mod statistics;

pub use disk::LockGranularity;
pub use reclaim::{HintingPhase, PausePhase, SkipReason};
pub use reporting_policy::{PolicyError, PolicySetting, ReportingPolicy, ReportingPolicyChange};
pub use statistics::{BalloonStats, GuestReporting, Statistic};
