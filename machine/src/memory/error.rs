//! Errors of creating guest memory.

use std::io;
use std::path::PathBuf;

/// Errors of creating guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size of zero, or too small to boot a payload.
    #[error("Guest RAM of {bytes} bytes is less than the minimum of {min_bytes}")]
    TooSmall {
        /// The requested size.
        bytes: u64,
        /// The minimum.
        min_bytes: u64,
    },
    /// Not a multiple of the backing's page size.
    #[error("Guest RAM of {bytes} bytes is not a multiple of the page size {page_bytes}")]
    NotPageMultiple {
        /// The requested size.
        bytes: u64,
        /// Size of the backing pages.
        page_bytes: u64,
    },
    /// RAM and the device area above it exceed the guest's physical addresses.
    #[error("Guest RAM of {bytes} bytes does not fit {phys_bits} bits of physical address")]
    AddressSpace {
        /// The requested size.
        bytes: u64,
        /// Width of the guest's physical addresses.
        phys_bits: u8,
    },
    /// The sum of the sizes in the configuration overflows 64 bits.
    #[error("The sizes of guest RAM add up to more than 64 bits")]
    SizeOverflow,
    /// Two zones use the same file and would overwrite each other's pages.
    #[error("Memory zones {first} and {second} share a file, but are not both private")]
    FileOfTwoZones {
        /// A zone.
        first: String,
        /// Another one.
        second: String,
    },
    /// Memory that is added to a zone must be other pages than those of its file.
    #[error("Memory zone {id} cannot grow, because it is a file: use a directory")]
    GrowsInFile {
        /// The zone.
        id: String,
    },
    /// One zone.
    #[error("Cannot create memory zone {id}")]
    Zone {
        /// Its name.
        id: String,
        /// The reason.
        #[source]
        source: ZoneError,
    },
    /// KVM has fewer memory slots than there are blocks for memory hot-plug.
    #[error(
        "KVM has {slots_max} memory slots, too few for {blocks} blocks of hot-plugged memory: reduce hotplug_size"
    )]
    TooFewSlots {
        /// The number of blocks.
        blocks: u64,
        /// The number of slots of a machine.
        slots_max: u32,
    },
    /// KVM rejected a memory slot.
    #[error("KVM rejected guest RAM at {guest_address:#x}")]
    Slot {
        /// The address of the slot.
        guest_address: u64,
        #[source]
        source: hypervisor::Error,
    },
}

impl MemoryError {
    /// Whether the configuration is at fault, not the host's current state: this host can never provide the requested
    /// memory.
    pub fn is_of_configuration(&self) -> bool {
        matches!(
            self,
            Self::TooSmall { .. }
                | Self::NotPageMultiple { .. }
                | Self::AddressSpace { .. }
                | Self::SizeOverflow
                | Self::FileOfTwoZones { .. }
                | Self::GrowsInFile { .. }
        )
    }
}

/// Errors of creating a zone of guest memory.
#[derive(Debug, thiserror::Error)]
pub enum ZoneError {
    /// The file does not exist, or access is denied.
    #[error("Cannot open {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Neither a file nor a directory.
    #[error("{} is neither a file nor a directory", path.display())]
    NotAFile {
        /// Its path.
        path: PathBuf,
    },
    /// The file is too short: pages beyond its end cannot be accessed.
    #[error("{} of {file_bytes} bytes is too small for {bytes} bytes of guest RAM", path.display())]
    FileTooSmall {
        /// The file.
        path: PathBuf,
        /// Its size.
        file_bytes: u64,
        /// The required size.
        bytes: u64,
    },
    /// Huge pages are configured, but the file has none.
    #[error("{} is not on a file system of huge pages", path.display())]
    FileWithoutHugePages {
        /// The file or directory.
        path: PathBuf,
    },
    /// Huge pages are configured, but the file has another size of them.
    #[error("{} has huge pages of {page_bytes} bytes, not of {wanted_bytes}", path.display())]
    FileOfOtherHugePages {
        /// The file or directory.
        path: PathBuf,
        /// The file's page size.
        page_bytes: u64,
        /// The requested page size.
        wanted_bytes: u64,
    },
    /// Not a multiple of the page size.
    #[error("{bytes} bytes are not a multiple of the page size of {page_bytes} bytes")]
    NotPageMultiple {
        /// The zone, or its part below or above the hole below 4 GiB.
        bytes: u64,
        /// Size of the pages.
        page_bytes: u64,
    },
    /// More than this process can address.
    #[error("{bytes} bytes exceed the address space of a process")]
    TooLarge {
        /// The requested size.
        bytes: u64,
    },
    /// The pool of huge pages is empty, or too small.
    #[error(
        "The host has too few free huge pages of {page_bytes} bytes for {bytes} bytes of guest RAM"
    )]
    TooFewHugePages {
        /// The required size.
        bytes: u64,
        /// Size of a huge page.
        page_bytes: u64,
    },
    /// A control group of this process permits too few huge pages.
    #[error(
        "{} leaves {left_bytes} bytes of huge pages, too few for {bytes} bytes of guest RAM: raise this limit of the control group",
        path.display()
    )]
    HugePageLimit {
        /// The file with the limit.
        path: PathBuf,
        /// What is left below it.
        left_bytes: u64,
        /// The required size.
        bytes: u64,
    },
    /// The host has no such node, or does not support memory policies.
    #[error("Cannot bind guest RAM to NUMA node {node} of the host")]
    HostNumaNode {
        /// The node.
        node: u32,
        #[source]
        source: io::Error,
    },
    /// A memory file would be larger than the process may make files.
    #[error(
        "a memory file of {bytes} bytes exceeds the limit of file sizes of this process (RLIMIT_FSIZE, ulimit -f)"
    )]
    FileSizeLimit {
        /// The amount of memory.
        bytes: u64,
        #[source]
        source: io::Error,
    },
    /// The memory file of another process cannot be this zone.
    #[error("the memory file from the other process cannot be used: {0}")]
    Foreign(&'static str),
    /// A system call failed.
    #[error("{operation} for {bytes} bytes of guest RAM failed")]
    Host {
        /// The system call.
        operation: &'static str,
        /// The amount of memory.
        bytes: u64,
        #[source]
        source: io::Error,
    },
    /// The mapping could not be made.
    #[error("Cannot map {bytes} bytes of guest RAM")]
    Map {
        /// The amount of memory.
        bytes: u64,
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
}

impl ZoneError {
    /// A memory file cannot get its size.
    pub(super) fn of_size(bytes: u64, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::FileTooLarge => Self::FileSizeLimit { bytes, source },
            _ => Self::Host {
                operation: "ftruncate",
                bytes,
                source,
            },
        }
    }
}
