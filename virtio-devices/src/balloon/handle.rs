//! The VMM's handle to the balloon: target, figures, statistics.
//!
//! All calls are allowed from any thread. Only [`BalloonHandle::request_stats`] waits for the guest, and only until its
//! caller's deadline.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use device_facts::{PausePhase, ReportingPolicy};

use super::accounting::{GuestFaults, Path, PathFigures};
use super::counters;
use super::hinting::{HintingError, HintingRuns};
use super::reporting_policy::{PolicyStatus, ReportNowStatus, ReportingError};
use super::shared::Shared;
use super::spec::{
    VIRTIO_BALLOON_F_FREE_PAGE_HINT, VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING,
};
use super::stats::{StatsError, StatsSample};

use crate::device::Counters;
use crate::reclaim::{Extent, InhibitGuard, InhibitReason};

/// One balloon; clones are the same balloon.
#[derive(Clone, Debug)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

/// Whether reports arrive and are discarded; if not, the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReportingState {
    /// The guest reports, and reports are discarded.
    Active,
    /// Reporting is not configured.
    NotConfigured,
    /// All guest RAM consists of pages larger than the blocks that guests report, or of private file mappings although
    /// the guest expects zeros in its free pages.
    BackingUnsuitable,
    /// No driver is running yet.
    DriverNotReady,
    /// The driver does not report: it is too old, or was built without it.
    GuestDeclined,
    /// The driver reports but has not enabled the queue.
    QueueNotEnabled,
    /// The operator has paused reporting, and the guest has confirmed that it sends no reports.
    PausedByGuest,
    /// The operator has paused reporting; reports may arrive but are not discarded.
    PausedByDevice,
    /// Reports arrive, but the guest expects this value in its free pages.
    PagePoison(u32),
    /// Reports arrive but discarding is switched off.
    Inhibited(InhibitReason),
}

impl ReportingState {
    /// Whether reports are discarded.
    #[must_use]
    pub fn is_active(self) -> bool {
        self == Self::Active
    }
}

impl std::fmt::Display for ReportingState {
    /// Completes the sentence "reporting is …".
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Active => f.write_str("active"),
            Self::NotConfigured => f.write_str("inactive: not configured"),
            Self::BackingUnsuitable => {
                f.write_str("inactive: guest memory is backed by pages that reports cannot free")
            }
            Self::DriverNotReady => f.write_str("inactive: no balloon driver is running"),
            Self::GuestDeclined => f.write_str("inactive: the guest's driver does not report"),
            Self::QueueNotEnabled => {
                f.write_str("inactive: the guest's driver has not enabled the queue")
            }
            Self::PausedByGuest => {
                f.write_str("inactive: paused by the operator, and the guest has stopped")
            }
            Self::PausedByDevice => f.write_str(
                "inactive: paused by the operator; what the guest reports is left alone",
            ),
            Self::PagePoison(value) => write!(
                f,
                "inactive: the guest relies on finding {value:#010x} in its free pages"
            ),
            Self::Inhibited(reason) => {
                write!(f, "inactive: discarding is inhibited by {}", reason.name())
            }
        }
    }
}

/// All figures of a balloon at one moment.
#[derive(Clone, Debug)]
pub struct BalloonSnapshot {
    /// The guest's RAM.
    pub ram_bytes: u64,
    /// The host's target.
    pub target_bytes: u64,
    /// The balloon's size as the guest reports it, limited to the size of RAM.
    pub actual_bytes: u64,
    /// Memory returned by free page reporting.
    pub report: PathFigures,
    /// Memory returned by inflation.
    pub inflate: PathFigures,
    /// Memory returned by free page hinting.
    pub hint: PathFigures,
    /// The state of hinting.
    pub hinting: HintingRuns,
    /// Memory that the guest took back: chains and bytes.
    pub deflated: Extent,
    /// Faults of the guest.
    pub faults: GuestFaults,
    /// Whether reporting works.
    pub reporting: ReportingState,
    /// Why nothing is discarded, neither reports nor the balloon's pages.
    pub inhibited: Option<InhibitReason>,
    /// Phase of a reporting pause.
    pub pause: PausePhase,
    /// The latest request for a full report.
    pub report_now: ReportNowStatus,
    /// The last statistics, regardless of their age.
    pub stats: Option<StatsSample>,
}

