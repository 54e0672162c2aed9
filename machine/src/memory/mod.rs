//! Guest physical memory: layout, backing of RAM, and the memory map for the guest.
//!
//! ```text
//!   MemoryConfig ─► zones ─► GuestMemory::new ─► GuestRam (shared with devices)
//!                                 │
//!                                 └─ attach ─► RamSlots (KVM's view, removed on drop)
//! ```

mod backing;
mod content;
mod e820;
mod error;
mod file;
mod guest_ram;
pub mod layout;
mod numa_policy;
mod source;
mod state;
mod zones;

pub use content::{ChunkState, ContentError, ZoneContentState};
pub use e820::{E820Entry, E820Kind, e820_map};
pub use error::{MemoryError, ZoneError};
pub use guest_ram::{GuestMemory, RamSlots};
pub use numa_policy::HOST_NUMA_NODE_MAX;
pub use state::{MemoryRangeState, MemoryState, ZoneState};
pub use zones::{DEFAULT_ZONE_ID, HOTPLUG_ZONE_ID, Zone, all_shared};
