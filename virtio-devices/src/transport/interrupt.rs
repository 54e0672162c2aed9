//! Interrupts from a device behind PCI to its driver (virtio 1.2 §4.1.5.3, §4.1.5.4).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};

use crate::device::Interrupt;
use crate::pci::MsixLines;

/// Vector number of a queue or configuration without a vector.
pub(super) const VIRTIO_MSI_NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1 << 0;
const ISR_CONFIG: u8 = 1 << 1;
/// The defined bits of the ISR register.
pub(super) const ISR_KNOWN: u8 = ISR_QUEUE | ISR_CONFIG;

/// The registers that device threads access; atomics, so that no completion waits for a vCPU in a register access.
#[derive(Debug)]
pub struct PciInterrupt {
    lines: Arc<MsixLines>,
    isr: AtomicU8,
    status: AtomicU8,
    config_generation: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
}

impl PciInterrupt {
    pub(super) fn new(lines: Arc<MsixLines>, queues: usize) -> Self {
        Self {
            lines,
            isr: AtomicU8::new(0),
            status: AtomicU8::new(0),
            config_generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(VIRTIO_MSI_NO_VECTOR),
            queue_vectors: (0..queues)
                .map(|_| AtomicU16::new(VIRTIO_MSI_NO_VECTOR))
                .collect(),
        }
    }

    /// The device status register.
    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// Sets status bits.
    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    /// Clears the status after a reset.
    pub(super) fn clear_status(&self) {
        self.status.store(0, Ordering::SeqCst);
    }

    /// The ISR register, without clearing it.
    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::SeqCst)
    }

    /// Restores registers; vectors are set separately.
    pub(super) fn restore(&self, status: u8, isr: u8, config_generation: u8) {
        self.status.store(status, Ordering::SeqCst);
        self.isr.store(isr, Ordering::SeqCst);
        self.config_generation
            .store(config_generation, Ordering::SeqCst);
    }

    /// Returns and clears the ISR register, as a read by the driver does.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    pub(super) fn config_generation(&self) -> u8 {
        self.config_generation.load(Ordering::SeqCst)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(vector, Ordering::SeqCst);
    }

    /// The vector of a queue; none for queues that do not exist.
    pub(super) fn queue_vector(&self, queue_index: u16) -> u16 {
        self.queue_vectors
            .get(usize::from(queue_index))
            .map_or(VIRTIO_MSI_NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    pub(super) fn set_queue_vector(&self, queue_index: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(queue_index)) {
            slot.store(vector, Ordering::SeqCst);
        }
    }

    /// Resets the device's part: no vectors, no pending interrupts. MSI-X itself belongs to PCI and keeps its
    /// programming.
    pub(super) fn reset(&self) {
        self.isr.store(0, Ordering::SeqCst);
        self.set_config_vector(VIRTIO_MSI_NO_VECTOR);
        for vector in &self.queue_vectors {
            vector.store(VIRTIO_MSI_NO_VECTOR, Ordering::SeqCst);
        }
    }

    /// Sends an interrupt for everything that may have been in transit when the state was taken: a spurious interrupt
    /// is harmless, a lost one hangs the driver.
    pub(super) fn signal_all(&self) {
        self.lines.inject_restored();
        for queue_index in 0..self.queue_vectors.len() {
            self.signal_queue(u16::try_from(queue_index).expect("checked by the function"));
        }
        self.notify_config();
    }

    fn notify_config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.lines.signal(self.config_vector());
    }
}

impl Interrupt for PciInterrupt {
    fn signal_queue(&self, queue_index: u16) {
        if !self.lines.is_enabled() {
            // With MSI-X enabled this register is not used; without it, the driver relies on it.
            self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        }
        self.lines.signal(self.queue_vector(queue_index));
    }

    fn signal_config(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.notify_config();
    }

    fn signal_needs_reset(&self) {
        let active = VIRTIO_CONFIG_S_DRIVER_OK as u8;
        // Only an active device can need a reset. A late signal must not overwrite the zero for which a driver waits
        // after its reset.
        let told = self
            .status
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |status| {
                (status & active != 0).then_some(status | VIRTIO_CONFIG_S_NEEDS_RESET as u8)
            });
        if told.is_ok() {
            self.notify_config();
        }
    }
}
