//! The queues of an active device, in the form that a back end needs.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use vhost::VringConfigData;
use vhost::vhost_user::message::VhostUserInflight;
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ledger::{BothRings, Ledger};
use crate::Unpoisoned;
use crate::device::{Activation, ActiveQueue, Doorbell, GuestRam, Interrupt, QueuePosition};

/// `flags` and `idx` of either ring (virtio 1.2 §2.7), and an entry.
const AVAIL_HEADER_BYTES: u64 = 4;
const AVAIL_BYTES: u64 = 2;
const USED_HEADER_BYTES: u64 = 4;
const USED_BYTES: u64 = 8;

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
    /// Used if the back end keeps no record of its own.
    ledger: Mutex<Ledger>,
}

/// A ring and the memory that it is in.
struct InMemory<'a>(&'a Queue, &'a GuestMemoryMmap<()>);

impl BothRings for InMemory<'_> {
    fn indices(&self) -> (u16, u16) {
        let Self(queue, mem) = self;
        // The transport has checked that the rings are in RAM.
        let used = queue.used_idx(*mem, Ordering::Acquire);
        let available = queue.avail_idx(*mem, Ordering::Acquire);
        (
            available.map_or(0, |index| index.0),
            used.map_or(0, |index| index.0),
        )
    }

    fn available(&self, index: u16) -> Option<u16> {
        self.1
            .load(self.available_at(index), Ordering::Relaxed)
            .ok()
    }

    fn used(&self, index: u16) -> Option<u32> {
        let Self(queue, mem) = self;
        let at = USED_HEADER_BYTES + USED_BYTES * u64::from(index % queue.size());
        let address = GuestAddress(queue.used_ring()).checked_add(at)?;
        mem.load(address, Ordering::Relaxed).ok()
    }
}

impl InMemory<'_> {
    fn available_at(&self, index: u16) -> GuestAddress {
        let Self(queue, _) = self;
        let at = AVAIL_HEADER_BYTES + AVAIL_BYTES * u64::from(index % queue.size());
        // Bounded by the check of the transport.
        GuestAddress(queue.avail_ring()).unchecked_add(at)
    }
}

/// All queues.
pub(super) struct Rings {
    pub(super) mem: GuestRam,
    pub(super) features: u64,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) rings: Vec<Ring>,
    /// The back end's record of its requests in flight, kept for its successor.
    pub(super) inflight: Mutex<Option<(VhostUserInflight, File)>>,
    is_recorded: AtomicBool,
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
            is_recorded: AtomicBool::new(false),
        })
    }

    /// Prepares the rings for the successor of a back end that disconnected without reporting its position. Returns the
    /// number of requests that may be lost or repeated.
    pub(super) fn continue_after_loss(&self) -> u64 {
        let mem = self.mem.memory();
        let recorded = self.inflight.lock().unpoisoned().is_some();
        let rings = self.rings.iter();
        rings.map(|ring| ring.after_loss(&mem, recorded)).sum()
    }

    /// Follows a ring whose back end has no record of its requests in flight.
    pub(super) fn follow(&self, ring: &Ring) {
        if !self.is_recorded.load(Ordering::Relaxed) {
            let mem = self.mem.memory();
            let mut ledger = ring.ledger.lock().unpoisoned();
            ledger.follow(&InMemory(&ring.queue, &mem));
        }
    }

    /// Called when a back end gets the rings, which may keep a record of its requests.
    pub(super) fn begin(&self, recorded: bool) {
        self.is_recorded.store(recorded, Ordering::Relaxed);
        if recorded {
            for ring in &self.rings {
                ring.ledger.lock().unpoisoned().lose_track();
            }
        } else {
            *self.inflight.lock().unpoisoned() = None;
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
        let (next_avail, next_used) = (active.queue.next_avail(), active.queue.next_used());
        let mut ledger = Ledger::new(active.queue.size(), next_used);
        if next_avail != next_used {
            ledger.lose_track();
        }
        Ok(Self {
            index: active.index,
            next_avail: AtomicU16::new(next_avail),
            ledger: Mutex::new(ledger),
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

    /// The successor continues after the last completed chain. If the requests in flight are known, they are put there:
    /// the driver never reads these entries again, and adds its next one behind them.
    fn after_loss(&self, mem: &GuestMemoryMmap<()>, recorded: bool) -> u64 {
        let used = self.next_used(mem);
        self.next_avail.store(used, Ordering::Relaxed);
        if recorded {
            return 0;
        }
        let rings = InMemory(&self.queue, mem);
        let mut ledger = self.ledger.lock().unpoisoned();
        ledger.follow(&rings);
        let Some(heads) = ledger.in_flight() else {
            let available = rings.indices().0;
            return available.wrapping_sub(used).min(self.size()).into();
        };
        for (offset, head) in (0..).zip(heads) {
            let address = rings.available_at(used.wrapping_add(offset));
            if mem.store(head, address, Ordering::Relaxed).is_err() {
                return 1;
            }
        }
        0
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
