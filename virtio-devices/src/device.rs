//! The two halves of a virtio device and their interface.
//!
//! ```text
//!   vCPU threads                         worker thread (one per queue group)
//!   VirtioDevice  ── Activation ──────►  QueueHandler::activate
//!   (features,                           QueueHandler::queue_ready   ◄── doorbell
//!    config space) ◄── Interrupt ──────  QueueHandler::source_ready  ◄── tap, timer, …
//!                 ── reset ───────────►  QueueHandler::reset
//! ```
//!
//! Virtio 1.2 §2 (basic facilities) and §3 (initialisation) define the order: features are acknowledged once, then
//! queues are set up, then DRIVER_OK activates. A device that fails while active sets DEVICE_NEEDS_RESET and stops
//! until the driver resets it.

use std::ops::Deref;
use std::os::fd::RawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use state::{Saved, StateError, parts, require};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap, MmapRegion};

pub use crate::counters::Counters;
use crate::dma::DmaEndpoint;
use crate::dma_mapped::DmaMapped;
pub use crate::worker::{Doorbell, WorkerError};
use crate::worker::{EventSources, Turn};
use crate::write_log::WriteLog;

/// Guest RAM as every device sees it: an immutable map behind an atomic pointer, so that memory hot-plug swaps the map
/// without stopping a device.
#[derive(Clone, Debug)]
pub struct GuestRam {
    map: GuestMemoryAtomic<GuestMemoryMmap<()>>,
    writes: Arc<WriteLog>,
    dma_mapped: Arc<DmaMapped>,
}

impl GuestRam {
    /// RAM with a log of its own.
    #[must_use]
    pub fn new(map: GuestMemoryMmap<()>) -> Self {
        Self {
            map: GuestMemoryAtomic::new(map),
            writes: Arc::default(),
            dma_mapped: Arc::default(),
        }
    }

    /// Another map of the same RAM: writes through both are in one log, and memory that assigned devices can access is
    /// not discarded through either.
    #[must_use]
    pub fn other_map(&self, map: GuestMemoryMmap<()>) -> Self {
        Self {
            map: GuestMemoryAtomic::new(map),
            writes: Arc::clone(&self.writes),
            dma_mapped: Arc::clone(&self.dma_mapped),
        }
    }

    /// The log of what this process writes and discards.
    #[must_use]
    pub fn writes(&self) -> &Arc<WriteLog> {
        &self.writes
    }

    /// Memory that assigned devices can access through the virtual IOMMU.
    #[must_use]
    pub fn dma_mapped(&self) -> &Arc<DmaMapped> {
        &self.dma_mapped
    }
}

impl Deref for GuestRam {
    type Target = GuestMemoryAtomic<GuestMemoryMmap<()>>;

    fn deref(&self) -> &Self::Target {
        &self.map
    }
}

/// Notifies the driver (virtio 1.2 §2.3).
///
/// Called from worker threads and from the VMM's control thread; never blocks.
pub trait Interrupt: Send + Sync {
    /// Used buffer notification for the queue with this index.
    fn signal_queue(&self, queue_index: u16);
    /// Configuration change notification; also increments the configuration generation.
    fn signal_config(&self);
    /// The device cannot continue: sets DEVICE_NEEDS_RESET and notifies the driver.
    fn signal_needs_reset(&self);
}

/// One enabled queue, handed to the worker at activation.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Number of the queue in the device. It can differ from the position in [`Activation::queues`], because a driver
    /// may leave queues disabled.
    pub index: u16,
    /// Validated against guest RAM by the transport before activation; its event index is on if VIRTIO_F_EVENT_IDX was
    /// accepted.
    pub queue: Queue,
    /// The doorbell, watched by the worker. A handler that stops at its limit with work left writes 1 to it and is
    /// called again after other handlers' events.
    pub doorbell: Arc<Doorbell>,
    /// The IOMMU in front of the device. Its addresses are those of the rings and of every buffer.
    pub dma: Option<Arc<DmaEndpoint>>,
}

impl ActiveQueue {
    /// The device's progress in the queue.
    pub fn position(&self) -> QueuePosition {
        position_of(self.index, &self.queue)
    }
}

/// Rejects a saved state for a handler whose only state is its queues.
pub(crate) fn no_own_state(own: Option<&Saved>) -> Result<(), StateError> {
    require(own.is_none(), parts::VIRTIO_PCI, "handlers", || {
        "has a state for a handler without one".to_owned()
    })
}

/// The device's progress in a queue.
pub(crate) fn position_of(index: u16, queue: &Queue) -> QueuePosition {
    QueuePosition {
        index,
        next_avail: queue.next_avail(),
        next_used: queue.next_used(),
    }
}

