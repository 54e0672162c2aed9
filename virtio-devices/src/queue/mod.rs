//! The queue toolkit of all devices: takes chains from a split virtqueue and returns them (virtio 1.2 §2.7).
//!
//! ```text
//!   served    a queue as a worker serves it; every loop over chains uses `ServedQueue::next`
//!   walk      the descriptors of one chain, with a bound on their number
//!   buffers   a chain resolved to host memory
//!   dma       guest memory as the device addresses it, translated by a virtual IOMMU if it is behind one
//!   single    the queue half of a device that serves one queue and completes each request immediately
//! ```
//!
//! A loop ends when the ring is empty or when the [`Turn`](crate::worker::Turn) is over. In the second case the queue
//! signals its own doorbell, and the worker serves it again.

mod buffers;
mod dma;
mod served;
mod single;
mod walk;

pub(crate) use buffers::{ChainBuffers, ChainError, GuestBuffers, RamGuard};
pub(crate) use dma::{DmaMemory, IOVECS_MAX};
pub(crate) use served::{Next, Popped, ServedQueue};
pub(crate) use single::{Driver, Reply, SingleQueue, SingleQueueDevice};
pub(crate) use walk::{Chain, ChainEnd, walk};
