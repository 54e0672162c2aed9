//! A split virtqueue as a worker serves it: it takes resolved chains, returns used buffers, and interrupts the driver
//! only on request (virtio 1.2 §2.7).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::buffers::{ChainBuffers, ChainError, GuestBuffers, RamGuard};
use super::dma::{DmaMemory, OwnedDmaMemory};
use super::walk::{Chain, each_writable};
use crate::device::{
    Activation, ActiveQueue, Doorbell, GuestRam, Interrupt, QueuePosition, WorkerError, position_of,
};
use crate::dma::DmaEndpoint;
use crate::worker::Turn;
use crate::write_log::WriteLog;

/// One chain taken from the available ring.
#[derive(Debug)]
pub(crate) struct Popped {
    /// The head for the used ring.
    pub(crate) head: u16,
    /// The buffers, or the reason why they are unusable.
    pub(crate) buffers: Result<ChainBuffers, ChainError>,
}

/// The result of [`ServedQueue::next`].
#[derive(Debug)]
pub(crate) enum Next<T> {
    /// The next available chain.
    Chain(T),
    /// The ring is empty.
    Empty,
    /// The turn is over. The queue has signalled its own doorbell, so the worker serves it again.
    TurnOver,
}

/// A queue, its interrupt, and whether the driver must still be interrupted.
pub(crate) struct ServedQueue {
    index: u16,
    queue: Queue,
    doorbell: Arc<Doorbell>,
    dma: Option<Arc<DmaEndpoint>>,
    interrupt: Arc<dyn Interrupt>,
    /// Number of used buffers pushed since the last interrupt decision.
    used_pending: u16,
    writes: Arc<WriteLog>,
}

crate::debug_fields!(ServedQueue { index, queue });

impl Activation {
    /// Guest RAM, and the queues in the form in which a worker serves them.
    pub(crate) fn serve(self) -> (GuestRam, impl Iterator<Item = ServedQueue>) {
        let Self {
            mem,
            features,
            queues,
            interrupt,
        } = self;
        let queues = queues.into_iter().map({
            let mem = mem.clone();
            move |queue| ServedQueue::new(queue, features, Arc::clone(&interrupt), &mem)
        });
        (mem, queues)
    }
}

impl ServedQueue {
    /// The queue's rings and buffers are in `ram`.
    pub(crate) fn new(
        active: ActiveQueue,
        features: u64,
        interrupt: Arc<dyn Interrupt>,
        ram: &GuestRam,
    ) -> Self {
        let mut queue = active.queue;
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        Self {
            index: active.index,
            queue,
            doorbell: active.doorbell,
            dma: active.dma,
            interrupt,
            used_pending: 0,
            writes: Arc::clone(ram.writes()),
        }
    }

