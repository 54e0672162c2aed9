//! `struct virtio_pci_common_cfg` (virtio 1.2 §4.1.4.3) and the status state machine (§3.1).
//!
//! This module handles only registers: the effects of a write on the device are returned as [`Effects`]. For the
//! driver, the structure is little-endian bytes, so any width at any offset is well defined. A read copies from an
//! image. A write is applied to the image and passed on field by field.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1,
};

use super::counters::TransportCounters;
use super::interrupt::{PciInterrupt, VIRTIO_MSI_NO_VECTOR};
use super::layout::COMMON_BYTES;
use super::queue_config::QueueConfig;
use crate::device::read_config_space;

const S_ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const S_DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
pub(super) const S_DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
pub(super) const S_FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
pub(super) const S_NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const S_FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
pub(super) const S_KNOWN: u8 =
    S_ACKNOWLEDGE | S_DRIVER | S_DRIVER_OK | S_FEATURES_OK | S_NEEDS_RESET | S_FAILED;

/// Feature bits of the transport itself that are not supported (virtio 1.2 §6): PACKED, IN_ORDER, SR_IOV,
/// NOTIFICATION_DATA, NOTIF_CONFIG_DATA, RING_RESET.
const FEATURES_NOT_OFFERED: u64 = 1 << 34 | 1 << 35 | 1 << 37 | 1 << 38 | 1 << 39 | 1 << 40;

/// The feature bits of a device as the transport offers them.
pub(super) fn on_this_transport(features: u64, is_behind_iommu: bool) -> u64 {
    // A device does not know whether it is behind an IOMMU.
    let own = features & !FEATURES_NOT_OFFERED & !(1 << VIRTIO_F_ACCESS_PLATFORM);
    own | 1 << VIRTIO_F_VERSION_1 | u64::from(is_behind_iommu) << VIRTIO_F_ACCESS_PLATFORM
}

/// Defines the fields by name, offset and width. Addresses are two registers each.
macro_rules! fields {
    ($($name:ident = $offset:literal, $width:literal;)+) => {
        /// A register of the structure.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        enum Field { $($name,)+ }

        /// Every register with its offset and width in bytes.
        const FIELDS: &[(Field, usize, usize)] = &[$((Field::$name, $offset, $width),)+];
    };
}

fields! {
    DeviceFeatureSelect = 0x00, 4;
    DeviceFeature = 0x04, 4;
    DriverFeatureSelect = 0x08, 4;
    DriverFeature = 0x0c, 4;
    ConfigMsixVector = 0x10, 2;
    NumQueues = 0x12, 2;
    DeviceStatus = 0x14, 1;
    ConfigGeneration = 0x15, 1;
    QueueSelect = 0x16, 2;
    QueueSize = 0x18, 2;
    QueueMsixVector = 0x1a, 2;
    QueueEnable = 0x1c, 2;
    QueueNotifyOff = 0x1e, 2;
    QueueDescLow = 0x20, 4;
    QueueDescHigh = 0x24, 4;
    QueueDriverLow = 0x28, 4;
    QueueDriverHigh = 0x2c, 4;
    QueueDeviceLow = 0x30, 4;
    QueueDeviceHigh = 0x34, 4;
}

const IMAGE_BYTES: usize = COMMON_BYTES as usize;

/// The actions that the function must take after a write, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Effects {
    /// Status 0 was written.
    pub(super) reset: bool,
    /// FEATURES_OK was set: the driver accepted these features.
    pub(super) features_ok: bool,
    /// DRIVER_OK was set.
    pub(super) driver_ok: bool,
}

/// The registers of the structure, except the atomics in [`PciInterrupt`].
#[derive(Debug)]
pub(super) struct CommonConfig {
    interrupt: Arc<PciInterrupt>,
    counters: Arc<TransportCounters>,
    pub(super) vectors: u16,
    pub(super) offered: u64,
    pub(super) accepted: u64,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueConfig>,
    /// A reset was requested. Not all workers have released their queues, or the device does not know its features.
    pub(super) resetting: bool,
}

impl CommonConfig {
    pub(super) fn new(
        interrupt: Arc<PciInterrupt>,
        counters: Arc<TransportCounters>,
        offered: u64,
        queue_sizes: &[u16],
    ) -> Self {
        Self {
            interrupt,
            counters,
            vectors: u16::try_from(queue_sizes.len() + 1).expect("checked by the function"),
            offered,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            queues: queue_sizes.iter().copied().map(QueueConfig::new).collect(),
            resetting: false,
        }
    }

