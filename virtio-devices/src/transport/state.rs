//! The saved state of a virtio-pci function, and the checks of a state that was read.

use ::state::{Part, Saved, State, StateError, parts, require};
use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::common_config::{
    CommonConfig, S_DRIVER_OK, S_FEATURES_OK, S_KNOWN, S_NEEDS_RESET, on_this_transport,
};
use super::interrupt::{ISR_KNOWN, PciInterrupt, VIRTIO_MSI_NO_VECTOR};
use crate::device::VirtioDevice;

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

impl VirtioPciState {
    pub(super) fn features_are_accepted(&self) -> bool {
        self.status & S_FEATURES_OK != 0
    }

    /// Rejects states that cannot belong to a function of this device.
    pub(super) fn check(
        &self,
        device: &dyn VirtioDevice,
        common: &CommonConfig,
        (handlers, is_behind_iommu): (usize, bool),
    ) -> Result<(), StateError> {
        let version_1 = 1 << VIRTIO_F_VERSION_1;
        let device_type = device.device_type();
        let possible = on_this_transport(device.features_possible(), is_behind_iommu);
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
