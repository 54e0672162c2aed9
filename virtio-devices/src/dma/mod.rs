//! Addresses of devices behind the virtual IOMMU: which guest memory the guest lets each of them access.
//!
//! ```text
//!   iommu::Handler ── requests ──► Tables: endpoint ─► domain ─► mappings
//!                                     ▲
//!   queue toolkit ── ring, buffer ──► DmaEndpoint::translate
//!                                     │ no mapping, wrong direction
//!   iommu::Handler ◄── fault ─────────┘
//! ```
//!
//! Translation happens in one place, the queue toolkit ([`crate::queue`]): rings are read and written, and buffers are
//! resolved, through the endpoint of their device. A translated address is guest RAM like any other, so a mapping can
//! never lead outside of guest RAM.
//!
//! A device of the host translates for itself: the IOMMU of the host contains the mappings of its endpoint
//! ([`HostMappings`]). It is called after the tables have changed, and before the request is answered.
//!
//! A buffer is translated when its chain is taken, and holds its [`Access`] until the device no longer uses it. The
//! answer to a request that removes a mapping waits for the accesses that began before it. Between turns, a device may
//! therefore keep only buffers that are part of host I/O in flight.

mod endpoint;
mod eras;
mod host_calls;
mod mapping;
mod shared;
mod tables;

pub(crate) use endpoint::Access;
pub use endpoint::DmaEndpoint;
pub(crate) use host_calls::StopsNow;
pub(crate) use mapping::{HostMappings, Mapping, Refusal};
#[cfg(test)]
pub(crate) use shared::FAULTS_MAX;
pub(crate) use shared::{DmaError, Fault, Shared};
#[cfg(test)]
pub(crate) use tables::Piece;
pub(crate) use tables::{FaultReason, GRANULE, Tables};
pub use tables::{MAPPINGS_MAX, MSI_RANGE};
