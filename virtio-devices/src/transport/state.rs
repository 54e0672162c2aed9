//! The saved state of a virtio-pci function, and its restoration.
//!
//! ```text
//!  pause ─► workers finish what is in flight ─► state(): registers, MSI-X, device, handlers
//!
//!  from_state: check all ─► device, handlers ─► workers, paused ─► pass queues on, signal doorbells
//!  resume ─► workers check every queue ─► an interrupt for each: the last one may have been lost
//! ```

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use ::state::{Part, Saved, State, StateError, parts, require};
use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use super::common_config::{CommonConfig, S_DRIVER_OK, S_FEATURES_OK, S_KNOWN, S_NEEDS_RESET};
use super::function::{Registers, VirtioPciFunction, lock, on_this_transport};
use super::interrupt::{ISR_KNOWN, PciInterrupt, VIRTIO_MSI_NO_VECTOR};
use crate::device::{HandlerState, QueuePosition, VirtioDevice, WorkerError};
use crate::worker::WorkerHandle;

const PART: Part = parts::VIRTIO_PCI;

/// A function whose workers are paused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioPciState {
    /// Virtio device id.
    pub device_type: u32,
    /// Feature bits offered to the driver.
    pub offered: u64,
    /// Feature bits that the driver has written.
    pub accepted: u64,
    /// Device status. A reset in progress counts as finished: the status is 0.
    pub status: u8,
    /// ISR status.
    pub isr: u8,
    /// Configuration generation.
    pub config_generation: u8,
    /// MSI-X vector of configuration changes.
    pub config_vector: u16,
    /// Selector of `device_feature`.
    pub device_feature_select: u32,
    /// Selector of `driver_feature`.
    pub driver_feature_select: u32,
    /// Selector of the queue registers.
    pub queue_select: u16,
    /// Every queue.
    pub queues: Vec<QueueState>,
    /// Configuration space, a `PciConfigState`.
    pub config_space: Saved,
    /// MSI-X, a `MsixState`.
    pub msix: Saved,
    /// The configuration half of the device, in the device's own type.
    pub device: Saved,
    /// The queue halves in the order of their workers; absent for a handler without state.
    pub handlers: Vec<Option<Saved>>,
}

impl State for VirtioPciState {
    const PART: Part = PART;
}

/// One queue, set up by the driver, with the device's progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Offered maximum size.
    pub max_size: u16,
    /// Size chosen by the driver.
    pub size: u16,
    /// The driver has enabled it.
    pub enabled: bool,
    /// Guest address of the descriptor table.
    pub desc_table: u64,
    /// Guest address of the available ring.
    pub avail_ring: u64,
    /// Guest address of the used ring.
    pub used_ring: u64,
    /// MSI-X vector.
    pub vector: u16,
    /// Absent while no worker serves the queue: before activation, or after the worker failed.
    pub position: Option<RingState>,
}

/// Free-running indices. Any pair is possible, because chains may stay uncompleted forever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RingState {
    /// Next chain to take from the available ring.
    pub next_avail: u16,
    /// Next entry to write in the used ring.
    pub next_used: u16,
}

impl VirtioPciFunction {
    /// The current state of the function. The caller must have paused it, and no vCPU may run.
    ///
    /// # Errors
    /// A worker has ended; the driver's requests are lost.
    pub fn state(&self) -> Result<VirtioPciState, WorkerError> {
        let handlers = self.workers.iter().map(WorkerHandle::state);
        let handlers = handlers.collect::<Result<Vec<HandlerState>, _>>()?;
        let positions: BTreeMap<u16, QueuePosition> = handlers
            .iter()
            .flat_map(|handler| &handler.queues)
            .map(|position| (position.index, *position))
            .collect();
        let registers = self.lock_state();
        let common = &registers.common;
        let device = lock(&self.device);
        Ok(VirtioPciState {
            device_type: device.device_type(),
            offered: common.offered,
            accepted: common.accepted,
            status: if common.is_resetting() {
                0
            } else {
                self.interrupt.status()
            },
            isr: self.interrupt.isr(),
            config_generation: self.interrupt.config_generation(),
            config_vector: self.interrupt.config_vector(),
            device_feature_select: common.device_feature_select,
            driver_feature_select: common.driver_feature_select,
            queue_select: common.queue_select,
            queues: queue_states(common, &self.interrupt, &positions),
            config_space: Saved::of(&registers.header.space.state()),
            msix: Saved::of(&registers.msix.state()),
            device: device.state(),
            handlers: handlers.into_iter().map(|handler| handler.own).collect(),
        })
    }

