//! Virtual IOMMU (virtio 1.2 §5.13): the guest decides which of its memory the devices behind it can access.
//! This module is the device: requests of its driver, reports of faults, and saved state. The tables that it fills, and
//! the translation for other devices, are in [`crate::dma`].

mod device;
mod pinned;
mod request;
mod state;
#[cfg(test)]
mod tests;

pub use device::{ADDRESS_WIDTH_BITS_MAX, ADDRESS_WIDTH_BITS_MIN, Iommu, IommuHandle, IommuParams};
pub use pinned::HostIommu;
pub use state::IommuState;
