//! Read-only access to a running machine for API threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use api::{BalloonStatsResponse, DeviceNode, ReclaimStats, VmCounters};
use virtio_devices::balloon::{BalloonHandle, StatsError};
use virtio_devices::reclaim::{ResidencyError, ResidencyProbe};
use virtio_devices::{Counters, VirtioDevice};

use super::reclaim_report;

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BalloonStatsError {
    /// The configuration has no balloon.
    #[error("Missing virtio-balloon, can't proceed as expected")]
    MissingBalloon,
    /// The guest sent none.
    #[error("The guest has not sent its memory statistics")]
    NoAnswer(#[source] StatsError),
    /// The page tables cannot be read.
    #[error("Cannot measure the residency of guest memory")]
    Residency(#[source] ResidencyError),
}

/// Where the counters of one device come from.
pub(super) enum CounterSource {
    Balloon(BalloonHandle),
    Device(Arc<Mutex<dyn VirtioDevice>>),
}

impl CounterSource {
    fn read(&self) -> Counters {
        match self {
            Self::Balloon(balloon) => balloon.counters(),
            Self::Device(device) => device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .counters(),
        }
    }
}

/// What an observer looks at; made once when the machine is built.
pub(super) struct Observed {
    pub(super) ram_bytes: u64,
    pub(super) backing: &'static str,
    pub(super) residency: ResidencyProbe,
    pub(super) balloon: Option<BalloonHandle>,
    pub(super) counters: Vec<(String, CounterSource)>,
    pub(super) device_tree: BTreeMap<String, DeviceNode>,
}

/// A handle on the figures of one machine. Cheap to clone; keeps the guest's
/// RAM mapped as long as it lives, so holders drop it with the machine.
#[derive(Clone)]
pub struct VmObserver {
    observed: Arc<Observed>,
}

impl std::fmt::Debug for VmObserver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmObserver")
            .field("ram_bytes", &self.observed.ram_bytes)
            .finish_non_exhaustive()
    }
}

impl VmObserver {
    pub(super) fn new(observed: Observed) -> Self {
        Self {
            observed: Arc::new(observed),
        }
    }

    /// Configured RAM less what the guest says is in the balloon. O(1).
    pub fn memory_actual_size_bytes(&self) -> u64 {
        let ballooned = self
            .observed
            .balloon
            .as_ref()
            .map_or(0, BalloonHandle::actual_bytes);
        self.observed.ram_bytes.saturating_sub(ballooned)
    }

    /// Counters by device. Takes microseconds.
    pub fn counters(&self) -> VmCounters {
        self.observed
            .counters
            .iter()
            .map(|(id, source)| (id.clone(), source.read()))
            .filter(|(_, counters)| !counters.is_empty())
            .map(|(id, counters)| {
                let named = counters
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value))
                    .collect();
                (id, named)
            })
            .collect()
    }

    /// A fresh statistics sample from the guest; waits for it until `deadline`.
    ///
    /// # Errors
    /// No balloon, or no answer in time.
    pub fn balloon_stats(
        &self,
        deadline: Instant,
    ) -> Result<BalloonStatsResponse, BalloonStatsError> {
        let balloon = self
            .observed
            .balloon
            .as_ref()
            .ok_or(BalloonStatsError::MissingBalloon)?;
        let sample = balloon
            .request_stats(deadline)
            .map_err(BalloonStatsError::NoAnswer)?;
        let age = sample.taken.elapsed();
        let since_epoch = SystemTime::now()
            .checked_sub(age)
            .and_then(|taken| taken.duration_since(SystemTime::UNIX_EPOCH).ok())
            .unwrap_or_default();
        Ok(BalloonStatsResponse {
            balloon_actual: balloon.actual_bytes(),
            last_update: reclaim_report::millis(since_epoch),
            age_ms: Some(reclaim_report::millis(age)),
            stats: reclaim_report::guest_stats(&sample),
        })
    }

    /// What the guest gave back; measures residency, which takes a few milliseconds.
    ///
    /// # Errors
    /// The page tables cannot be read.
    pub fn reclaim_stats(&self) -> Result<ReclaimStats, BalloonStatsError> {
        let residency = self
            .observed
            .residency
            .sample()
            .map_err(BalloonStatsError::Residency)?;
        let balloon = self.observed.balloon.as_ref().map(BalloonHandle::snapshot);
        Ok(reclaim_report::reclaim_stats(
            &residency,
            self.observed.backing,
            balloon.as_ref(),
        ))
    }

    /// Devices by id with their PCI addresses.
    pub fn device_tree(&self) -> BTreeMap<String, DeviceNode> {
        self.observed.device_tree.clone()
    }
}
