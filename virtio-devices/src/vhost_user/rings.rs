//! The queues of an active device, in the form that a back end needs.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use vhost::VringConfigData;
use vhost::vhost_user::message::VhostUserInflight;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Activation, ActiveQueue, Doorbell, GuestRam, Interrupt, QueuePosition};

/// One queue.
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) index: u16,
    queue: Queue,
    pub(super) doorbell: Arc<Doorbell>,
    /// The back end signals it for an interrupt.
    pub(super) call: EventFd,
    /// The next chain that the back end takes when it starts.
    next_avail: AtomicU16,
}

/// All queues.
pub(super) struct Rings {
    pub(super) mem: GuestRam,
    pub(super) features: u64,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) rings: Vec<Ring>,
    /// The back end's record of its requests in flight, kept for its successor.
    pub(super) inflight: Mutex<Option<(VhostUserInflight, File)>>,
}

crate::debug_fields!(Rings { rings });

impl Rings {
    pub(super) fn new(activation: Activation) -> io::Result<Self> {
        let Activation {
            mem,
            features,
            queues,
            interrupt,
        } = activation;
        let rings = queues
            .into_iter()
            .map(Ring::new)
            .collect::<io::Result<_>>()?;
        Ok(Self {
            mem,
            features,
            interrupt,
            rings,
            inflight: Mutex::default(),
        })
    }

    /// Prepares for a new back end when the previous one disconnected without reporting its position.
    pub(super) fn continue_after_last_completed(&self) {
        let mem = self.mem.memory();
        for ring in &self.rings {
            ring.next_avail
                .store(ring.next_used(&mem), Ordering::Relaxed);
        }
    }

    /// The positions at which the queues continue in a restored device.
    pub(super) fn positions(&self) -> Vec<QueuePosition> {
        let mem = self.mem.memory();
        let position = |ring: &Ring| QueuePosition {
            index: ring.index,
            next_avail: ring.next_avail(),
            next_used: ring.next_used(&mem),
        };
        self.rings.iter().map(position).collect()
    }
}

impl Ring {
    fn new(active: ActiveQueue) -> io::Result<Self> {
        Ok(Self {
            index: active.index,
            next_avail: AtomicU16::new(active.queue.next_avail()),
            queue: active.queue,
            doorbell: active.doorbell,
            call: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    pub(super) fn size(&self) -> u16 {
        self.queue.size()
    }

    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail.load(Ordering::Relaxed)
    }

    /// The number of completed chains, from the used ring. The transport has checked that the ring is in RAM.
    fn next_used(&self, mem: &GuestMemoryMmap<()>) -> u16 {
        let read = self.queue.used_idx(mem, Ordering::Acquire);
        read.map_or(0, |index| index.0)
    }

    /// Stores the next chain as the back end reports it. If it is not between the last completed and the last available
    /// chain, the last completed position is stored, and the result is false.
    pub(super) fn stopped_at(&self, mem: &GuestMemoryMmap<()>, base: u32) -> bool {
        let used = self.next_used(mem);
        let available = self.queue.avail_idx(mem, Ordering::Acquire);
        let pending = available.map_or(0, |index| index.0.wrapping_sub(used));
        let valid = u16::try_from(base).is_ok_and(|base| base.wrapping_sub(used) <= pending);
        let next = if valid { base as u16 } else { used };
        self.next_avail.store(next, Ordering::Relaxed);
        valid
    }

    /// The addresses of the ring in this process; `None` if one is no longer in guest RAM.
    pub(super) fn addresses(&self, mem: &GuestMemoryMmap<()>) -> Option<VringConfigData> {
        let host = |address| {
            let host = mem.get_host_address(GuestAddress(address));
            host.ok().map(|pointer| pointer as u64)
        };
        Some(VringConfigData {
            queue_max_size: self.queue.max_size(),
            queue_size: self.queue.size(),
            flags: 0,
            desc_table_addr: host(self.queue.desc_table())?,
            used_ring_addr: host(self.queue.used_ring())?,
            avail_ring_addr: host(self.queue.avail_ring())?,
            log_addr: None,
        })
    }
}
