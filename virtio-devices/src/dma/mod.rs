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
//! A buffer is translated when its chain is taken. An UNMAP does not stop the request in flight that uses it: the
//! device can only reach RAM that the guest had mapped for that request.

mod endpoint;
mod shared;
mod tables;

pub use endpoint::DmaEndpoint;
#[cfg(test)]
pub(crate) use shared::FAULTS_MAX;
pub(crate) use shared::{DmaError, Fault, Shared};
pub(crate) use tables::{FaultReason, GRANULE, Mapping, Piece, Refusal, Tables};
pub use tables::{MAPPINGS_MAX, MSI_RANGE};
