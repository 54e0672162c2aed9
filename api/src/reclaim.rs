//! `GET /vm.reclaim-stats`: how much memory came back to the host, and how.
//!
//! Three figures describe the same memory from three sides and must not be added up: *ballooned* is what the guest
//! gave up, *reported* (`report.requested_bytes`) is what it offered over time, *reclaimed* is what is not resident on
//! the host right now. Only the last one is measured from the page tables.

use std::collections::BTreeMap;

use device_facts::{BalloonStats, GuestReporting};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{HintingStatus, ReportingStatus};

/// How much memory came back to the host. Ballooned, reported and reclaimed describe the same memory from three sides
/// and must not be added up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({
    "configured_bytes": 1 << 30,
    "resident_bytes": 114_294_784,
    "reclaimed_bytes": 959_447_040,
    "ballooned_bytes": 0,
    "balloon_target_bytes": 0,
    "backing": "anonymous-private",
    "residency_method": "pagemap",
    "resident_sample_us": 310,
    "resident_age_ms": 0,
    "reporting": {"active": true},
})))]
pub struct ReclaimStats {
    /// Guest RAM as configured, bytes.
    pub configured_bytes: u64,
    /// Guest RAM that occupies host memory now, bytes, measured by `residency_method`.
    pub resident_bytes: u64,
    /// Configured guest RAM that does not occupy host memory now, bytes: `configured_bytes - resident_bytes`. It holds
    /// what was given back and what was never touched.
    pub reclaimed_bytes: u64,
    /// Memory that came back to the guest after it was given back, bytes, found by `repopulated_method`.
    #[serde(default)]
    pub repopulated_bytes: u64,
    /// How `repopulated_bytes` was found. `discarded-minus-absent`: bytes discarded since boot over all paths, less
    /// `reclaimed_bytes`, at least 0. Memory the guest never touched is absent too and hides as much; memory that was
    /// discarded twice counts twice.
    #[serde(default)]
    pub repopulated_method: String,
    /// Guest RAM in the host's swap, bytes; absent when the method cannot tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swapped_bytes: Option<u64>,
    /// Bytes the guest says are in the balloon.
    pub ballooned_bytes: u64,
    /// Bytes the operator wants in the balloon.
    pub balloon_target_bytes: u64,
    /// What guest RAM is made of, which decides how it can be discarded: `anonymous-private`, `memfd-shared`,
    /// `hugetlb-shared`, `hugetlb-private`, `file-shared`, `file-private`, or `mixed` if its zones differ.
    #[serde(default)]
    pub backing: String,
    /// Residency zone by zone; RAM without zones is one, `mem0`. Empty where residency was not measured.
    #[serde(default)]
    pub zones: Vec<ZoneResidency>,
    /// How `resident_bytes` was measured.
    #[serde(default)]
    pub residency_method: String,
    /// What that measurement cost, µs.
    #[serde(default)]
    pub resident_sample_us: u64,
    /// How old that measurement is, ms.
    #[serde(default)]
    pub resident_age_ms: u64,
    /// Whether the guest reports free pages, and if not, why.
    #[serde(default)]
    pub reporting: ReportingStatus,
    /// Memory the guest reported as free (reporting queue).
    #[serde(default)]
    pub report: ReclaimPath,
    /// Memory the guest put into the balloon (inflate queue).
    #[serde(default)]
    pub inflate: ReclaimPath,
    /// Memory the guest hinted at in runs the operator asked for (free page hinting queue).
    #[serde(default)]
    pub hint: ReclaimPath,
    /// Where such a run stands.
    #[serde(default)]
    pub hinting: HintingStatus,
    /// The guest's own view, from the statistics queue; absent before the first sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestSample>,
}

/// What one zone of guest RAM holds of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct ZoneResidency {
    /// Name of the zone.
    pub id: String,
    /// What it is made of, as in `ReclaimStats::backing`.
    pub backing: String,
    /// Size of its pages, bytes: less than a page cannot be given back.
    pub page_bytes: u64,
    /// Its size, bytes; of the zone `mem0-hotplug`, what the guest has plugged in.
    pub configured_bytes: u64,
    /// Of it, held in host memory now, bytes.
    pub resident_bytes: u64,
    /// `configured_bytes - resident_bytes`.
    pub reclaimed_bytes: u64,
    /// Of it, in the host's swap, bytes.
    pub swapped_bytes: u64,
    /// Whether the guest can report free pages of this zone, and if not, why.
    pub reporting: ZoneReporting,
}

/// Whether free pages of one zone can be reported.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct ZoneReporting {
    /// True when the guest's reports are accepted and acted upon.
    pub active: bool,
    /// Why it is not active; absent when it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What came in over one queue since the VM booted, and what became of it. Every requested byte ends in exactly one of
/// `discarded_bytes`, `skipped_bytes` and `failed_bytes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct ReclaimPath {
    /// Bytes the guest named.
    pub requested_bytes: u64,
    /// Ranges the guest named, before merging.
    pub requested_ranges: u64,
    /// Bytes the host kernel was asked to take back, successfully.
    pub discarded_bytes: u64,
    /// `discarded_bytes` per second, the mean of the last ten whole seconds.
    #[serde(default)]
    pub discarded_bytes_per_second: u64,
    /// Ranges the host kernel took back, after merging.
    pub discarded_ranges: u64,
    /// Bytes left alone on purpose, by reason.
    #[serde(default)]
    pub skipped_bytes: BTreeMap<String, u64>,
    /// Bytes for which the host kernel refused.
    pub failed_bytes: u64,
    /// Ranges for which the host kernel refused.
    pub failed_ranges: u64,
    /// Batches: buffers the guest handed over, each answered as one.
    pub batches: u64,
    /// System calls made to discard.
    pub discard_syscalls: u64,
    /// Time from taking a batch off the queue to its answer, µs.
    #[serde(default)]
    pub latency_us: LatencySummary,
    /// The most recent batch; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_batch: Option<LastBatch>,
}

impl ReclaimPath {
    /// Bytes left alone for any reason.
    pub fn skipped_bytes_total(&self) -> u64 {
        self.skipped_bytes
            .values()
            .fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }
}

/// A distribution of durations, in the unit that the name of the field holding it gives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct LatencySummary {
    /// Number of durations seen.
    pub count: u64,
    /// Half of them took no longer; an upper bound from a histogram.
    pub p50: u64,
    /// Ninety-nine in a hundred took no longer; an upper bound from a histogram.
    pub p99: u64,
    /// The longest.
    pub max: u64,
    /// The whole distribution: the buckets that have counted something, ascending. Eight share a power of two, so each
    /// duration is known to within an eighth.
    #[serde(default)]
    pub buckets: Vec<LatencyBucket>,
}

/// The durations above the bucket before it and up to `le`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct LatencyBucket {
    /// The longest duration this bucket takes.
    pub le: u64,
    /// How many it holds, not counting those before it.
    pub count: u64,
}

/// The most recent batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct LastBatch {
    /// Bytes discarded.
    pub bytes: u64,
    /// Ranges the guest named.
    pub ranges: u64,
    /// Time from taking it off the queue to its answer, µs.
    pub latency_us: u64,
    /// How long ago it was answered, ms.
    pub age_ms: u64,
}

/// The guest's statistics with their age.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct GuestSample {
    /// The statistics the guest sent.
    pub stats: BalloonStats,
    /// What a guest with our kernel patches says of its reporting; absent from any other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reporting: Option<GuestReporting>,
    /// How long ago they arrived, ms.
    pub age_ms: u64,
}
