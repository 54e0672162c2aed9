//! Drives a queue handler directly, on the test's own thread.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;

use state::{Saved, StateError};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::interrupt::MockInterrupt;
use super::queue::{Chain, DriverQueue, Segment, Used};
use super::ram::TestRam;
use crate::device::{Activation, ActiveQueue, Doorbell, HandlerState, QueueHandler, WorkerError};
use crate::dma::DmaEndpoint;
use crate::worker::{EventSources, Turn, Wake};

/// Default number of entries of a queue.
const QUEUE_SIZE: u16 = 64;
/// Default number of bytes of RAM.
const RAM_BYTES: usize = 64 << 20;

/// A queue handler with a driver, without a thread in between.
///
/// ```ignore
/// let mut harness = HandlerHarness::new(handler, features);
/// harness.add_queue(0, 64);
/// harness.activate().unwrap();
/// let chain = harness.queue(0).push(&[Segment::Writable(16)]);
/// harness.kick(0).unwrap();
/// let used = harness.queue(0).pop_used().unwrap();
/// ```
pub struct HandlerHarness<H> {
    /// The handler, for tests that inspect it.
    pub handler: H,
    /// Its signals.
    pub interrupt: Arc<MockInterrupt>,
    /// Guest RAM.
    pub ram: TestRam,
    /// The IOMMU in front of the device, from the next activation on.
    pub dma: Option<Arc<DmaEndpoint>>,
    /// The handler's turns, restarted for each wake-up.
    pub turn: Turn,
    features: u64,
    queues: BTreeMap<u16, DriverQueue>,
    doorbells: BTreeMap<u16, Arc<Doorbell>>,
    sources: EventSources,
}

impl<H> std::fmt::Debug for HandlerHarness<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HandlerHarness")
            .field("features", &self.features)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

impl<H: QueueHandler> HandlerHarness<H> {
    /// `features` are those that the driver accepted. 64 MiB of RAM at 0.
    pub fn new(handler: H, features: u64) -> Self {
        Self::with_ram(handler, features, TestRam::new(RAM_BYTES))
    }

    /// The same, with RAM from the test.
    pub fn with_ram(handler: H, features: u64, ram: TestRam) -> Self {
        let sources = EventSources::new().expect("epoll descriptors are to be had");
        for (fd, token) in handler.idle_sources() {
            sources.watch_idle(fd, token).expect("source can be polled");
        }
        Self {
            handler,
            interrupt: Arc::new(MockInterrupt::default()),
            ram,
            dma: None,
            turn: Turn::default(),
            features,
            queues: BTreeMap::new(),
            doorbells: BTreeMap::new(),
            sources,
        }
    }

    /// Lays out queue `index`. The next activation hands it over.
    pub fn add_queue(&mut self, index: u16, size: u16) -> &mut DriverQueue {
        let queue = DriverQueue::new(&self.ram, size);
        let doorbell = EventFd::new(EFD_NONBLOCK).expect("eventfds are to be had");
        self.doorbells.insert(index, Arc::new(doorbell));
        self.queues.insert(index, queue);
        self.queue(index)
    }

    /// Lays out queues `0..count` of 64 entries each.
    pub fn add_queues(&mut self, count: u16) {
        for index in 0..count {
            self.add_queue(index, QUEUE_SIZE);
        }
    }

    /// The driver's side of queue `index`.
    pub fn queue(&mut self, index: u16) -> &mut DriverQueue {
        self.queues
            .get_mut(&index)
            .expect("the test has added that queue")
    }

