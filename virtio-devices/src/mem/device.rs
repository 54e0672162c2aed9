//! The configuration half of virtio-mem.
//!
//! | Offset | Field of `struct virtio_mem_config` | |
//! | --- | --- | --- |
//! | 0 | `block_size` | fixed |
//! | 8 | `node_id` | fixed; 0, and not offered, without a NUMA node |
//! | 16 | `addr` | fixed |
//! | 24 | `region_size` | fixed |
//! | 32 | `usable_region_size` | the whole region |
//! | 40 | `plugged_size` | the size that the driver has plugged |
//! | 48 | `requested_size` | the size that the host requests; a change is signalled |
//!
//! All fields are read-only for the driver.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use state::{Part, Saved, State, StateError, parts, require};

use super::access::BlockAccess;
use super::handle::{MemHandle, ResizeError};
use super::region::MemRegion;
use super::shared::Shared;
use super::spec::{
    VIRTIO_F_VERSION_1, VIRTIO_ID_MEM, VIRTIO_MEM_F_ACPI_PXM, VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE,
};
use super::worker::MemWorker;
use crate::device::{
    Counters, GuestRam, Interrupt, QueueHandler, VirtioDevice, boxed, read_config_space,
};
use crate::queue::SingleQueue;
use crate::reclaim::DiscardEngine;

/// Entries of the one queue. Linux keeps a single request in flight.
const QUEUE_SIZES: [u16; 1] = [128];
/// Number of 64-bit fields; `node_id` and its padding count as one.
const FIELDS: usize = 7;
const FIELD_BYTES: usize = 8;

/// The saved state of the configuration half. The queue half saves which blocks are plugged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemState {
    /// Guest address of the region. It must not change.
    pub start: u64,
    /// Length of the region. It must not change.
    pub bytes: u64,
    /// Length of a block. It must not change.
    pub block_bytes: u64,
    /// The size that the host requests.
    pub requested_bytes: u64,
}

impl State for MemState {
    const PART: Part = parts::MEM;
}

/// Parameters of the device.
pub struct MemParams {
    /// Names the device and its thread.
    pub id: String,
    /// Its region of guest RAM: not in any memory map that the guest sees at boot.
    pub region: MemRegion,
    /// RAM with all of the region, whether blocks are open or not.
    pub ram: GuestRam,
    /// Opens and closes its blocks, which are closed.
    pub access: Arc<dyn BlockAccess>,
    /// Bytes requested initially.
    pub requested_bytes: u64,
    /// The proximity domain of the region, if the machine has NUMA nodes.
    pub node: Option<u16>,
}

crate::debug_fields!(MemParams(it) {
    id: it.id,
    region: it.region,
    requested_bytes: it.requested_bytes
});

/// A virtio-mem device, as its transport sees it.
#[derive(Debug)]
pub struct Mem {
    shared: Arc<Shared>,
    node: Option<u16>,
    /// Present until the transport takes it.
    worker: Option<MemWorker>,
}

impl Mem {
    /// Creates a device without plugged blocks, and the handle by which the VMM controls and reads it.
    ///
    /// Must be called before a seccomp filter is active, or with the calls allowed that [`DiscardEngine::new`] tries.
    ///
    /// # Errors
    /// The region cannot have the requested size.
    pub fn new(params: MemParams) -> Result<(Self, MemHandle), ResizeError> {
        let shared = Arc::new(Shared::new(params.region, params.access));
        let handle = MemHandle::new(Arc::clone(&shared));
        handle.set_requested_bytes(params.requested_bytes)?;
        let engine = DiscardEngine::new(Arc::default());
        let worker = MemWorker::new(params.id, Arc::clone(&shared), params.ram, engine);
        let device = Self {
            shared,
            node: params.node,
            worker: Some(worker),
        };
        Ok((device, handle))
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// Unplugged blocks are closed, so the driver must promise not to access them. A driver that does not promise it may
    /// run nevertheless, as the standard allows: it reads all ones.
    fn features(&self) -> u64 {
        let node = self.node.map_or(0, |_| VIRTIO_MEM_F_ACPI_PXM);
        VIRTIO_F_VERSION_1 | VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE | node
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let region = &self.shared.region;
        let fields: [u64; FIELDS] = [
            region.block_bytes(),
            u64::from(self.node.unwrap_or(0)),
            region.start(),
            region.bytes(),
            region.bytes(),
            self.shared.plugged_bytes(),
            self.shared.requested_bytes(),
        ];
        let mut space = [0; FIELDS * FIELD_BYTES];
        for (bytes, field) in space.chunks_exact_mut(FIELD_BYTES).zip(fields) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
        read_config_space(&space, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        self.shared.tally.config_writes_ignored.count();
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        boxed(self.worker.take().map(SingleQueue::new))
    }

    fn set_interrupt(&mut self, interrupt: Arc<dyn Interrupt>) {
        self.shared.interrupt.attach(&interrupt);
    }

    fn state(&self) -> Saved {
        let region = &self.shared.region;
        Saved::of(&MemState {
            start: region.start(),
            bytes: region.bytes(),
            block_bytes: region.block_bytes(),
            requested_bytes: self.shared.requested_bytes(),
        })
    }

    fn restore(&mut self, state: &Saved) -> Result<(), StateError> {
        let state = state.read::<MemState>()?;
        let region = &self.shared.region;
        for (field, saved, own) in [
            ("start", state.start, region.start()),
            ("bytes", state.bytes, region.bytes()),
            ("block_bytes", state.block_bytes, region.block_bytes()),
        ] {
            require(saved == own, parts::MEM, field, || {
                format!("is {saved:#x}, the region's is {own:#x}")
            })?;
        }
        let requested = state.requested_bytes;
        let possible =
            requested <= region.bytes() && requested.is_multiple_of(region.block_bytes());
        require(possible, parts::MEM, "requested_bytes", || {
            format!("cannot be {requested:#x}")
        })?;
        self.shared.set_requested_bytes(requested);
        Ok(())
    }

    fn counters(&self) -> Counters {
        self.shared.counters()
    }
}
