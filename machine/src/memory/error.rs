//! Why guest memory cannot be made.

use std::io;
use std::path::PathBuf;

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
    /// Two zones that share their pages would write over each other.
    #[error("Memory zones {first} and {second} are made of one file, and not private both")]
    FileOfTwoZones {
        /// A zone.
        first: String,
        /// Another one.
        second: String,
    },
    /// One zone.
    #[error("Cannot make memory zone {id}")]
    Zone {
        /// Its name.
        id: String,
        /// Why.
        #[source]
        source: ZoneError,
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

impl MemoryError {
    /// Whether the configuration is at fault and not the host's state: what was asked for can
    /// never be had on this host.
    pub fn is_of_configuration(&self) -> bool {
        matches!(
            self,
            Self::TooSmall { .. }
                | Self::NotPageMultiple { .. }
                | Self::AddressSpace { .. }
                | Self::SizeOverflow
                | Self::FileOfTwoZones { .. }
        )
    }
}

/// Why a zone of guest memory cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ZoneError {
    /// The file is not there, or not ours to open.
    #[error("Cannot open {}", path.display())]
    Open {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Neither a file nor a directory.
    #[error("{} is neither a file nor a directory", path.display())]
    NotAFile {
        /// What it is called.
        path: PathBuf,
    },
    /// Pages beyond the end of a file cannot be touched.
    #[error("{} of {file_bytes} bytes is too small for {bytes} bytes of guest RAM", path.display())]
    FileTooSmall {
        /// The file.
        path: PathBuf,
        /// What it holds.
        file_bytes: u64,
        /// What is needed.
        bytes: u64,
    },
    /// Huge pages of a file that has none.
    #[error("{} is not on a file system of huge pages", path.display())]
    FileWithoutHugePages {
        /// The file or directory.
        path: PathBuf,
    },
    /// Huge pages of a file that has others.
    #[error("{} has huge pages of {page_bytes} bytes, not of {wanted_bytes}", path.display())]
    FileOfOtherHugePages {
        /// The file or directory.
        path: PathBuf,
        /// What it has.
        page_bytes: u64,
        /// What was asked for.
        wanted_bytes: u64,
    },
    /// Not a whole number of the pages it is made of.
    #[error("{bytes} bytes are no multiple of its page size, {page_bytes} bytes")]
    NotPageMultiple {
        /// The zone, or its part before or behind the hole below 4 GiB.
        bytes: u64,
        /// Size of the pages.
        page_bytes: u64,
    },
    /// More than this process can address.
    #[error("{bytes} bytes are more than a process can address")]
    TooLarge {
        /// What was asked for.
        bytes: u64,
    },
    /// The pool of huge pages is empty, or too small.
    #[error(
        "The host has not enough free huge pages of {page_bytes} bytes for {bytes} bytes of guest RAM"
    )]
    TooFewHugePages {
        /// What is needed.
        bytes: u64,
        /// Size of a huge page.
        page_bytes: u64,
    },
    /// The host has no such node, or no memory policies.
    #[error("Cannot bind guest RAM to NUMA node {node} of the host")]
    HostNumaNode {
        /// The node.
        node: u32,
        /// What the system said.
        #[source]
        source: io::Error,
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
    /// The mapping could not be made.
    #[error("Cannot map {bytes} bytes of guest RAM")]
    Map {
        /// How much memory it was for.
        bytes: u64,
        /// What the mapping code said.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
}
