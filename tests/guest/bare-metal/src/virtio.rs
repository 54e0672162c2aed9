//! A driver for virtio-pci (virtio 1.2 §4.1), register by register.

use crate::memory::{read, write};
use crate::pci::{Function, REG_CAPABILITIES, VENDOR_VIRTIO};
use crate::queue::Queue;

pub const STATUS_ACKNOWLEDGE: u8 = 1;
pub const STATUS_DRIVER: u8 = 2;
pub const STATUS_DRIVER_OK: u8 = 4;
pub const STATUS_FEATURES_OK: u8 = 8;
pub const STATUS_NEEDS_RESET: u8 = 64;
pub const F_VERSION_1: u64 = 1 << 32;

/// Memory of the rings: from 32 MiB on, one area per queue.
const QUEUE_AREA: u64 = 32 << 20;
/// How often a status is read before a device counts as hung.
const POLLS_MAX: u32 = 1_000_000;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

/// One virtio function with its register windows.
pub struct Device {
    pub function: Function,
    pub bar: u64,
    pub common: u64,
    pub notify: u64,
    pub notify_multiplier: u32,
    pub config: u64,
    pub isr: u64,
    pub msix_capability: u16,
    pub msix_table: u64,
}

impl Device {
    /// The first virtio function of this type (5: balloon).
    pub fn find(device_type: u16) -> Option<Device> {
        Self::all().find(|device| device.function.device() == 0x1040 + device_type)
    }

    /// Every virtio function, its BAR moved to the low window and decoding.
    pub fn all() -> impl Iterator<Item = Device> {
        Function::all()
            .filter(|function| function.vendor() == VENDOR_VIRTIO)
            .map(Self::probe)
    }

    /// Moves the BAR to an address that this guest can access, and reads the capabilities.
    pub fn probe(function: Function) -> Device {
        let bar = function.move_bar0_low();
        let mut device = Device {
            function,
            bar,
            common: 0,
            notify: 0,
            notify_multiplier: 0,
            config: 0,
            isr: 0,
            msix_capability: 0,
            msix_table: 0,
        };
        let mut at = u16::from(function.read8(REG_CAPABILITIES));
        // 48 capabilities of 4 bytes are all that fits between 0x40 and 0xff.
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            device.take_capability(at);
            at = u16::from(function.read8(at + 1));
        }
        device
    }

    fn take_capability(&mut self, at: u16) {
        match self.function.read8(at) {
            CAPABILITY_VENDOR => {
                let window = self.bar + u64::from(self.function.read32(at + 8));
                match self.function.read8(at + 3) {
                    1 => self.common = window,
                    2 => {
                        self.notify = window;
                        self.notify_multiplier = self.function.read32(at + 16);
                    }
                    3 => self.isr = window,
                    4 => self.config = window,
                    _ => {}
                }
            }
            CAPABILITY_MSIX => {
                self.msix_capability = at;
                self.msix_table = self.bar + u64::from(self.function.read32(at + 4) & !7);
            }
            _ => {}
        }
    }

    pub fn status(&self) -> u8 {
        read(self.common + 0x14)
    }

    pub fn set_status(&self, status: u8) {
        write(self.common + 0x14, status);
    }

    /// Writes 0 to the status and waits until it reads 0. False if it never did.
    pub fn reset(&self) -> bool {
        self.set_status(0);
        (0..POLLS_MAX).any(|_| self.status() == 0)
    }

    pub fn queue_count(&self) -> u16 {
        read(self.common + 0x12)
    }

    pub fn offered_features(&self) -> u64 {
        write(self.common, 0u32);
        let low: u32 = read(self.common + 4);
        write(self.common, 1u32);
        let high: u32 = read(self.common + 4);
        u64::from(low) | u64::from(high) << 32
    }

    pub fn accept_features(&self, features: u64) {
        write(self.common + 8, 0u32);
        write(self.common + 12, features as u32);
        write(self.common + 8, 1u32);
        write(self.common + 12, (features >> 32) as u32);
    }

    /// Reset, acknowledge, negotiate. True if the device kept FEATURES_OK.
    pub fn negotiate(&self, features: u64) -> bool {
        if !self.reset() {
            return false;
        }
        self.set_status(STATUS_ACKNOWLEDGE);
        self.set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        self.accept_features(features);
        self.set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
        self.status() & STATUS_FEATURES_OK != 0
    }

    pub fn driver_ok(&self) {
        self.set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
    }

    pub fn select_queue(&self, index: u16) {
        write(self.common + 0x16, index);
    }

    /// Maximum size of the selected queue; 0 if it does not exist.
    pub fn queue_size(&self) -> u16 {
        read(self.common + 0x18)
    }

    pub fn set_rings(&self, size: u16, descriptors: u64, available: u64, used: u64) {
        write(self.common + 0x18, size);
        write(self.common + 0x20, descriptors);
        write(self.common + 0x28, available);
        write(self.common + 0x30, used);
    }

    pub fn enable_queue(&self) {
        write(self.common + 0x1c, 1u16);
    }

    /// Sets up and enables queue `index` with fresh rings.
    pub fn setup_queue(&self, index: u16) -> Option<Queue> {
        self.select_queue(index);
        let size = self.queue_size().min(256);
        if size == 0 {
            return None;
        }
        let queue = Queue::new(QUEUE_AREA + u64::from(index) * Queue::AREA_BYTES, size);
        self.set_rings(size, queue.descriptors(), queue.available(), queue.used());
        self.enable_queue();
        Some(queue)
    }

    /// Routes the selected queue's interrupt to MSI-X entry `entry`.
    pub fn set_queue_vector(&self, entry: u16) -> u16 {
        write(self.common + 0x1a, entry);
        read(self.common + 0x1a)
    }

    /// Programs MSI-X entry `entry` to fire `vector` at processor 0.
    pub fn program_msix(&self, entry: u16, vector: u8) {
        let at = self.msix_table + u64::from(entry) * 16;
        write(at, 0xfee0_0000u32);
        write(at + 4, 0u32);
        write(at + 8, u32::from(vector));
        write(at + 12, 0u32);
    }

    pub fn enable_msix(&self) {
        let control = self.function.read16(self.msix_capability + 2);
        self.function
            .write16(self.msix_capability + 2, (control | 0x8000) & !0x4000);
    }

    /// Rings the doorbell of queue `index` (its notify offset is its number here).
    pub fn kick(&self, index: u16) {
        self.select_queue(index);
        let offset: u16 = read(self.common + 0x1e);
        let doorbell = self.notify + u64::from(offset) * u64::from(self.notify_multiplier);
        write(doorbell, index);
    }
}
