//! A mock driver: plays the guest against a device, well-behaved or hostile.
//!
//! Two levels:
//! * [`HandlerHarness`] calls a [`QueueHandler`](crate::QueueHandler) directly, without threads;
//! * [`MockPciDriver`] drives a whole PCI function through registers, as Linux does.
//!   [`conformance`] puts a device through everything all devices must survive.
//!
//! Both share [`TestRam`] and [`DriverQueue`], the driver's side of a split
//! queue (virtio 1.2 §2.7). Everything here panics on misuse: it is test code.

mod any_device;
pub mod any_guest;
pub mod any_registers;
mod conformance;
mod conformance_state;
mod driver;
#[cfg(test)]
mod every_device;
pub mod fuzz_input;
mod handler;
mod interrupt;
mod queue;
mod ram;
mod turns;
mod vectors;

pub use conformance::conformance;
pub use driver::{MockPciDriver, MovingDriver, Windows, common};
pub use handler::HandlerHarness;
pub use interrupt::MockInterrupt;
pub use queue::{Buffer, Chain, Desc, DriverQueue, INDIRECT, NEXT, Segment, Used, WRITE};
pub use ram::TestRam;
pub use vectors::MockVectors;

use std::time::{Duration, Instant};

/// How long a test waits for something that should happen at once.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Polls `condition` until it holds.
///
/// # Panics
/// After [`DEADLINE`], naming `what`.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "deadline passed waiting for {what}");
        std::thread::yield_now();
    }
}