/// The worker's parameters once the driver has set DRIVER_OK.
pub struct Activation {
    /// Guest RAM; load it once per batch of work, not once per descriptor.
    pub mem: GuestRam,
    /// Feature bits offered by the device and accepted by the driver.
    pub features: u64,
    /// The enabled queues of this worker's group, in ascending order of index.
    pub queues: Vec<ActiveQueue>,
    /// The interrupt to the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

crate::debug_fields!(Activation(it) {
    features: format_args!("{:#x}", it.features),
    queues: it.queues
});

/// Fills `data` from `space`, the bytes of a configuration space, at `offset`. Bytes past its end are zero.
pub(crate) fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    let at = usize::try_from(offset).unwrap_or(usize::MAX);
    let known = space.get(at..).unwrap_or_default();
    let count = known.len().min(data.len());
    data[..count].copy_from_slice(&known[..count]);
    data[count..].fill(0);
}

/// The result of [`VirtioDevice::take_handlers`] for a device with one handler; empty if the handler has already been
/// taken.
pub(crate) fn boxed<H: QueueHandler + 'static>(handler: Option<H>) -> Vec<Box<dyn QueueHandler>> {
    handler
        .into_iter()
        .map(|handler| Box::new(handler) as Box<dyn QueueHandler>)
        .collect()
}

/// The properties that a device shows to its driver. They change for a device that another process serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceIdentity {
    /// Features and configuration space are valid.
    Known,
    /// The device waits for them.
    Awaited,
    /// The device has waited long enough. It offers no feature, so no driver can use it until a later reset.
    Absent,
}

/// The configuration half of a device.
///
/// Called under a lock, by the vCPU thread that accesses a register and by the VMM's control thread. It must not block,
/// and must not panic on any input.
pub trait VirtioDevice: Send {
    /// Virtio device id (virtio 1.2 §5): 1 net, 2 block, 3 console, 4 entropy, 5 balloon, 19 socket, 23 IOMMU,
    /// 24 memory, 26 file system, 27 persistent memory, 35 watchdog.
    fn device_type(&self) -> u32;

    /// Maximum size of each queue; the length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Offered feature bits, including VIRTIO_F_VERSION_1.
    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    /// Whether [`VirtioDevice::features`] and the configuration space are known. A driver's reset lasts until they are,
    /// or until the device stops waiting for them.
    fn identity(&self) -> DeviceIdentity {
        DeviceIdentity::Known
    }

    /// Every feature bit that the device could ever offer.
    fn features_possible(&self) -> u64 {
        self.features()
    }

    /// The driver has accepted `features` (a subset of those offered) with FEATURES_OK. Called once between two resets.
    fn ack_features(&mut self, _features: u64) {}

    /// Reads the device configuration space. Bytes past its end read as zero, as does every byte of a device without
    /// one.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&[], offset, data);
    }

    /// Writes the device configuration space. Invalid writes are dropped and counted.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The queue halves, taken once when the device is attached to its transport. Each gets a worker thread.
    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>>;

    /// The handler (position in `take_handlers`) that serves this queue under the accepted features. `None`: no
    /// handler; kicks are ignored.
    fn handler_of_queue(&self, _queue_index: u16, _features: u64) -> Option<usize> {
        Some(0)
    }

    /// Whether the vCPU that signals this queue's doorbell is held until the worker has processed the queue, see
    /// [`QueueHandler::queue_ready_while_held`]. Called once, before any driver, so the result must be valid for every
    /// possible set of features.
    fn holds_notifier(&self, _queue_index: u16) -> bool {
        false
    }

    /// Called once by the transport before the guest sees the device.
    fn set_interrupt(&mut self, _interrupt: Arc<dyn Interrupt>) {}

    /// Memory that the guest maps, outside guest RAM and not behind a BAR. Called once when the device is put on the
    /// bus.
    fn memory(&self) -> Option<DeviceMemory> {
        None
    }

    /// Sets the guest address of that memory, before the guest sees the device.
    fn set_memory_start(&mut self, _start: u64) {}

    /// The driver wrote 0 to the status register. The transport resets the workers; this resets the configuration half.
    fn reset(&mut self) {}

    /// Whether another process maps guest RAM for the device. It has all of RAM then, including hot-pluggable blocks
    /// that are not plugged: a back end accepts few regions, and none after its start.
    fn ram_is_mapped_elsewhere(&self) -> bool {
        false
    }

    /// Everything that a new device with the same configuration lacks: values that a driver can see or has set, and the
    /// host's requests. Called while the handlers are paused.
    fn state(&self) -> Saved;

    /// Restores `state` into a new device. Called once, before any worker thread exists; after
    /// [`VirtioDevice::ack_features`] if a driver had accepted features.
    ///
    /// # Errors
    /// The state cannot belong to this device; the caller then drops the device.
    fn restore(&mut self, state: &Saved) -> Result<(), StateError>;

    /// Counters for `vm.counters`, in addition to those of the transport.
    fn counters(&self) -> Counters {
        Counters::new()
    }
}

