//! The virtio memory balloon (virtio 1.2 §5.5): returns unused guest memory to the host.
//!
//! ```text
//!   API threads ── BalloonHandle ──┐                      ┌── Balloon: VirtioDevice (vCPU threads)
//!     target, figures, statistics  ├── Shared (Arc) ──────┤     features, configuration space
//!                                  │                      └── BalloonWorker: QueueHandler (own thread)
//!     policy, pause                │     policy fields           inflate   ┐
//!                                  │                            reporting ┼─► DiscardEngine
//!                                  │                            hinting   ┘
//!                                  └── "refill" eventfd ─────►  deflate, statistics
//! ```
//!
//! | Queue | Driver sends | Device does |
//! | --- | --- | --- |
//! | inflate | page frame numbers | discards those pages |
//! | deflate | page frame numbers | nothing: the pages come back when touched |
//! | statistics | tagged numbers | keeps the buffer until somebody asks, then returns it to be refilled |
//! | hinting | command ids, and free blocks that it may use again at any time | discards them while the vCPU that sent them waits |
//! | reporting | free ranges, isolated until answered | discards them, then answers |
//!
//! Errors and their containment: an invalid chain is counted and completed. A range that is not whole pages of RAM is
//! skipped and counted by reason. A system call that fails is counted, and the guest's page stays. A ring that cannot
//! be read stops the device until it is reset. The guest can increase the counters, but never the memory or the number
//! of system calls per batch.

mod accounting;
mod chain;
mod config;
mod counters;
mod device;
#[cfg(any(test, feature = "test-utils"))]
pub mod fuzz;
mod handle;
mod hinting;
mod latency;
mod numbering;
pub mod policy;
mod rate;
mod shared;
pub mod spec;
mod state;
mod stats;
mod stats_timer;
mod worker;

#[cfg(test)]
mod tests;

pub use accounting::{GuestFaults, LastBatch, PathFigures};
pub use device::{Balloon, BalloonParams};
pub use device_facts::{HintingPhase, PausePhase};
pub use handle::{BalloonHandle, BalloonSnapshot, ReportingState};
pub use hinting::{HintingError, HintingState, HintingStatus};
pub use latency::{LatencyBucket, LatencyHistogram};
pub use rate::RateWindow;
pub use shared::FREE_BLOCK_BYTES_MAX;
pub use state::{BalloonState, BalloonWorkerState, ExtentState, PathState};
pub use stats::{StatsError, StatsSample};
