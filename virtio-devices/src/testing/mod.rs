//! A mock driver: plays the guest against a device, well-behaved or hostile.
//!
//! [`HandlerHarness`] calls a [`QueueHandler`](crate::QueueHandler) directly,
//! without threads. It is built on [`TestRam`] and [`DriverQueue`], the driver's side of a split
//! queue (virtio 1.2 §2.7). Everything here panics on misuse: it is test code.

mod handler;
mod interrupt;
mod queue;
mod ram;

pub use handler::HandlerHarness;
pub use interrupt::MockInterrupt;
pub use queue::{Buffer, Chain, Desc, DriverQueue, INDIRECT, NEXT, Segment, Used, WRITE};
pub use ram::TestRam;

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