/// Memory of a device that the guest maps.
#[derive(Debug, Clone)]
pub struct DeviceMemory {
    /// Readable and writable, for the guest alone.
    pub mapping: Arc<MmapRegion<()>>,
    /// The guest address when the device was saved.
    pub start: Option<u64>,
    /// Alignment of the guest address, a power of two.
    pub align_bytes: u64,
}

/// The progress in a queue: the next index in each ring, both free-running.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePosition {
    /// Number of the queue in the device.
    pub index: u16,
    /// Next chain to take.
    pub next_avail: u16,
    /// Next used entry to write.
    pub next_used: u16,
}

/// State that only a paused handler holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HandlerState {
    /// The queues that the handler serves.
    pub queues: Vec<QueuePosition>,
    /// Further state, of its own type.
    pub own: Option<Saved>,
}

impl HandlerState {
    /// The state of a handler whose only state is its queues.
    pub fn of_queues(queues: impl IntoIterator<Item = QueuePosition>) -> Self {
        Self {
            queues: queues.into_iter().collect(),
            own: None,
        }
    }
}

/// The queue half of a device; every method runs on its worker thread.
pub trait QueueHandler: Send {
    /// Name of the worker thread, at most 15 bytes: `_disk0`, `_net1_qp0`, `__balloon`.
    fn name(&self) -> String;

    /// Host CPUs on which the worker thread may run; any if empty. Read once, before the thread starts. All are below
    /// [`crate::worker::HOST_CPUS_MAX`].
    fn host_cpus(&self) -> &[usize] {
        &[]
    }

    /// The driver is ready. The handler registers its own event sources (tap, timer, ring completion) with
    /// `sources.add`; the queues' doorbells are already registered.
    ///
    /// # Errors
    /// Sets DEVICE_NEEDS_RESET.
    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut EventSources,
    ) -> Result<(), WorkerError>;

    /// The doorbell of a queue was signalled (already drained), or the VM was resumed. The handler must process
    /// available chains until the turn is over, and signal its own doorbell if chains remain. It must not wait for the
    /// guest.
    ///
    /// # Errors
    /// Sets DEVICE_NEEDS_RESET.
    fn queue_ready(&mut self, queue_index: u16, turn: &mut Turn) -> Result<(), WorkerError>;

    /// As [`QueueHandler::queue_ready`], but the vCPU that signalled the doorbell is held: its driver has done nothing
    /// after notifying the device. Only for queues for which [`VirtioDevice::holds_notifier`] returns true. Even those
    /// may be served through `queue_ready` instead, for example after a pause.
    ///
    /// # Errors
    /// Sets DEVICE_NEEDS_RESET.
    fn queue_ready_while_held(
        &mut self,
        queue_index: u16,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        self.queue_ready(queue_index, turn)
    }

    /// Whether the worker watches the doorbells. If not, the handler passes them to the process that serves the queues.
    fn serves_doorbells(&self) -> bool {
        true
    }

    /// A source registered in `activate` (or one in [`QueueHandler::idle_sources`]) is readable.
    ///
    /// # Errors
    /// Sets DEVICE_NEEDS_RESET.
    fn source_ready(
        &mut self,
        _token: u32,
        _sources: &mut EventSources,
        _turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        Ok(())
    }

    /// Descriptors watched even while the device is not active (host commands), with the token for `source_ready`.
    fn idle_sources(&self) -> Vec<(RawFd, u32)> {
        Vec::new()
    }

    /// Releases queues and drops requests in flight (waits for those that the kernel is executing). The caller has
    /// removed the sources registered in `activate`. Idempotent.
    fn reset(&mut self);

    /// State that only the handler holds. Called after [`QueueHandler::pause`].
    fn state(&self) -> HandlerState;

    /// Restores [`HandlerState::own`] of the saved handler. Called once, before its thread starts; the queues follow
    /// with the activation.
    ///
    /// # Errors
    /// The state cannot belong to this handler; the caller then drops the handler.
    fn restore(&mut self, own: Option<&Saved>) -> Result<(), StateError> {
        no_own_state(own)
    }

    /// Pauses the handler: requests in flight finish before this returns, so that guest RAM no longer changes.
    fn pause(&mut self) {}

    /// Undoes [`QueueHandler::pause`]; [`QueueHandler::queue_ready`] follows for each queue whose doorbell the worker
    /// watches.
    fn resume(&mut self) {}
}