    /// Corresponds to DRIVER_OK.
    ///
    /// # Errors
    /// The handler's error.
    pub fn activate(&mut self) -> Result<(), WorkerError> {
        let queues = self.queues.iter().map(|(index, driver)| {
            let mut queue = driver.device_queue();
            queue.set_event_idx(self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
            ActiveQueue {
                index: *index,
                queue,
                doorbell: Arc::clone(&self.doorbells[index]),
                dma: self.dma.clone(),
            }
        });
        let activation = Activation {
            mem: self.ram.mem(),
            features: self.features,
            queues: queues.collect(),
            interrupt: self.interrupt.clone(),
        };
        self.handler.activate(activation, &mut self.sources)
    }

    /// Signals the doorbell of queue `index` and serves it, repeatedly while the handler signals its own doorbell and
    /// no command is pending.
    ///
    /// # Errors
    /// The handler's error.
    pub fn kick(&mut self, index: u16) -> Result<(), WorkerError> {
        let doorbell = Arc::clone(&self.doorbells[&index]);
        doorbell.write(1).expect("doorbell is not full");
        while !self.turn.has_command() && doorbell.read().is_ok() {
            self.turn.begin();
            self.handler.queue_ready(index, &mut self.turn)?;
        }
        Ok(())
    }

    /// Serves queue `index` as for a vCPU that is held at its doorbell.
    ///
    /// # Errors
    /// The handler's error.
    pub fn kick_held(&mut self, index: u16) -> Result<(), WorkerError> {
        self.turn.begin();
        self.handler.queue_ready_while_held(index, &mut self.turn)
    }

    /// Pushes one chain, kicks, and returns the completion, if there is one by then.
    ///
    /// # Errors
    /// The handler's error.
    pub fn request(
        &mut self,
        index: u16,
        segments: &[Segment<'_>],
    ) -> Result<(Chain, Option<Used>), WorkerError> {
        let chain = self.queue(index).push(segments);
        self.kick(index)?;
        let used = self.queue(index).pop_used();
        Ok((chain, used))
    }

    /// Waits up to `timeout_ms` for the handler's own sources and serves those that are ready. Returns their number.
    ///
    /// # Errors
    /// The handler's error.
    pub fn serve_sources(&mut self, timeout_ms: i32) -> Result<usize, WorkerError> {
        let mut served = 0;
        let mut wakes = Vec::new();
        self.sources.wait(timeout_ms, &mut wakes)?;
        for wake in wakes {
            self.turn.begin();
            let (sources, turn) = (&mut self.sources, &mut self.turn);
            match wake {
                Wake::Source(token) if sources.has_source(token) => {
                    self.handler.source_ready(token, sources, turn)?;
                    served += 1;
                }
                Wake::Idle(token) => {
                    self.handler.source_ready(token, sources, turn)?;
                    served += 1;
                }
                Wake::Source(_) | Wake::Doorbell(_) | Wake::Command => {}
            }
        }
        Ok(served)
    }

    /// Resets as the worker would and clears the driver's side as well.
    pub fn reset(&mut self) {
        self.sources.clear();
        self.handler.reset();
        for queue in self.queues.values_mut() {
            queue.clear();
        }
    }
}

/// Allows the result of [`VirtioDevice::take_handlers`](crate::VirtioDevice::take_handlers) in a harness.
impl QueueHandler for Box<dyn QueueHandler> {
    fn name(&self) -> String {
        (**self).name()
    }

    fn host_cpus(&self) -> &[usize] {
        (**self).host_cpus()
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        (**self).activate(activation, sources)
    }

    fn queue_ready(&mut self, queue_index: u16, turn: &mut Turn) -> Result<(), WorkerError> {
        (**self).queue_ready(queue_index, turn)
    }

    fn queue_ready_while_held(
        &mut self,
        queue_index: u16,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        (**self).queue_ready_while_held(queue_index, turn)
    }

    fn source_ready(
        &mut self,
        token: u32,
        sources: &mut EventSources,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        (**self).source_ready(token, sources, turn)
    }

    fn idle_sources(&self) -> Vec<(RawFd, u32)> {
        (**self).idle_sources()
    }

    fn reset(&mut self) {
        (**self).reset();
    }

    fn state(&self) -> HandlerState {
        (**self).state()
    }

    fn restore(&mut self, own: Option<&Saved>) -> Result<(), StateError> {
        (**self).restore(own)
    }

    fn serves_doorbells(&self) -> bool {
        (**self).serves_doorbells()
    }

    fn pause(&mut self) {
        (**self).pause();
    }

    fn resume(&mut self) {
        (**self).resume();
    }
}
