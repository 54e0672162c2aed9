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
//! | deflate | page frame numbers | nothing: the pages return when touched |
//! | statistics | tagged numbers | keeps the buffer until statistics are requested, then returns it to be refilled |
//! | hinting | command ids, and free blocks that it may reuse at any time | discards the blocks while the vCPU that
//! sent them is held |
//! | reporting | free ranges, isolated until completed | discards the ranges, then completes them |
//!
//! Errors are contained as follows. An invalid chain is counted and completed. A range that does not consist of whole
//! pages of RAM is skipped and counted by reason. A failed system call is counted, and the guest's page stays. A ring
//! that cannot be read stops the device until it is reset. The guest can increase the counters, but not the memory or
//! the number of system calls per batch.

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
mod rate;
pub mod reporting_policy;
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
pub use hinting::{HintingError, HintingRuns, HintingState};
pub use latency::{LatencyBucket, LatencyHistogram};
pub use rate::RateWindow;
pub use shared::FREE_BLOCK_BYTES_MAX;
pub use state::{BalloonState, BalloonWorkerState, ExtentState, PathState};
pub use stats::{StatsError, StatsSample};
