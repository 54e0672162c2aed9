//! Virtual IOMMU (virtio 1.2 §5.13): the guest decides which of its memory the devices behind it can access.
//!
//! ```text
//!   driver ── request queue ──► Handler ──► Tables: endpoint ─► domain ─► mappings
//!                                              ▲
//!   device behind it ── ring, buffer ──► DmaEndpoint::translate
//!                                              │ no mapping, wrong direction
//!   driver ◄── event queue ─── Handler ◄── fault
//! ```
//!
//! Translation happens in one place, the queue toolkit ([`crate::queue`]): rings are read and written, and buffers are
//! resolved, through the endpoint of their device. A translated address is guest RAM like any other, so a mapping can
//! never lead outside of guest RAM.
//!
//! A buffer is translated when its chain is taken. An UNMAP does not stop the request in flight that uses it: the
//! device can only reach RAM that the guest had mapped for that request.

mod device;
mod endpoint;
mod request;
mod shared;
mod state;
mod tables;
#[cfg(test)]
mod tests;

pub use device::{ADDRESS_WIDTH_BITS_MAX, ADDRESS_WIDTH_BITS_MIN, Iommu, IommuHandle, IommuParams};
pub use endpoint::DmaEndpoint;
pub(crate) use endpoint::{DmaError, Piece};
pub use state::IommuState;
pub use tables::{MAPPINGS_MAX, MSI_RANGE};
