//! Guest physical memory: layout, backing of RAM, and the memory map for the guest.
//!
//! ```text
//!   MemoryConfig ─► zones ─► GuestMemory::new ─► GuestRam (shared with devices)
//!                                 │
//!                                 ├─ attach ─► RamSlots (KVM's view, removed on drop)
//!                                 ├─ map_dimm ─► Dimm, added while the guest runs
//!                                 └─ HotplugRam (opens and closes blocks of a virtio-mem device for KVM and devices)
//! ```

mod backing;
mod bus_error;
mod checksums;
mod content;
mod copy_on_write;
mod dimms;
mod e820;
mod error;
mod faults;
mod file;
mod guest_ram;
mod handed_over;
mod hotplug;
mod hugetlb_limit;
mod layers;
pub mod layout;
mod load;
mod numa_policy;
pub mod on_demand;
mod passes;
mod plugged;
mod ram_slots;
mod source;
mod state;
#[cfg(test)]
mod test_memory;
mod transfer;
mod write_tracker;
mod zone_files;
mod zones;

pub use content::{ChunkState, ContentError, ZoneContentState};
pub use copy_on_write::CopyOnWriteError;
pub use dimms::{DIMMS_MAX, Dimm, DimmError, RestoreError};
pub use e820::{E820Entry, E820Kind, e820_map};
pub use error::{MemoryError, ZoneError};
pub(crate) use faults::DeviceCover;
pub use faults::{MemoryFailure, MemoryFault, MemoryFaults};
pub use guest_ram::GuestMemory;
pub use handed_over::PrivateZone;
pub use hotplug::{MEMORY_HOTPLUG_BYTES, MemoryHotplug, MemoryHotplugState};
pub use layers::{SavedZone, ZoneFile};
pub use numa_policy::HOST_NUMA_NODE_MAX;
pub use passes::ContentFiles;
pub(crate) use plugged::PinnedBlocks;
pub use plugged::{HotplugRam, hotplug_block_bytes};
pub use ram_slots::RamSlots;
pub use state::{MemoryRangeState, MemoryState, ZoneState};
pub use transfer::{AbsentPages, Chunks, ContentWriter, PageReader, PageRun, Pages};
pub use write_tracker::{WriteTracker, WrittenPages};
pub use zone_files::ZoneFiles;
pub use zones::{DEFAULT_ZONE_ID, Zone, ZoneKind, all_shared, growing_zones, hotplug_zone_id};