    /// Guest memory as this queue addresses it.
    fn memory<'m>(&self, ram: &'m GuestMemoryMmap<()>) -> DmaMemory<'m> {
        DmaMemory {
            ram,
            access: self.dma.as_ref().map(DmaEndpoint::access),
        }
    }

    /// Whether the device is behind an IOMMU. The guest may then unmap buffers at any time, so that the device can keep
    /// none for later.
    pub(crate) fn is_translated(&self) -> bool {
        self.dma.is_some()
    }

    /// Number of the queue in the device.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// The progress of the queue.
    pub(crate) fn position(&self) -> QueuePosition {
        position_of(self.index, &self.queue)
    }

    /// Ring size as the driver set it.
    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain, resolved, unless the turn is over.
    ///
    /// # Errors
    /// The ring cannot be read, or claims more chains than it has entries.
    pub(crate) fn next(
        &mut self,
        ram: &RamGuard,
        turn: &mut Turn,
    ) -> Result<Next<Popped>, WorkerError> {
        Ok(match self.next_chain(ram, turn)? {
            Next::Chain(chain) => Next::Chain(Popped {
                head: chain.head_index(),
                buffers: ChainBuffers::collect(chain, ram, turn),
            }),
            Next::Empty => Next::Empty,
            Next::TurnOver => Next::TurnOver,
        })
    }

    /// Takes the next chain with at least `bytes_min` device-writable bytes. `refuse` is called for every other chain,
    /// which is returned to the driver immediately.
    ///
    /// # Errors
    /// As for [`ServedQueue::next`].
    pub(crate) fn next_writable(
        &mut self,
        ram: &RamGuard,
        bytes_min: usize,
        turn: &mut Turn,
        refuse: impl Fn(),
    ) -> Result<Next<(u16, GuestBuffers)>, WorkerError> {
        loop {
            let Popped { head, buffers } = match self.next(ram, turn)? {
                Next::Chain(popped) => popped,
                Next::Empty => return Ok(Next::Empty),
                Next::TurnOver => return Ok(Next::TurnOver),
            };
            match buffers {
                Ok(buffers) if buffers.writable.bytes() >= bytes_min => {
                    return Ok(Next::Chain((head, buffers.writable)));
                }
                _ => refuse(),
            }
            self.push_used(ram, head, 0)?;
        }
    }

    /// Takes the next available chain unresolved, unless the turn is over.
    ///
    /// # Errors
    /// As for [`ServedQueue::next`].
    pub(crate) fn next_chain<'m>(
        &mut self,
        map: &'m GuestMemoryMmap<()>,
        turn: &mut Turn,
    ) -> Result<Next<Chain<'m>>, WorkerError> {
        if turn.is_over() {
            self.ring_again()?;
            return Ok(Next::TurnOver);
        }
        let index = self.index;
        let memory = OwnedDmaMemory(self.memory(map));
        let chain = self
            .queue
            .iter(memory)
            .map_err(|error| unusable(index, &error))?
            .next();
        Ok(match chain {
            Some(chain) => {
                turn.charge_chain();
                Next::Chain(chain)
            }
            None => Next::Empty,
        })
    }

    /// The number of chains available now. A handler that must not take later chains counts them before it starts.
    ///
    /// # Errors
    /// As for [`ServedQueue::next`].
    pub(crate) fn available(&self, map: &GuestMemoryMmap<()>) -> Result<u16, WorkerError> {
        let end = self.queue.avail_idx(&self.memory(map), Ordering::Acquire);
        let end = end.map_err(|error| unusable(self.index, &error))?;
        let count = end.0.wrapping_sub(self.queue.next_avail());
        if count > self.queue.size() {
            return Err(unusable(self.index, &QueueError::InvalidAvailRingIndex));
        }
        Ok(count)
    }

    /// Puts the last `count` popped chains back, as if they had never been taken.
    pub(crate) fn unpop(&mut self, count: u16) {
        let next_avail = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next_avail);
    }

    /// As [`ServedQueue::unpop`], for work that a command interrupts: the doorbell is signalled, so the worker serves
    /// the queue again.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    pub(crate) fn put_back(&mut self, count: u16) -> Result<(), WorkerError> {
        self.unpop(count);
        self.ring_again()
    }

    /// Returns a chain to the driver; `bytes` is the number of bytes that the device wrote. A head outside of the table
    /// is dropped, see [`ServedQueue::push_used_together`].
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub(crate) fn push_used(
        &mut self,
        map: &GuestMemoryMmap<()>,
        head: u16,
        bytes: u32,
    ) -> Result<(), WorkerError> {
        self.push_used_together(map, [(head, bytes)])
    }

    /// Returns several chains at once: the driver sees all of them or none, as required for a packet spread over
    /// several chains (virtio 1.2 §5.1.6.4). Heads outside of the table are invalid driver input and are dropped,
    /// because they cannot be returned.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub(crate) fn push_used_together(
        &mut self,
        map: &GuestMemoryMmap<()>,
        chains: impl IntoIterator<Item = (u16, u32)>,
    ) -> Result<(), WorkerError> {
        let map = self.memory(map);
        let size = self.queue.size();
        let ring = self.queue.used_ring();
        let mut next_used = self.queue.next_used();
        for (head, bytes) in chains.into_iter().filter(|(head, _)| *head < size) {
            self.log_chain(&map, head);
            let at = ring + 4 + 8 * u64::from(next_used % size);
            let element = u64::from(bytes) << 32 | u64::from(head);
            map.write_obj(element.to_le(), GuestAddress(at))
                .map_err(|error| unusable(self.index, &error))?;
            next_used = next_used.wrapping_add(1);
            self.used_pending = self.used_pending.saturating_add(1);
        }
        self.queue.set_next_used(next_used);
        // Release: the elements are visible before the index is.
        map.store(next_used.to_le(), GuestAddress(ring + 2), Ordering::Release)
            .map_err(|error| unusable(self.index, &error))?;
        self.log_used_ring(&map);
        Ok(())
    }

    /// Records the buffers of a chain that the device could write. A driver that changes the chain before it is
    /// returned harms only its own guest.
    fn log_chain(&self, memory: &DmaMemory<'_>, head: u16) {
        if self.writes.is_on() {
            let table = GuestAddress(self.queue.desc_table());
            each_writable(memory, table, self.queue.size(), head, |start, bytes| {
                self.log(memory, start, bytes);
            });
        }
    }

    /// Records the used ring, which ends with the index for the driver's notifications.
    fn log_used_ring(&self, memory: &DmaMemory<'_>) {
        if self.writes.is_on() {
            let bytes = 6 + 8 * u64::from(self.queue.size());
            self.log(memory, self.queue.used_ring(), bytes);
        }
    }

    fn log(&self, memory: &DmaMemory<'_>, start: u64, bytes: u64) {
        memory.each_written_piece(start, bytes, |start, bytes| {
            self.writes.record(start, bytes);
        });
    }

    /// Interrupts the driver if used buffers were pushed since the last call and it requested an interrupt.
    ///
    /// # Errors
    /// The ring cannot be read.
    pub(crate) fn signal(&mut self, map: &GuestMemoryMmap<()>) -> Result<(), WorkerError> {
        let pushed = std::mem::take(&mut self.used_pending);
        if pushed == 0 {
            return Ok(());
        }
        // The index must be visible before the driver's request is read; the driver uses the opposite order.
        fence(Ordering::SeqCst);
        if self.driver_wants_interrupt(map, pushed)? {
            self.interrupt.signal_queue(self.index);
        }
        Ok(())
    }

    /// With `VIRTIO_F_EVENT_IDX`: whether the index that the driver waits for is among the last `pushed` ones. Without:
    /// whether the driver has interrupts enabled (virtio 1.2 §2.7.7.2).
    fn driver_wants_interrupt(
        &self,
        map: &GuestMemoryMmap<()>,
        pushed: u16,
    ) -> Result<bool, WorkerError> {
        let map = self.memory(map);
        let ring = self.queue.avail_ring();
        let field = |offset: u64| -> Result<u16, WorkerError> {
            map.load(GuestAddress(ring + offset), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(|error| unusable(self.index, &error))
        };
        if self.queue.event_idx_enabled() {
            let used_event = field(4 + 2 * u64::from(self.queue.size()))?;
            let distance = self.queue.next_used().wrapping_sub(used_event);
            return Ok(distance.wrapping_sub(1) < pushed);
        }
        Ok(u32::from(field(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Tells the driver not to notify while the queue is being processed anyway.
    ///
    /// # Errors
    /// The ring cannot be written.
    pub(crate) fn disable_doorbell(
        &mut self,
        map: &GuestMemoryMmap<()>,
    ) -> Result<(), WorkerError> {
        let memory = self.memory(map);
        self.queue
            .disable_notification(&memory)
            .map_err(|error| unusable(self.index, &error))?;
        self.log_used_ring(&memory);
        Ok(())
    }

    /// Re-enables the driver's notifications. True: chains arrived in the meantime without a notification.
    ///
    /// # Errors
    /// The ring cannot be written or read.
    pub(crate) fn enable_doorbell(
        &mut self,
        map: &GuestMemoryMmap<()>,
    ) -> Result<bool, WorkerError> {
        let memory = self.memory(map);
        let arrived = self
            .queue
            .enable_notification(&memory)
            .map_err(|error| unusable(self.index, &error))?;
        self.log_used_ring(&memory);
        Ok(arrived)
    }

    /// Signals the doorbell on the driver's behalf: the handler stops with work left and must be called again after
    /// other events.
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

fn unusable(index: u16, error: &dyn std::fmt::Display) -> WorkerError {
    WorkerError::Queue {
        index,
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::queue::walk::DESCRIPTORS_MAX;
    use crate::testing::{Desc, DriverQueue, MockInterrupt, Segment, TestRam};
    use virtio_bindings::bindings::virtio_ring::{
        VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    };
    use vm_memory::GuestAddressSpace;

    const SIZE: u16 = 8;

    struct Rig {
        ram: TestRam,
        driver: DriverQueue,
        queue: ServedQueue,
        interrupt: Arc<MockInterrupt>,
    }

    fn take(queue: &mut ServedQueue, ram: &RamGuard) -> Option<u16> {
        match queue.next(ram, &mut Turn::default()).unwrap() {
            Next::Chain(popped) => Some(popped.head),
            Next::Empty => None,
            Next::TurnOver => panic!("a new turn is not over"),
        }
    }

    impl Rig {
        fn new(features: u64) -> Self {
            let ram = TestRam::new(1 << 20);
            let driver = DriverQueue::new(&ram, SIZE);
            let interrupt = Arc::new(MockInterrupt::default());
            let active = ActiveQueue {
                index: 3,
                queue: driver.device_queue(),
                doorbell: Arc::new(Doorbell::new(EFD_NONBLOCK).unwrap()),
                dma: None,
            };
            let queue = ServedQueue::new(active, features, interrupt.clone(), &ram.mem());
            Self {
                ram,
                driver,
                queue,
                interrupt,
            }
        }

        fn push_and_pop(&mut self) -> u16 {
            self.driver
                .push(&[Segment::WritableAt(GuestAddress(0x8_0000), 16)]);
            let ram = self.ram.mem().memory();
            take(&mut self.queue, &ram).expect("just pushed")
        }

        /// Returns `count` chains at once and reports whether an interrupt was sent.
        fn use_chains(&mut self, count: usize) -> bool {
            let heads: Vec<(u16, u32)> = (0..count).map(|_| (self.push_and_pop(), 1)).collect();
            let ram = self.ram.mem().memory();
            let before = self.interrupt.queue_signals(3);
            self.queue.push_used_together(&ram, heads).unwrap();
            self.queue.signal(&ram).unwrap();
            for _ in 0..count {
                assert!(self.driver.pop_used().is_some());
            }
            self.interrupt.queue_signals(3) > before
        }

        fn write_avail(&self, offset: u64, value: u16) {
            let at = GuestAddress(self.driver.avail_ring().0 + offset);
            self.ram.write(at, &value.to_le_bytes());
        }
    }

    #[test]
    fn signal_with_event_idx_comes_only_at_the_index_asked_for() {
        let mut rig = Rig::new(1 << VIRTIO_RING_F_EVENT_IDX);
        let used_event = 4 + 2 * u64::from(SIZE);
        rig.write_avail(used_event, 2);
        assert!(!rig.use_chains(1));
        assert!(!rig.use_chains(1));
        assert!(rig.use_chains(1));
        assert!(!rig.use_chains(1));
        // The event index is inside the pushed range.
        rig.write_avail(used_event, 5);
        assert!(rig.use_chains(4));
        // Wraps around the 16-bit index.
        rig.write_avail(used_event, 0);
        let mut signals = 0;
        for _ in 0..(1 << 16) / 4 {
            signals += u32::from(rig.use_chains(4));
        }
        assert_eq!(signals, 1);
    }

    #[test]
    fn signal_without_event_idx_obeys_the_flag() {
        let mut rig = Rig::new(0);
        assert!(rig.use_chains(1));
        rig.write_avail(0, VRING_AVAIL_F_NO_INTERRUPT as u16);
        assert!(!rig.use_chains(1));
        rig.write_avail(0, 0);
        assert!(rig.use_chains(1));
        // No buffer was used, so no interrupt is sent.
        let ram = rig.ram.mem().memory();
        rig.queue.signal(&ram).unwrap();
        assert_eq!(rig.interrupt.queue_signals(3), 2);
    }

    /// The recorded pages of the RAM of `rig`.
    fn written_pages(rig: &Rig) -> Vec<u64> {
        let mut pages = Vec::new();
        rig.ram.mem().writes().take(|_, words| {
            for (at, word) in (0_u64..).zip(words) {
                pages.extend(
                    (0..64)
                        .filter(|bit| word & 1 << bit != 0)
                        .map(|bit| at * 64 + bit),
                );
            }
        });
        pages
    }

    #[test]
    fn what_the_device_may_have_written_is_recorded_when_the_chain_is_returned() {
        let mut rig = Rig::new(0);
        let mem = rig.ram.mem();
        mem.writes().start(std::iter::once(0..1 << 20));
        let chain = [
            Segment::Readable(b"request"),
            Segment::WritableAt(GuestAddress(0x8_0fff), 2),
            Segment::WritableAt(GuestAddress(0x9_0000), 0x3000),
        ];
        let used_ring = rig.driver.used_ring().0 / 4096;
        for is_indirect in [false, true] {
            match is_indirect {
                true => drop(rig.driver.push_indirect(&chain)),
                false => drop(rig.driver.push(&chain)),
            }
            let ram = mem.memory();
            let head = take(&mut rig.queue, &ram).unwrap();
            assert!(written_pages(&rig).is_empty(), "it may still write");
            rig.queue.push_used(&ram, head, 3).unwrap();
            let pages: Vec<_> = written_pages(&rig)
                .into_iter()
                .filter(|page| *page != used_ring)
                .collect();
            assert_eq!(pages, [0x80, 0x81, 0x90, 0x91, 0x92], "{is_indirect}");
            rig.driver.pop_used().unwrap();
        }
        let ram = mem.memory();
        rig.queue.enable_doorbell(&ram).unwrap();
        assert_eq!(written_pages(&rig), [used_ring]);
    }

    #[test]
    fn chain_that_the_driver_has_broken_meanwhile_is_recorded_up_to_its_fault() {
        let rig = Rig::new(0);
        let table = rig.driver.desc_table();
        let ram = rig.ram.mem().memory();
        let memory = rig.queue.memory(&ram);
        let entry = |slot, addr: u64, flags: u32, next| {
            let flags = flags as u16;
            rig.driver.write_desc(
                slot,
                Desc {
                    addr,
                    len: 16,
                    flags,
                    next,
                },
            );
        };
        let visited = |head, size| {
            let mut seen = Vec::new();
            each_writable(&memory, table, size, head, |start, bytes| {
                seen.push((start, bytes));
            });
            seen
        };
        let loops = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE;
        entry(0, 0x8_0000, loops, 1);
        entry(1, 0x9_0000, loops, 0);
        assert_eq!(visited(0, SIZE).len(), DESCRIPTORS_MAX);
        entry(1, 0x9_0000, loops, SIZE);
        assert_eq!(visited(0, SIZE), [(0x8_0000, 16), (0x9_0000, 16)]);
        // An indirect table whose entry is another one, and a table outside RAM.
        entry(2, table.0 + 32, VRING_DESC_F_INDIRECT, 0);
        assert_eq!(visited(2, SIZE), []);
        entry(2, u64::MAX - 8, VRING_DESC_F_INDIRECT, 0);
        assert_eq!(visited(2, SIZE), []);
        assert_eq!(visited(SIZE, SIZE), []);
    }

    #[test]
    fn last_buffer_of_the_longest_indirect_chain_is_recorded() {
        let rig = Rig::new(0);
        let (table, last) = (GuestAddress(0xa_0000), DESCRIPTORS_MAX as u16 - 1);
        for at in 0..=last {
            let flags = match at == last {
                true => VRING_DESC_F_WRITE,
                false => VRING_DESC_F_NEXT,
            };
            let mut entry = 0x8_0000_u64.to_le_bytes().to_vec();
            entry.extend(1_u32.to_le_bytes());
            entry.extend((flags as u16).to_le_bytes());
            entry.extend((at + 1).to_le_bytes());
            rig.ram
                .write(GuestAddress(table.0 + 16 * u64::from(at)), &entry);
        }
        rig.driver.write_desc(
            0,
            Desc {
                addr: table.0,
                len: 16 * DESCRIPTORS_MAX as u32,
                flags: VRING_DESC_F_INDIRECT as u16,
                next: 0,
            },
        );
        let ram = rig.ram.mem().memory();
        let memory = rig.queue.memory(&ram);
        let mut seen = Vec::new();
        each_writable(&memory, rig.driver.desc_table(), SIZE, 0, |start, bytes| {
            seen.push((start, bytes));
        });
        assert_eq!(seen, [(0x8_0000, 1)]);
    }

    #[test]
    fn chains_put_back_come_again_in_order() {
        let mut rig = Rig::new(0);
        let heads = [rig.push_and_pop(), rig.push_and_pop(), rig.push_and_pop()];
        rig.queue.unpop(2);
        let ram = rig.ram.mem().memory();
        for head in &heads[1..] {
            assert_eq!(take(&mut rig.queue, &ram), Some(*head));
        }
        assert_eq!(take(&mut rig.queue, &ram), None);
    }

    #[test]
    fn ring_again_rings_the_doorbell() {
        let rig = Rig::new(0);
        assert!(rig.queue.doorbell.read().is_err());
        rig.queue.ring_again().unwrap();
        assert_eq!(rig.queue.doorbell.read().unwrap(), 1);
    }
}
