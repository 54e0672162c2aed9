//! Virtio devices and their PCI transport.
//!
//! A device has two halves. The *configuration half* ([`VirtioDevice`]) handles register accesses of the vCPU threads
//! and never blocks. The *queue half* ([`QueueHandler`]) runs on its own worker thread; it is created with the device
//! and receives the queues when the driver is ready. Both halves share data in an `Arc` of atomics that the device
//! defines.
//!
//! This crate does not depend on KVM, HTTP or the command line. The VMM provides interrupts, doorbells and threads
//! through the traits in [`pci`] and [`worker`].

pub mod balloon;
pub mod block;
mod config_interrupt;
pub mod console;
pub mod counters;
mod debug_fields;
pub mod device;
pub mod dma;
mod dma_mapped;
mod empty_state;
pub mod file_lock;
pub mod file_system;
pub mod fs;
pub mod iommu;
pub mod listening_socket;
pub mod mem;
pub mod net;
pub mod pci;
pub mod pmem;
mod queue;
pub mod rate_limit;
pub mod reclaim;
pub mod rng;
pub mod rtc;
mod taken;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
mod thread_name;
pub mod transport;
mod unix_connect;
mod unpoisoned;
pub mod vhost_user;
pub mod vsock;
pub mod watchdog;
pub mod worker;
pub mod write_log;

pub use device::{
    Activation, ActiveQueue, Counters, DeviceIdentity, GuestRam, HandlerState, Interrupt,
    QueueHandler, QueuePosition, VirtioDevice, WorkerError,
};
pub use dma_mapped::DmaMapped;
pub use listening_socket::ListeningSocket;
pub use unpoisoned::Unpoisoned;

#[cfg(test)]
#[global_allocator]
static ALLOCATOR: test_alloc::Recording = test_alloc::Recording;
