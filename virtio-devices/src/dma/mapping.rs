//! A mapping, and its counterpart in the IOMMU of the host.

use std::fmt::Debug;
use std::ops::RangeInclusive;

use vm_memory::Permissions;

/// The status of a request (virtio 1.2 §5.13.6), if it is not OK.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The request contradicts the specification or the state of the domain.
    Invalid,
    /// An address is misaligned or outside of the input range, or an unmapping would split a mapping.
    Range,
    /// There is no such endpoint or domain.
    NoEntry,
    /// The maximum number of mappings is reached, or a limit of the host.
    NoMemory,
    /// An assigned device cannot have it.
    Unsupported,
    /// The IOMMU of the host does not do it.
    Device,
    /// A command arrived. The request must be executed again.
    Interrupted,
}

/// One mapping, without the input address at which it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Last input address.
    pub(crate) last: u64,
    /// Guest address of the first byte.
    pub(crate) to: u64,
    pub(crate) allows: Permissions,
}

/// Carries out what the guest maps for a device of the host. Called while the tables are not locked, because the host
/// may have to provide memory first.
pub(crate) trait HostMappings: Debug + Send + Sync {
    /// Gives the device access to the guest addresses of a mapping, from the input address `first` on: to all of them,
    /// or to none.
    ///
    /// # Errors
    /// They are not RAM, or the host refuses.
    fn map(&self, first: u64, mapping: &Mapping) -> Result<(), Refusal>;

    /// Undoes the mapping at `first`, if there is one. The device has no access to the memory when this returns.
    ///
    /// # Errors
    /// The host fails: the device may still have access.
    fn unmap(&self, first: u64) -> Result<(), Refusal>;

    /// Undoes all mappings, as far as the host can.
    ///
    /// # Errors
    /// As for [`HostMappings::unmap`].
    fn unmap_all(&self) -> Result<(), Refusal>;

    /// Bytes that the device can access now, each counted as often as it is mapped.
    fn mapped_bytes(&self) -> u64;

    /// Input addresses that cannot be mapped, ascending and without those of interrupts.
    fn reserved(&self) -> Vec<RangeInclusive<u64>>;
}
