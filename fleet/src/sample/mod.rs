//! Finds the sockets of VMs and samples each VMM.

mod counters;
mod discovery;
mod owner;
mod reading;

pub use counters::{DURATION_BUCKETS_SECONDS, RequestCount, RequestCounters};
pub use discovery::{Discovery, Found, PatternError, SocketIdentity, VMS_MAX};
pub(crate) use owner::SocketOwners;
#[cfg(any(test, fuzzing))]
pub(crate) use reading::figures;
pub use reading::{Activity, PoolUse, SampleFailure, VmReading};
pub(crate) use reading::{ProcessFiles, Round, failure_kind, means_no_vm, read_info, read_vm};
