//! A split virtqueue as a worker serves it: chains come out resolved, used
//! buffers go in, and the driver is interrupted only when it asked for it
//! (virtio 1.2 §2.7).

use std::fmt;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::device::{ActiveQueue, Doorbell, Interrupt, WorkerError};
use crate::guest_buffers::{ChainBuffers, ChainError, RamGuard};

/// One chain taken from the available ring.
#[derive(Debug)]
pub(crate) struct Popped {
    /// What the used ring wants back.
    pub(crate) head: u16,
    /// The buffers, or why they are unusable.
    pub(crate) buffers: Result<ChainBuffers, ChainError>,
}

/// A queue, its way to the driver, and whether the driver is owed an interrupt.
pub(crate) struct ServedQueue {
    index: u16,
    queue: Queue,
    doorbell: Arc<Doorbell>,
    interrupt: Arc<dyn Interrupt>,
    used_pending: bool,
}

impl fmt::Debug for ServedQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServedQueue")
            .field("index", &self.index)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

impl ServedQueue {
    pub(crate) fn new(active: ActiveQueue, features: u64, interrupt: Arc<dyn Interrupt>) -> Self {
        let mut queue = active.queue;
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        Self {
            index: active.index,
            queue,
            doorbell: active.doorbell,
            interrupt,
            used_pending: false,
        }
    }

    /// Ring size as the driver set it.
    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain.
    ///
    /// # Errors
    /// The ring cannot be read, or claims more chains than it has entries.
    pub(crate) fn pop(&mut self, ram: &RamGuard) -> Result<Option<Popped>, WorkerError> {
        let map: &GuestMemoryMmap<()> = ram;
        let index = self.index;
        let chain = self
            .queue
            .iter(map)
            .map_err(|error| unusable(index, &error))?
            .next();
        Ok(chain.map(|chain| Popped {
            head: chain.head_index(),
            buffers: ChainBuffers::collect(chain, ram),
        }))
    }

    /// Returns a chain to the driver; `bytes` is what the device wrote to it.
    /// A head out of the table cannot be returned and is dropped: the driver
    /// made it up.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub(crate) fn push_used(
        &mut self,
        ram: &RamGuard,
        head: u16,
        bytes: u32,
    ) -> Result<(), WorkerError> {
        if head >= self.queue.size() {
            return Ok(());
        }
        let map: &GuestMemoryMmap<()> = ram;
        self.queue
            .add_used(map, head, bytes)
            .map_err(|error| unusable(self.index, &error))?;
        self.used_pending = true;
        Ok(())
    }

    /// Interrupts the driver if used buffers were pushed since the last call and
    /// it wants to hear of them.
    ///
    /// # Errors
    /// The ring cannot be read.
    pub(crate) fn signal(&mut self, ram: &RamGuard) -> Result<(), WorkerError> {
        if !std::mem::take(&mut self.used_pending) {
            return Ok(());
        }
        let map: &GuestMemoryMmap<()> = ram;
        let wanted = self
            .queue
            .needs_notification(map)
            .map_err(|error| unusable(self.index, &error))?;
        if wanted {
            self.interrupt.signal_queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver not to ring while the queue is being worked off anyway.
    ///
    /// # Errors
    /// The ring cannot be written.
    pub(crate) fn disable_doorbell(&mut self, ram: &RamGuard) -> Result<(), WorkerError> {
        let map: &GuestMemoryMmap<()> = ram;
        self.queue
            .disable_notification(map)
            .map_err(|error| unusable(self.index, &error))
    }

    /// Asks the driver to ring again. True: something came in meanwhile, for
    /// which it may not have rung.
    ///
    /// # Errors
    /// The ring cannot be written or read.
    pub(crate) fn enable_doorbell(&mut self, ram: &RamGuard) -> Result<bool, WorkerError> {
        let map: &GuestMemoryMmap<()> = ram;
        self.queue
            .enable_notification(map)
            .map_err(|error| unusable(self.index, &error))
    }

    /// Rings the doorbell on the driver's behalf: the handler stops at its bound
    /// and wants to be called again after the others.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    pub(crate) fn ring_again(&self) -> Result<(), WorkerError> {
        self.doorbell.write(1).map_err(|source| WorkerError::Host {
            what: "ringing a doorbell",
            source,
        })
    }
}

fn unusable(index: u16, error: &virtio_queue::Error) -> WorkerError {
    WorkerError::Queue {
        index,
        reason: error.to_string(),
    }
}
