//! Guest physical memory: where everything lies, what backs the RAM, what the guest is told.
//!
//! ```text
//!   MemoryConfig ─► GuestMemory::new ─► GuestRam (shared with devices)
//!                        │
//!                        └─ attach ─► RamSlots (KVM's view, removed on drop)
//! ```

mod backing;
mod e820;
mod guest_ram;
pub mod layout;

use std::io;

pub use e820::{E820Entry, E820Kind, e820_map};
pub use guest_ram::{GuestMemory, RamSlots};

/// Why guest memory cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size of zero, or one so small that nothing can boot.
    #[error("Guest RAM of {bytes} bytes is less than the minimum of {min_bytes}")]
    TooSmall {
        /// What was asked for.
        bytes: u64,
        /// The least there can be.
        min_bytes: u64,
    },
    /// Not a whole number of pages of the kind that backs it.
    #[error("Guest RAM of {bytes} bytes is not a multiple of the page size {page_bytes}")]
    NotPageMultiple {
        /// What was asked for.
        bytes: u64,
        /// Size of the backing pages.
        page_bytes: u64,
    },
    /// RAM and the device area above it do not fit the guest's physical addresses.
    #[error("Guest RAM of {bytes} bytes does not fit {phys_bits} bits of physical address")]
    AddressSpace {
        /// What was asked for.
        bytes: u64,
        /// Width of the guest's physical addresses.
        phys_bits: u8,
    },
    /// The sizes in the configuration do not add up in 64 bits.
    #[error("The sizes of guest RAM add up to more than 64 bits")]
    SizeOverflow,
    /// A huge page size that is no power of two or smaller than a page.
    #[error("{bytes} bytes is not a huge page size")]
    HugepageSize {
        /// What was asked for.
        bytes: u64,
    },
    /// A huge page size without huge pages.
    #[error("A huge page size is given but huge pages are off")]
    HugepageSizeWithoutHugepages,
    /// Something this version does not do.
    #[error("Guest RAM with {what} is not supported")]
    NotSupported {
        /// The setting.
        what: &'static str,
    },
    /// The host refused a system call.
    #[error("{operation} for {bytes} bytes of guest RAM failed")]
    Host {
        /// The system call.
        operation: &'static str,
        /// How much memory it was for.
        bytes: u64,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The mappings could not be put together.
    #[error("Cannot map {bytes} bytes of guest RAM")]
    Map {
        /// How much memory it was for.
        bytes: u64,
        /// What the mapping code said.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// KVM did not take a memory slot.
    #[error("KVM refused guest RAM at {guest_address:#x}")]
    Slot {
        /// Where the slot should have been.
        guest_address: u64,
        /// KVM's answer.
        #[source]
        source: hypervisor::Error,
    },
}