impl BalloonHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Sets the target to `bytes`, rounded to whole pages of 4 KiB, and returns immediately. The guest approaches it at
    /// its own pace.
    pub fn set_target_bytes(&self, bytes: u64) {
        self.shared.config.set_target_bytes(bytes);
        self.shared.interrupt.signal();
    }

    /// The host's target.
    #[must_use]
    pub fn target_bytes(&self) -> u64 {
        self.shared.config.target_bytes()
    }

    /// The balloon's size as the guest reports it. The claim may be wrong, so it is limited to the guest's RAM.
    #[must_use]
    pub fn actual_bytes(&self) -> u64 {
        self.shared.actual_bytes()
    }

    /// Requests fresh statistics from the guest. Callers that arrive while a request is pending share it.
    ///
    /// # Errors
    /// No driver sends statistics, the driver did not respond before `deadline` (a paused machine never does), or it is
    /// gone.
    pub fn request_stats(&self, deadline: Instant) -> Result<StatsSample, StatsError> {
        self.shared
            .stats
            .request(deadline, || self.wake_for_statistics())
    }

    /// Makes the guest send statistics at this interval, so that [`BalloonHandle::cached_stats`] is never much older.
    /// Zero stops polling. The interval is rounded up to whole milliseconds. Each sample wakes the guest once.
    pub fn set_stats_poll(&self, interval: Duration) {
        let poll_ms = interval.as_nanos().div_ceil(1_000_000);
        let poll_ms = u64::try_from(poll_ms).unwrap_or(u64::MAX);
        self.shared.stats_poll_ms.store(poll_ms, Ordering::Relaxed);
        self.wake_for_statistics();
    }

    fn wake_for_statistics(&self) {
        if let Err(e) = self.shared.refill.write(1) {
            // Only a full counter rejects the write, and then the worker is about to wake anyway.
            log::debug!("balloon: statistics request not signalled: {e}");
        }
    }

    /// The last statistics, regardless of their age, without a request to the guest.
    #[must_use]
    pub fn cached_stats(&self) -> Option<StatsSample> {
        self.shared.stats.latest()
    }

    /// Requests hints of all free memory from the guest, and returns immediately with the id of the run. During the run
    /// the guest cannot use that memory; at the end it takes the memory back.
    ///
    /// # Errors
    /// No driver supports hinting, or a run is in progress.
    pub fn start_hinting(&self) -> Result<u32, HintingError> {
        self.check_hinting()?;
        let id = self.shared.hinting.start(&self.shared.config)?;
        self.shared.interrupt.signal();
        Ok(id)
    }

    /// Ends the hinting run, if there is one, and returns immediately. The current batch is still discarded, but no
    /// further one.
    ///
    /// # Errors
    /// Hinting is not offered.
    pub fn stop_hinting(&self) -> Result<(), HintingError> {
        if !self.shared.offers(VIRTIO_BALLOON_F_FREE_PAGE_HINT) {
            return Err(HintingError::NotOffered);
        }
        if self.shared.hinting.stop(&self.shared.config) {
            self.shared.interrupt.signal();
        }
        Ok(())
    }

    /// The state of hinting.
    #[must_use]
    pub fn hinting(&self) -> HintingRuns {
        self.shared.hinting.status()
    }

    fn check_hinting(&self) -> Result<(), HintingError> {
        if !self.shared.offers(VIRTIO_BALLOON_F_FREE_PAGE_HINT) {
            return Err(HintingError::NotOffered);
        }
        match self.shared.driver() {
            None => Err(HintingError::DriverNotReady),
            Some(driver) if !driver.has_hint_queue => Err(HintingError::GuestDeclined),
            Some(_) => Ok(()),
        }
    }

    /// Sends a reporting policy to the guest, if it supports one, and returns immediately. The policy also applies to
    /// later drivers.
    pub fn set_reporting_policy(&self, policy: ReportingPolicy) {
        self.shared.control.set_policy(policy);
        self.shared.interrupt.signal();
    }

    /// The status of the policy in this guest.
    #[must_use]
    pub fn reporting_policy(&self) -> PolicyStatus {
        self.shared.control.policy_status()
    }

    /// Requests a pause of reporting and returns immediately; see [`BalloonHandle::wait_for_pause`]. It persists across
    /// resets of the device, until [`BalloonHandle::resume_reporting`].
    ///
    /// # Errors
    /// Reporting is not offered.
    pub fn pause_reporting(&self) -> Result<(), ReportingError> {
        self.check_reporting()?;
        self.shared.control.pause();
        self.shared.interrupt.signal();
        Ok(())
    }

    /// Waits until a requested pause is complete. If the guest has not confirmed by `deadline`, its reports are no
    /// longer discarded: `PausedByDevice`. Returns `Pausing` only if a batch does not finish.
    #[must_use]
    pub fn wait_for_pause(&self, deadline: Instant) -> PausePhase {
        self.shared.control.wait_for_pause(deadline)
    }

    /// Ends the pause, if there is one. A guest that does not know about the pause does not report again what it
    /// reported in the meantime.
    ///
    /// # Errors
    /// Reporting is not offered.
    pub fn resume_reporting(&self) -> Result<(), ReportingError> {
        self.check_reporting()?;
        self.shared.control.resume();
        self.shared.interrupt.signal();
        Ok(())
    }

    /// Requests an immediate report of all free memory from a guest that supports a policy. With `again`, this includes
    /// memory that it has already reported. Returns the number of the request.
    ///
    /// # Errors
    /// The guest does not support the request, or reporting is paused.
    pub fn report_now(&self, again: bool) -> Result<u32, ReportingError> {
        self.check_reporting()?;
        let id = self.shared.control.report_now(again)?;
        self.shared.interrupt.signal();
        Ok(id)
    }

    /// The latest request for a full report.
    #[must_use]
    pub fn report_now_status(&self) -> ReportNowStatus {
        self.shared.control.report_now_status()
    }

    fn check_reporting(&self) -> Result<(), ReportingError> {
        match self.shared.offers(VIRTIO_BALLOON_F_REPORTING) {
            true => Ok(()),
            false => Err(ReportingError::ReportingNotOffered),
        }
    }

    /// Disables discarding, for reports, inflation and hints, until the guard is dropped.
    #[must_use]
    pub fn inhibit(&self, reason: InhibitReason) -> InhibitGuard {
        self.shared.switch.inhibit(reason)
    }

    /// Whether free page reporting works; if not, the reason.
    #[must_use]
    pub fn reporting(&self) -> ReportingState {
        let shared = &self.shared;
        if !shared.reporting_configured {
            return ReportingState::NotConfigured;
        }
        if !shared.offers(VIRTIO_BALLOON_F_REPORTING) {
            return ReportingState::BackingUnsuitable;
        }
        let Some(driver) = shared.driver() else {
            return ReportingState::DriverNotReady;
        };
        if driver.features & VIRTIO_BALLOON_F_REPORTING == 0 {
            return ReportingState::GuestDeclined;
        }
        if !driver.has_reporting_queue {
            return ReportingState::QueueNotEnabled;
        }
        match shared.control.phase() {
            PausePhase::PausedByGuest => return ReportingState::PausedByGuest,
            PausePhase::PausedByDevice => return ReportingState::PausedByDevice,
            PausePhase::Running | PausePhase::Pausing => {}
        }
        if let Some(value) = shared.poison(driver.features) {
            return ReportingState::PagePoison(value);
        }
        if driver.features & VIRTIO_BALLOON_F_PAGE_POISON != 0 && !shared.blocks_can_be_zeros {
            return ReportingState::BackingUnsuitable;
        }
        match shared.switch.inhibited() {
            Some(reason) => ReportingState::Inhibited(reason),
            None => ReportingState::Active,
        }
    }

    /// All figures.
    #[must_use]
    pub fn snapshot(&self) -> BalloonSnapshot {
        let shared = &self.shared;
        BalloonSnapshot {
            ram_bytes: shared.ram_bytes(),
            target_bytes: self.target_bytes(),
            actual_bytes: self.actual_bytes(),
            report: shared.ledger.path(Path::Report).clone(),
            inflate: shared.ledger.path(Path::Inflate).clone(),
            hint: shared.ledger.path(Path::Hint).clone(),
            hinting: self.hinting(),
            deflated: *shared.ledger.deflate(),
            faults: *shared.ledger.faults(),
            reporting: self.reporting(),
            inhibited: shared
                .switch
                .inhibited()
                .filter(|reason| *reason != InhibitReason::ReportingPaused),
            pause: shared.control.phase(),
            report_now: self.report_now_status(),
            stats: self.cached_stats(),
        }
    }

    /// The figures as named numbers, for `vm.counters`.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let snapshot = self.snapshot();
        let mut figures = Counters::from([
            ("target_bytes", snapshot.target_bytes),
            ("actual_bytes", snapshot.actual_bytes),
            ("deflate_chains", snapshot.deflated.ranges),
            ("deflate_bytes", snapshot.deflated.bytes),
            ("hinting_runs_requested", snapshot.hinting.runs_requested),
            ("hinting_runs_completed", snapshot.hinting.runs_completed),
        ]);
        for (names, path) in [
            (&counters::REPORT, &snapshot.report),
            (&counters::INFLATE, &snapshot.inflate),
            (&counters::HINT, &snapshot.hint),
        ] {
            figures.extend(counters::of_path(names, path));
        }
        figures.extend(snapshot.faults.iter());
        figures
    }
}
