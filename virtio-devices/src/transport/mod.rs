//! Virtio over PCI, modern only (virtio 1.2 §4.1).
//!
//! ```text
//!  BAR0, 512 KiB            implemented by
//!  0x00000 common config    CommonConfig, under the function's lock
//!  0x02000 ISR              PciInterrupt, lock-free
//!  0x04000 device config    VirtioDevice, under the device's lock
//!  0x06000 notify           doorbells: KVM ioeventfds, or the VMM itself
//!  0x08000 MSI-X table      MsixTable, under the function's lock
//!  0x48000 pending bits     MsixTable, under the function's lock
//! ```
//!
//! The driver controls the life of a device through `device_status`:
//!
//! ```text
//!  0 ─ACKNOWLEDGE─ DRIVER ─FEATURES_OK─ DRIVER_OK ──────────► active
//!  ▲      features not a subset, or without VERSION_1: bit stays 0
//!  │      rings outside of RAM, misaligned: DEVICE_NEEDS_RESET, counted
//!  └──── write 0: workers release their queues; until then the old status is read back
//! ```
//!
//! Lock order: function, then device. Interrupts take neither lock, so a device may signal while it holds its own lock.

mod activation;
mod common_config;
mod counters;
mod function;
mod interrupt;
mod layout;
mod queue_config;
mod saving;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex};

pub use function::VirtioPciFunction;
pub use interrupt::PciInterrupt;
pub use layout::{BAR_BYTES, BAR_INDEX, NOTIFY_MULTIPLIER, NOTIFY_OFFSET};
pub use state::{QueueState, RingState, VirtioPciState};

use ::state::StateError;

use crate::device::{GuestRam, VirtioDevice, WorkerError};
use crate::dma::DmaEndpoint;
use crate::pci::MsiVectors;
use crate::worker::WorkerStart;

/// Notified when a driver activates or resets a device. Called on a vCPU thread with the function's lock held: must
/// neither block nor call back.
pub trait LifecycleListener: Send + Sync {
    /// DRIVER_OK was set and the queues were passed to the workers.
    fn device_activated(&self, id: &str);
    /// The driver, or a reset of the VM, has reset the device.
    fn device_reset(&self, id: &str);
}

/// The parameters of a PCI function.
pub struct VirtioPciParams {
    /// The device's id in the API, e.g. `_disk0`.
    pub id: String,
    /// The configuration half.
    pub device: Arc<Mutex<dyn VirtioDevice>>,
    /// Guest RAM.
    pub mem: GuestRam,
    /// The IOMMU in front of the device.
    pub dma: Option<Arc<DmaEndpoint>>,
    /// Interrupt vectors: at least [`vectors_needed`] of the device.
    pub vectors: Arc<dyn MsiVectors>,
    /// Runs first on every worker thread.
    pub thread_start: WorkerStart,
    /// Listener for the event monitor.
    pub listener: Option<Arc<dyn LifecycleListener>>,
}

crate::debug_fields!(VirtioPciParams { id });

/// Number of MSI-X vectors of a device: one per queue, one for configuration changes.
pub fn vectors_needed(device: &dyn VirtioDevice) -> u16 {
    u16::try_from(device.queue_sizes().len() + 1).unwrap_or(u16::MAX)
}

/// Reasons why a device cannot be attached to the transport.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// More queues than possible vectors.
    #[error("a device with {queues} queues does not fit a PCI function")]
    TooManyQueues {
        /// Queues of the device.
        queues: usize,
    },
    /// A queue's size is invalid for a split queue.
    #[error("queue {index} cannot have {size} entries")]
    QueueSize {
        /// Queue number.
        index: usize,
        /// Entries of the queue.
        size: u16,
    },
    /// No eventfd is available.
    #[error("cannot create a doorbell")]
    Doorbell(#[source] io::Error),
    /// A saved state that does not belong to this device.
    #[error(transparent)]
    State(#[from] StateError),
    /// A worker thread could not be started.
    #[error("cannot start a worker thread")]
    Worker(#[source] WorkerError),
}
