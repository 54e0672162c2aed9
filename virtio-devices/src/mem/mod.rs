//! Memory that comes and goes by the block (virtio-mem, virtio 1.2 §5.15).
//!
//! ```text
//!   control thread ── MemHandle ──┐                  ┌── Mem: VirtioDevice (vCPU threads)
//!     requested size, figures     ├── Shared (Arc) ──┤     features, configuration space
//!                                 │                  └── MemWorker: QueueHandler (own thread)
//!                                                          plug, unplug, state ─► DiscardEngine
//! ```
//!
//! The device owns one region of guest RAM, cut into blocks. The host says how many bytes of it the guest shall have;
//! the guest plugs blocks until it has them, or unplugs those that it can do without. The region is mapped from the
//! start and costs nothing until it is touched, so plugging is bookkeeping, and unplugging is a discard: a block counts
//! as unplugged when its memory is back at the host, and not before.
//!
//! What can go wrong, and where it ends: a request that breaks a rule is answered with an error and counted, and
//! changes nothing; a block that the host cannot take back stays plugged, and the guest is told to come again. A guest
//! that uses blocks which it has not plugged gets them, as the region is there; it can take no more than the region
//! holds, and what is resident of it shows that.

mod blocks;
mod device;
mod handle;
mod region;
mod request;
mod shared;
mod worker;

#[cfg(test)]
mod tests;

pub use device::{Mem, MemParams, MemState};
pub use handle::{MemHandle, ResizeError};
pub use region::{MemRegion, RegionError};
pub use worker::{MemBlocksState, RunState};

/// Feature bits and constants (virtio 1.2 §5.15.3, §5.15.6; include/uapi/linux/virtio_mem.h).
pub mod spec {
    /// Virtio device id.
    pub const VIRTIO_ID_MEM: u32 = 24;
    /// Modern device, from the common feature bits (virtio 1.2 §6).
    pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;
    /// The driver never touches blocks that are not plugged, not even to read.
    pub const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

    /// Plug blocks.
    pub const VIRTIO_MEM_REQ_PLUG: u16 = 0;
    /// Unplug blocks.
    pub const VIRTIO_MEM_REQ_UNPLUG: u16 = 1;
    /// Unplug every block.
    pub const VIRTIO_MEM_REQ_UNPLUG_ALL: u16 = 2;
    /// Tell whether blocks are plugged.
    pub const VIRTIO_MEM_REQ_STATE: u16 = 3;

    /// Done.
    pub const VIRTIO_MEM_RESP_ACK: u16 = 0;
    /// Not now: it would be more than is requested.
    pub const VIRTIO_MEM_RESP_NACK: u16 = 1;
    /// Not now: try again.
    pub const VIRTIO_MEM_RESP_BUSY: u16 = 2;
    /// Never: the request is wrong.
    pub const VIRTIO_MEM_RESP_ERROR: u16 = 3;

    /// All blocks are plugged.
    pub const VIRTIO_MEM_STATE_PLUGGED: u16 = 0;
    /// No block is.
    pub const VIRTIO_MEM_STATE_UNPLUGGED: u16 = 1;
    /// Some are.
    pub const VIRTIO_MEM_STATE_MIXED: u16 = 2;
}