    /// Passes the queues that were served to their workers, which are paused.
    pub(super) fn continue_from(&self, state: &VirtioPciState) -> Result<(), StateError> {
        let mem = self.mem.memory();
        let event_idx = state.accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::new();
        let mut registers = self.lock_state();
        for (index, config) in registers.common.enabled_queues() {
            let Some(position) = state.queues[usize::from(index)].position else {
                continue;
            };
            let mut queue = config.build(&*mem, event_idx).map_err(|fault| {
                StateError::invalid(
                    PART,
                    "queues",
                    format!("are unusable: queue {index}: {fault}"),
                )
            })?;
            queue.set_next_avail(position.next_avail);
            queue.set_next_used(position.next_used);
            queues.push((index, queue));
            // Signalled doorbells are not part of the state, and the worker checks a queue only when its doorbell is
            // signalled. The counter is new, so the write cannot fail.
            self.doorbells[usize::from(index)].write(1).ok();
        }
        let served = registers.common.enabled_queues().count() == queues.len();
        registers.active = state.status & S_DRIVER_OK != 0;
        if !queues.is_empty() || registers.active && served {
            self.hand_over(&mut registers, queues);
        }
        self.owes_signals.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// After the first resume: sends interrupts that may have been in transit when the state was taken.
    pub(super) fn pay_signals(&self) {
        if !self.owes_signals.swap(false, Ordering::SeqCst) {
            return;
        }
        if self.interrupt.status() & S_DRIVER_OK != 0 {
            self.interrupt.signal_all();
        }
    }
}

fn queue_states(
    common: &CommonConfig,
    interrupt: &PciInterrupt,
    positions: &BTreeMap<u16, QueuePosition>,
) -> Vec<QueueState> {
    let queues = (0u16..).zip(&common.queues);
    queues
        .map(|(index, queue)| QueueState {
            max_size: queue.max_size,
            size: queue.size,
            enabled: queue.enabled,
            desc_table: queue.desc_table,
            avail_ring: queue.avail_ring,
            used_ring: queue.used_ring,
            vector: interrupt.queue_vector(index),
            position: positions.get(&index).map(|position| RingState {
                next_avail: position.next_avail,
                next_used: position.next_used,
            }),
        })
        .collect()
}

impl VirtioPciState {
    pub(super) fn features_are_accepted(&self) -> bool {
        self.status & S_FEATURES_OK != 0
    }

    /// Rejects states that cannot belong to a function of this device.
    pub(super) fn check(
        &self,
        device: &dyn VirtioDevice,
        common: &CommonConfig,
        handlers: usize,
    ) -> Result<(), StateError> {
        let version_1 = 1 << VIRTIO_F_VERSION_1;
        let device_type = device.device_type();
        let possible = on_this_transport(device.features_possible());
        let is = |holds, field, reason: &dyn Fn() -> String| require(holds, PART, field, reason);
        is(self.device_type == device_type, "device_type", &|| {
            format!("is {}, the device's is {device_type}", self.device_type)
        })?;
        let surplus = self.offered & !possible;
        // A device that does not know its features yet offers none.
        let usable = self.offered & version_1 != 0 || self.offered == 0 && common.offered == 0;
        is(surplus == 0 && usable, "offered", &|| {
            format!("is {:#x}, the device offers {possible:#x}", self.offered)
        })?;
        let declined = self.accepted & !self.offered;
        let negotiated = declined == 0 && self.accepted & version_1 != 0;
        is(
            negotiated || !self.features_are_accepted(),
            "accepted",
            &|| format!("has bits {declined:#x} that were not offered, or lacks VERSION_1"),
        )?;
        let active = self.status & S_DRIVER_OK != 0;
        is(
            self.status & !S_KNOWN == 0 && (!active || self.features_are_accepted()),
            "status",
            &|| format!("cannot be {:#x}", self.status),
        )?;
        is(self.isr & !ISR_KNOWN == 0, "isr", &|| {
            format!("cannot be {:#x}", self.isr)
        })?;
        is(
            common.has_vector(self.config_vector),
            "config_vector",
            &|| format!("is {}, there are {}", self.config_vector, common.vectors),
        )?;
        is(self.queues.len() == common.queues.len(), "queues", &|| {
            format!(
                "are {}, the device has {}",
                self.queues.len(),
                common.queues.len()
            )
        })?;
        is(self.handlers.len() == handlers, "handlers", &|| {
            format!("are {}, the device has {handlers}", self.handlers.len())
        })?;
        for (queue, own) in self.queues.iter().zip(&common.queues) {
            let size_is_possible = queue.max_size == own.max_size
                && (queue.size == queue.max_size
                    || queue.size.is_power_of_two() && queue.size < queue.max_size);
            let position_is_possible = queue.position.is_none() || queue.enabled && active;
            is(
                size_is_possible && position_is_possible && common.has_vector(queue.vector),
                "queues",
                &|| format!("cannot contain {queue:?}"),
            )?;
        }
        Ok(())
    }
}

impl CommonConfig {
    fn has_vector(&self, vector: u16) -> bool {
        vector < self.vectors || vector == VIRTIO_MSI_NO_VECTOR
    }

    /// Restores registers from `state`, which must have been checked.
    pub(super) fn restore(&mut self, state: &VirtioPciState, interrupt: &PciInterrupt) {
        self.offered = state.offered;
        self.accepted = state.accepted;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = state.queue_select;
        interrupt.restore(state.status, state.isr, state.config_generation);
        // A driver that has seen no features continues to wait for them.
        self.resetting = state.offered == 0;
        if self.resetting {
            interrupt.add_status(S_NEEDS_RESET);
        }
        interrupt.set_config_vector(state.config_vector);
        for ((index, queue), saved) in (0u16..).zip(&mut self.queues).zip(&state.queues) {
            queue.size = saved.size;
            queue.enabled = saved.enabled;
            queue.desc_table = saved.desc_table;
            queue.avail_ring = saved.avail_ring;
            queue.used_ring = saved.used_ring;
            interrupt.set_queue_vector(index, saved.vector);
        }
    }
}

impl Registers {
    /// Restores configuration space, MSI-X and the common configuration of a function before the guest sees it.
    pub(super) fn restore(
        &mut self,
        state: &VirtioPciState,
        interrupt: &PciInterrupt,
    ) -> Result<(), StateError> {
        self.header.space.restore(&state.config_space.read()?)?;
        let mut control = [0; 2];
        self.header
            .space
            .read(self.header.msix_control, &mut control);
        self.msix
            .restore(&state.msix.read()?, u16::from_le_bytes(control))?;
        self.common.restore(state, interrupt);
        Ok(())
    }
}