    /// Feature bits the driver has written.
    pub(super) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// The enabled queues with their indices.
    pub(super) fn enabled_queues(&self) -> impl Iterator<Item = (u16, &QueueConfig)> {
        (0u16..)
            .zip(&self.queues)
            .filter(|(_, queue)| queue.enabled)
    }

    pub(super) fn is_resetting(&self) -> bool {
        self.resetting
    }

    /// Resets to the power-on state, except for the status, which keeps its old value until
    /// [`CommonConfig::finish_reset`].
    pub(super) fn begin_reset(&mut self) {
        self.accepted = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            queue.reset();
        }
        self.interrupt.reset();
        self.resetting = true;
    }

    /// Now the status reads 0, and a driver may accept `offered`.
    pub(super) fn finish_reset(&mut self, offered: u64) {
        self.resetting = false;
        self.offered = offered;
        self.interrupt.clear_status();
    }

    /// Reads at a byte offset; bytes after the end are zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.image(), offset, data);
    }

    /// Writes at a byte offset.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Effects {
        let mut effects = Effects::default();
        let start = usize::try_from(offset).unwrap_or(IMAGE_BYTES);
        if start >= IMAGE_BYTES {
            self.counters.bad_register_writes.count();
            return effects;
        }
        let end = start + data.len().min(IMAGE_BYTES - start);
        for &(field, at, width) in FIELDS {
            if at + width <= start || end <= at {
                continue;
            }
            // The image is read again for each field, because one write may change the value of the next field.
            let mut image = self.image();
            image[start..end].copy_from_slice(&data[..end - start]);
            let value = little_endian(&image[at..at + width]);
            if field == Field::DeviceStatus {
                effects = self.write_status(value as u8);
            } else {
                self.write_field(field, value);
            }
        }
        effects
    }

    fn image(&self) -> [u8; IMAGE_BYTES] {
        let mut image = [0; IMAGE_BYTES];
        for &(field, at, width) in FIELDS {
            let value = self.field(field).to_le_bytes();
            image[at..at + width].copy_from_slice(&value[..width]);
        }
        image
    }

    fn field(&self, field: Field) -> u32 {
        let queue = self.queues.get(usize::from(self.queue_select));
        let address = |address: fn(&QueueConfig) -> u64| queue.map_or(0, address);
        match field {
            Field::DeviceFeatureSelect => self.device_feature_select,
            Field::DeviceFeature => half(self.offered, self.device_feature_select),
            Field::DriverFeatureSelect => self.driver_feature_select,
            Field::DriverFeature => half(self.accepted, self.driver_feature_select),
            Field::ConfigMsixVector => u32::from(self.interrupt.config_vector()),
            Field::NumQueues => self.queues.len() as u32,
            Field::DeviceStatus => u32::from(self.interrupt.status()),
            Field::ConfigGeneration => u32::from(self.interrupt.config_generation()),
            Field::QueueSelect => u32::from(self.queue_select),
            Field::QueueSize => queue.map_or(0, |queue| u32::from(queue.size)),
            Field::QueueMsixVector => queue.map_or(0, |_| {
                u32::from(self.interrupt.queue_vector(self.queue_select))
            }),
            Field::QueueEnable => queue.map_or(0, |queue| u32::from(queue.enabled)),
            Field::QueueNotifyOff => queue.map_or(0, |_| u32::from(self.queue_select)),
            Field::QueueDescLow => half(address(|queue| queue.desc_table), 0),
            Field::QueueDescHigh => half(address(|queue| queue.desc_table), 1),
            Field::QueueDriverLow => half(address(|queue| queue.avail_ring), 0),
            Field::QueueDriverHigh => half(address(|queue| queue.avail_ring), 1),
            Field::QueueDeviceLow => half(address(|queue| queue.used_ring), 0),
            Field::QueueDeviceHigh => half(address(|queue| queue.used_ring), 1),
        }
    }

    fn write_field(&mut self, field: Field, value: u32) {
        match field {
            Field::DeviceFeatureSelect => self.device_feature_select = value,
            Field::DriverFeatureSelect => self.driver_feature_select = value,
            Field::QueueSelect => self.queue_select = value as u16,
            Field::DriverFeature => self.write_driver_feature(value),
            Field::ConfigMsixVector => {
                let vector = self.existing_vector(value as u16);
                self.interrupt.set_config_vector(vector);
            }
            Field::DeviceFeature
            | Field::NumQueues
            | Field::ConfigGeneration
            | Field::QueueNotifyOff => self.counters.bad_register_writes.count(),
            // Handled by the caller, because a status write has effects.
            Field::DeviceStatus => {}
            Field::QueueMsixVector => {
                let vector = self.existing_vector(value as u16);
                self.interrupt.set_queue_vector(self.queue_select, vector);
            }
            Field::QueueSize
            | Field::QueueEnable
            | Field::QueueDescLow
            | Field::QueueDescHigh
            | Field::QueueDriverLow
            | Field::QueueDriverHigh
            | Field::QueueDeviceLow
            | Field::QueueDeviceHigh => {
                if !self.write_queue(field, value) {
                    self.counters.bad_queue_writes.count();
                }
            }
        }
    }

    /// A vector that this function does not have reads back as none, by which a driver detects it.
    fn existing_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors {
            vector
        } else {
            VIRTIO_MSI_NO_VECTOR
        }
    }

    fn write_driver_feature(&mut self, value: u32) {
        let fixed = self.interrupt.status() & S_FEATURES_OK != 0 || self.resetting;
        match self.driver_feature_select {
            select @ 0..=1 if !fixed => {
                let shift = 32 * select;
                self.accepted &= !(u64::from(u32::MAX) << shift);
                self.accepted |= u64::from(value) << shift;
            }
            // The device has no features in the higher words, so zero is the only correct value.
            select if select > 1 && value == 0 => {}
            _ => self.counters.bad_features.count(),
        }
    }

    /// Writes a queue register. False if it cannot be written now or with this value: the queue does not exist, is
    /// enabled already, or the device is active.
    fn write_queue(&mut self, field: Field, value: u32) -> bool {
        let frozen = self.interrupt.status() & S_DRIVER_OK != 0 || self.resetting;
        let Some(queue) = self
            .queues
            .get_mut(usize::from(self.queue_select))
            .filter(|queue| !frozen && !queue.enabled)
        else {
            return false;
        };
        match field {
            Field::QueueSize => return queue.set_size(value as u16),
            Field::QueueEnable => {
                queue.enabled = value == 1;
                return value == 1;
            }
            Field::QueueDescLow => set_half(&mut queue.desc_table, 0, value),
            Field::QueueDescHigh => set_half(&mut queue.desc_table, 1, value),
            Field::QueueDriverLow => set_half(&mut queue.avail_ring, 0, value),
            Field::QueueDriverHigh => set_half(&mut queue.avail_ring, 1, value),
            Field::QueueDeviceLow => set_half(&mut queue.used_ring, 0, value),
            Field::QueueDeviceHigh => set_half(&mut queue.used_ring, 1, value),
            _ => return false,
        }
        true
    }

    fn write_status(&mut self, value: u8) -> Effects {
        let mut effects = Effects::default();
        if value == 0 {
            // A second reset during a reset changes nothing.
            effects.reset = !self.resetting;
            return effects;
        }
        let old = self.interrupt.status();
        // DEVICE_NEEDS_RESET belongs to the device; a driver may write it back or omit it.
        let cleared = old & !value & !S_NEEDS_RESET;
        if self.resetting || cleared != 0 {
            self.counters.bad_status_writes.count();
            return effects;
        }
        let new = value & !old;
        let mut wrong = new & (!S_KNOWN | S_NEEDS_RESET) != 0;
        self.interrupt
            .add_status(new & (S_ACKNOWLEDGE | S_DRIVER | S_FAILED));

        if new & S_FEATURES_OK != 0 {
            effects.features_ok = self.features_are_acceptable();
            if effects.features_ok {
                self.interrupt.add_status(S_FEATURES_OK);
            } else {
                self.counters.bad_features.count();
            }
        }
        if new & S_DRIVER_OK != 0 {
            effects.driver_ok = self.interrupt.status() & S_FEATURES_OK != 0;
            if effects.driver_ok {
                self.interrupt.add_status(S_DRIVER_OK);
            } else {
                wrong = true;
            }
        }
        if wrong {
            self.counters.bad_status_writes.count();
        }
        effects
    }

    /// §3.1.1 step 5: the accepted features must be a subset of the offered ones. §6: they must include VERSION_1,
    /// because there is no legacy interface.
    fn features_are_acceptable(&self) -> bool {
        let version_1 = 1 << VIRTIO_F_VERSION_1;
        self.interrupt.status() & S_DRIVER != 0
            && self.accepted & !self.offered == 0
            && self.accepted & version_1 != 0
    }
}

/// The lower (0) or upper (1) half; other selectors read as zero.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    let shift = 32 * select;
    *value = *value & !(u64::from(u32::MAX) << shift) | u64::from(half) << shift;
}

/// Reads up to four little-endian bytes as a number.
fn little_endian(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u32::from(*byte))
}
