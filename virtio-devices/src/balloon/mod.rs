//! The virtio memory balloon (virtio 1.2 §5.5): gives the memory a guest does not use back to the host.
//!
//! ```text
//!   API threads ── BalloonHandle ──┐                      ┌── Balloon: VirtioDevice (vCPU threads)
//!     target, figures, statistics  ├── Shared (Arc) ──────┤     features, configuration space
//!                                  │                      └── BalloonWorker: QueueHandler (own thread)
//!     policy, pause                │     policy words           inflate   ┐
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
//! What can go wrong, and where it ends: a chain that makes no sense is counted
//! and completed; a range that is not whole pages of RAM is skipped and counted by
//! reason; a system call that fails is counted, and the guest's page simply stays;
//! a ring that cannot be read stops the device until it is reset. The guest can
//! make the counters grow, never the memory or the system calls per batch.

mod accounting;
mod chain;
mod config;
mod counters;
mod device;
#[cfg(any(test, feature = "test-utils"))]
pub mod fuzz;
mod handle;
mod hint;
mod hinting;
mod inflate;
mod latency;
mod numbering;
pub mod policy;
mod rate;
mod reporting;
mod shared;
mod state;
mod stats;
mod stats_timer;
mod worker;

#[cfg(test)]
mod tests;

pub use accounting::{GuestFaults, LastBatch, PathFigures};
pub use device::{Balloon, BalloonParams, FREE_BLOCK_BYTES_MAX};
pub use handle::{BalloonHandle, BalloonSnapshot, ReportingState};
pub use hinting::{HintingError, HintingPhase, HintingState, HintingStatus};
pub use latency::{LatencyBucket, LatencyHistogram};
pub use rate::RateWindow;
pub use state::{BalloonState, BalloonWorkerState, ExtentState, PathState};
pub use stats::{ReportingTag, StatTag, StatsError, StatsSample};

/// The balloon's own feature bits and constants (virtio 1.2 §5.5.3, §5.5.6;
/// include/uapi/linux/virtio_balloon.h).
pub mod spec {
    /// Virtio device id.
    pub const VIRTIO_ID_BALLOON: u32 = 5;

    /// The driver may use ballooned pages again only when the device has answered.
    pub const VIRTIO_BALLOON_F_MUST_TELL_HOST: u64 = 1 << 0;
    /// Statistics queue.
    pub const VIRTIO_BALLOON_F_STATS_VQ: u64 = 1 << 1;
    /// The guest takes pages back by itself before it runs out of memory.
    pub const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u64 = 1 << 2;
    /// Free page hinting queue.
    pub const VIRTIO_BALLOON_F_FREE_PAGE_HINT: u64 = 1 << 3;
    /// The guest tells what it fills free pages with.
    pub const VIRTIO_BALLOON_F_PAGE_POISON: u64 = 1 << 4;
    /// Free page reporting queue.
    pub const VIRTIO_BALLOON_F_REPORTING: u64 = 1 << 5;
    /// Modern device, from the common feature bits (virtio 1.2 §6).
    pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;

    /// `free_page_hint_cmd_id`: send no hints.
    pub const VIRTIO_BALLOON_CMD_ID_STOP: u32 = 0;
    /// `free_page_hint_cmd_id`: take the hinted blocks back.
    pub const VIRTIO_BALLOON_CMD_ID_DONE: u32 = 1;

    /// Page frame numbers count pages of 4 KiB whatever the guest's page size is.
    pub const VIRTIO_BALLOON_PFN_SHIFT: u32 = 12;
    /// Bytes of one such page.
    pub const VIRTIO_BALLOON_PAGE_BYTES: u64 = 1 << VIRTIO_BALLOON_PFN_SHIFT;
}

/// Converts bytes to whole balloon pages. What does not fit 32 bits is cut
/// off, as the API this device is compatible with does.
#[expect(
    clippy::cast_possible_truncation,
    reason = "num_pages is 32 bits on the wire"
)]
const fn pages_of_bytes(bytes: u64) -> u32 {
    (bytes >> spec::VIRTIO_BALLOON_PFN_SHIFT) as u32
}

/// Converts balloon pages to bytes.
const fn bytes_of_pages(pages: u32) -> u64 {
    (pages as u64) << spec::VIRTIO_BALLOON_PFN_SHIFT
}
