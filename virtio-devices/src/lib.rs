//! Virtio devices and their PCI transport.
//!
//! A device has two halves. The *configuration half* ([`VirtioDevice`]) answers
//! register accesses of the vCPU threads and never blocks. The *queue half*
//! ([`QueueHandler`]) lives on a worker thread of its own, is created with the
//! device and is handed the queues when the driver is ready. What both need is
//! shared by the device itself in an `Arc` of atomics.
//!
//! This crate knows no KVM, no HTTP and no command line: interrupts, doorbells
//! and threads come in through the traits in [`pci`] and [`worker`].

pub mod balloon;
pub mod block;
pub mod console;
pub mod device;
mod listening_socket;
pub mod mem;
pub mod net;
pub mod pci;
mod queue;
pub mod reclaim;
pub mod rng;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
mod thread_name;
pub mod transport;
mod unpoisoned;
pub mod vsock;
pub mod watchdog;
pub mod worker;

pub use device::{
    Activation, ActiveQueue, Counters, GuestRam, HandlerState, Interrupt, QueueHandler,
    QueuePosition, VirtioDevice, WorkerError,
};
pub use listening_socket::ListeningSocket;
pub use unpoisoned::Unpoisoned;
