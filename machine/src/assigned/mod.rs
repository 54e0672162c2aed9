//! Assigned devices (VFIO): PCI devices of the host that the guest drives itself.
//!
//! ```text
//!   guest: configuration space ─► ConfigSpace: identity, BARs, MSI and MSI-X are emulated; what remains visible
//!                                 of the device's capabilities is the device's
//!          mapped part of a BAR ─► KVM slot ─► device
//!          rest of a BAR        ─► Function ─► device; the MSI-X table is emulated
//!   device: interrupt ─► eventfd ─► irqfd ─► guest
//!           DMA       ─► Container: all of guest RAM, pinned
//!                        DeviceIommu, behind the virtual IOMMU: what the guest maps, pinned
//! ```
//! The kernel (vfio-pci) protects the host from all writes of the guest. This module protects the guest from itself,
//! and keeps addresses and interrupts under the machine's control.

mod claims;
mod config_space;
mod container;
mod containers;
mod dma;
mod error;
mod function;
mod host;
mod iommu_calls;
mod layout;
#[cfg(test)]
mod tests;

pub(crate) use containers::Containers;
pub(crate) use dma::DeviceIommu;
pub use error::AssignError;
pub(crate) use function::{AssignedFunction, BarSlots};
pub(crate) use host::{HostMapping, VfioFunction};
