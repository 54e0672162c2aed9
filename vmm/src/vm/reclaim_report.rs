//! `vm.reclaim-stats` and `vm.balloon-stats` from what the balloon and the page tables say.
//!
//! The device's types are not wire types: this is the one place where they meet.

use std::time::Duration;

use api::{
    BalloonStats, GuestSample, HintingStatus, LastBatch, LatencySummary, ReclaimPath, ReclaimStats,
    ReportingStatus,
};
use virtio_devices::balloon::{BalloonSnapshot, PathFigures, StatsSample};
use virtio_devices::reclaim::ResidencySample;

/// Puts the answer together. Without a balloon only residency has figures, and without a sample residency has none.
pub(super) fn reclaim_stats(
    residency: Option<&ResidencySample>,
    backing: &str,
    balloon: Option<&BalloonSnapshot>,
) -> ReclaimStats {
    let mut stats = ReclaimStats {
        backing: backing.to_owned(),
        reporting: ReportingStatus {
            active: false,
            reason: Some("inactive: the machine has no balloon".to_owned()),
        },
        ..ReclaimStats::default()
    };
    if let Some(residency) = residency {
        stats.configured_bytes = residency.configured_bytes;
        stats.resident_bytes = residency.resident_bytes;
        stats.reclaimed_bytes = residency.reclaimed_bytes();
        stats.swapped_bytes = Some(residency.swapped_bytes);
        stats.residency_method = residency.method.name().to_owned();
        stats.resident_sample_us = residency.cost_us;
        stats.resident_age_ms = millis(residency.taken.elapsed());
    }
    if let Some(balloon) = balloon {
        stats.ballooned_bytes = balloon.actual_bytes;
        stats.balloon_target_bytes = balloon.target_bytes;
        stats.report = path(&balloon.report);
        stats.inflate = path(&balloon.inflate);
        stats.hint = path(&balloon.hint);
        stats.hinting = HintingStatus {
            state: balloon.hinting.phase.name().to_owned(),
            command_id: balloon.hinting.command_id,
            runs_requested: balloon.hinting.runs_requested,
            runs_completed: balloon.hinting.runs_completed,
        };
        stats.reporting = ReportingStatus {
            active: balloon.reporting.is_active(),
            reason: (!balloon.reporting.is_active()).then(|| balloon.reporting.to_string()),
        };
        stats.guest = balloon.stats.as_ref().map(|sample| GuestSample {
            stats: guest_stats(sample),
            age_ms: millis(sample.taken.elapsed()),
        });
    }
    stats
}

/// The statistics under their wire names.
pub(super) fn guest_stats(sample: &StatsSample) -> BalloonStats {
    let mut stats = BalloonStats::default();
    for (tag, value) in sample.iter() {
        let known = stats.set(tag as u16, value);
        debug_assert!(known, "both tables hold the tags of the standard");
    }
    stats
}

/// Whole milliseconds of a duration that fits.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn path(figures: &PathFigures) -> ReclaimPath {
    ReclaimPath {
        requested_bytes: figures.requested.bytes,
        requested_ranges: figures.requested.ranges,
        discarded_bytes: figures.discarded.bytes,
        discarded_ranges: figures.discarded.ranges,
        skipped_bytes: figures
            .skipped
            .iter()
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(reason, bytes)| (reason.name().to_owned(), bytes))
            .collect(),
        failed_bytes: figures.failed.bytes,
        failed_ranges: figures.failed.ranges,
        batches: figures.batches,
        discard_syscalls: figures.syscalls,
        latency_us: LatencySummary {
            count: figures.latency.count(),
            p50: figures.latency.percentile_us(50),
            p99: figures.latency.percentile_us(99),
            max: figures.latency.max_us(),
        },
        last_batch: figures.last.map(|last| LastBatch {
            bytes: last.discarded.bytes,
            ranges: last.requested.ranges,
            latency_us: last.took_us,
            age_ms: millis(last.at.elapsed()),
        }),
    }
}
