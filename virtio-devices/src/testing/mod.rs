//! A mock driver: acts as a guest, well-behaved or hostile, towards a device.
//!
//! There are two levels:
//! * [`HandlerHarness`] calls a [`QueueHandler`](crate::QueueHandler) directly, without threads;
//! * [`MockPciDriver`] drives a whole PCI function through registers, as Linux does. [`conformance`] tests what all
//!   devices must withstand.
//!
//! Both use [`TestRam`] and [`DriverQueue`], the driver's side of a split queue (virtio 1.2 §2.7). All of it panics on
//! misuse, because it is test code.

mod any_device;
pub mod any_guest;
pub mod any_registers;
mod any_request;
mod any_vsock;
mod blocks;
mod conformance;
mod conformance_checks;
mod conformance_iommu;
mod conformance_state;
pub(crate) mod disk_images;
mod driver;
#[cfg(test)]
mod every_device;
pub mod fuzz_input;
mod handler;
mod host_iommu;
mod interrupt;
pub mod pauses;
pub mod pauses_of_requests;
pub(crate) mod qcow2;
mod queue;
mod ram;
mod turns;
mod vectors;

pub use blocks::TestBlocks;
pub use conformance::conformance;
pub use driver::{MockPciDriver, MovingDriver, Windows, common};
pub use handler::HandlerHarness;
pub use host_iommu::{HostMapped, MockHostIommu};
pub use interrupt::MockInterrupt;
pub use queue::{Buffer, Chain, Desc, DriverQueue, INDIRECT, NEXT, Segment, Used, WRITE};
pub use ram::TestRam;
pub use vectors::MockVectors;

use std::time::{Duration, Instant};

/// Maximum time that a test waits for something that should happen immediately.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Polls `condition` until it holds.
///
/// # Panics
/// The condition does not hold after [`DEADLINE`]; the message contains `what`.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "deadline passed waiting for {what}");
        std::thread::yield_now();
    }
}
