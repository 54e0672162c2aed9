//! Memory hot-plug by blocks (virtio-mem, virtio 1.2 §5.15).
//!
//! ```text
//!   control thread ── MemHandle ──┐                  ┌── Mem: VirtioDevice (vCPU threads)
//!     requested size, figures     ├── Shared (Arc) ──┤     features, configuration space
//!                                 │                  └── MemWorker: QueueHandler (own thread)
//!                                                          plug, unplug, state ─► BlockAccess, DiscardEngine
//! ```
//!
//! The device owns one region of guest RAM, divided into blocks. The host requests a number of bytes. The guest plugs
//! blocks until it has that many, or unplugs blocks that it can spare. The VMM maps the region from the start, which
//! costs nothing until it is touched. Guest and devices can access only plugged blocks. Plugging opens a block
//! ([`BlockAccess`]); unplugging closes it and then discards it. A block counts as unplugged only after its memory has
//! been returned to the host.
//!
//! Errors are contained as follows. An invalid request gets an error response, is counted, and changes nothing. A block
//! that the host cannot open, close or discard keeps its state, and the guest must try again. A guest that accesses
//! blocks without plugging them gets no memory, and its accesses are counted.

mod access;
mod blocks;
mod device;
mod handle;
mod region;
mod request;
mod shared;
mod worker;

#[cfg(test)]
mod tests;

pub use access::BlockAccess;
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
    /// `node_id` is valid: the ACPI proximity domain of the region.
    pub const VIRTIO_MEM_F_ACPI_PXM: u64 = 1 << 0;
    /// The driver never accesses unplugged blocks, not even to read.
    pub const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

    /// Plug blocks.
    pub const VIRTIO_MEM_REQ_PLUG: u16 = 0;
    /// Unplug blocks.
    pub const VIRTIO_MEM_REQ_UNPLUG: u16 = 1;
    /// Unplug every block.
    pub const VIRTIO_MEM_REQ_UNPLUG_ALL: u16 = 2;
    /// Query whether blocks are plugged.
    pub const VIRTIO_MEM_REQ_STATE: u16 = 3;

    /// The request was executed.
    pub const VIRTIO_MEM_RESP_ACK: u16 = 0;
    /// Rejected for now: the request would exceed the requested size.
    pub const VIRTIO_MEM_RESP_NACK: u16 = 1;
    /// Rejected for now: try again.
    pub const VIRTIO_MEM_RESP_BUSY: u16 = 2;
    /// Rejected permanently: the request is invalid.
    pub const VIRTIO_MEM_RESP_ERROR: u16 = 3;

    /// All blocks are plugged.
    pub const VIRTIO_MEM_STATE_PLUGGED: u16 = 0;
    /// No block is plugged.
    pub const VIRTIO_MEM_STATE_UNPLUGGED: u16 = 1;
    /// Some blocks are plugged.
    pub const VIRTIO_MEM_STATE_MIXED: u16 = 2;
}
