//! `GET /vm.reclaim-stats`: how much memory returned to the host, and how.
//!
//! Three figures describe overlapping memory and must not be added up. *Ballooned* is memory that the guest put into
//! the balloon. *Reported* (`report.requested_bytes`) is memory that it offered over time. *Reclaimed* is memory that
//! is not resident on the host now. Only the last one is measured from the page tables.

use std::collections::BTreeMap;

use device_facts::{BalloonStats, GuestReporting};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{HintingStatus, ReportingStatus};

/// How much guest memory returned to the host. Ballooned, reported and reclaimed memory overlap and must not be added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({
    "configured_bytes": 1 << 30,
    "resident_bytes": 114_294_784,
    "reclaimed_bytes": 959_447_040,
    "ballooned_bytes": 0,
    "balloon_target_bytes": 0,
    "backing": "anonymous-private",
    "residency_method": "pagemap",
    "charged_bytes": 121_634_816,
    "charged_method": "cgroup",
    "uncharged_bytes": 415_236_096,
    "resident_sample_us": 310,
    "resident_age_ms": 0,
    "reporting": {"active": true},
})))]
pub struct ReclaimStats {
    /// Guest RAM as configured, bytes.
    pub configured_bytes: u64,
    /// Guest RAM that occupies host memory now, bytes, measured by `residency_method`.
    pub resident_bytes: u64,
    /// Configured guest RAM that does not occupy host memory now, bytes: `configured_bytes - resident_bytes`. It
    /// includes memory that was returned and memory that was never touched.
    pub reclaimed_bytes: u64,
    /// Host memory that the kernel attributes to the VMM, with guest RAM, bytes, by `charged_method`; 0 if unknown. It
    /// exceeds `resident_bytes` by the VMM's own memory, and by memory that the kernel keeps although the guest returned
    /// it, because it belongs to a huge page of which another part is in use.
    #[serde(default)]
    pub charged_bytes: u64,
    /// How `charged_bytes` was determined. `cgroup`: charge of the VMM's control group, in which it is alone, without page
    /// cache and kernel memory. `process`: resident set of the VMM, which does not include kept memory. The latter is used
    /// if other processes are in the group, if guest RAM is in files, or if the VMM was moved to the group with memory that
    /// is charged to another.
    #[serde(default)]
    pub charged_method: String,
    /// Configured guest RAM that costs the host no memory, bytes: `configured_bytes - charged_bytes`, at least 0:
    /// memory that the host can use for other purposes.
    #[serde(default)]
    pub uncharged_bytes: u64,
    /// Memory that the guest touched again after it was returned, bytes, by `repopulated_method`.
    #[serde(default)]
    pub repopulated_bytes: u64,
    /// How `repopulated_bytes` was determined. `discarded-minus-absent`: bytes discarded since boot over all paths,
    /// less `reclaimed_bytes`, at least 0. Memory that the guest never touched lowers this figure by as much; memory
    /// that was discarded twice counts twice.
    #[serde(default)]
    pub repopulated_method: String,
    /// Guest RAM in the host's swap, bytes; absent if the method cannot measure it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swapped_bytes: Option<u64>,
    /// Memory beyond `configured_bytes` that the guest can take without the host's consent, bytes: memory that the
    /// guest was asked to plug and has not plugged; all of `hotplug_size` once another process, such as the back end of
    /// a shared folder, has mapped guest RAM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub obtainable_bytes: Option<u64>,
    /// Size of the balloon as the guest reports it, bytes.
    pub ballooned_bytes: u64,
    /// Target size of the balloon, bytes.
    pub balloon_target_bytes: u64,
    /// Backing of guest RAM, which determines how it is discarded: `anonymous-private`, `memfd-shared`,
    /// `hugetlb-shared`, `hugetlb-private`, `file-shared`, `file-private`, or `mixed` if its zones differ.
    #[serde(default)]
    pub backing: String,
    /// Residency of each zone; RAM without zones is one zone, `mem0`. Empty if residency was not measured.
    #[serde(default)]
    pub zones: Vec<ZoneResidency>,
    /// How `resident_bytes` was measured.
    #[serde(default)]
    pub residency_method: String,
    /// Duration of that measurement, µs.
    #[serde(default)]
    pub resident_sample_us: u64,
    /// Age of that measurement, ms.
    #[serde(default)]
    pub resident_age_ms: u64,
    /// Why no memory that the guest gives back is returned to the host now: `assigned_device`, `memory_export` (snapshot,
    /// migration, dump) or `memory_import` (restore, migration); absent if it is returned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inhibited: Option<String>,
    /// Whether the guest reports free pages, and if not, why.
    #[serde(default)]
    pub reporting: ReportingStatus,
    /// Memory the guest reported as free (reporting queue).
    #[serde(default)]
    pub report: ReclaimPath,
    /// Memory the guest put into the balloon (inflate queue).
    #[serde(default)]
    pub inflate: ReclaimPath,
    /// Memory the guest hinted at in runs that the operator requested (free page hinting queue).
    #[serde(default)]
    pub hint: ReclaimPath,
    /// State of the current or latest run of free page hinting.
    #[serde(default)]
    pub hinting: HintingStatus,
    /// The guest's own view, from the statistics queue; absent before the first sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestSample>,
}

/// The part of `GET /vm.reclaim-stats` that is about hinting.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct HintingReport {
    /// Its state.
    pub hinting: HintingStatus,
    /// The memory it returned.
    pub hint: ReclaimPath,
}

/// Host memory that one zone of guest RAM occupies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct ZoneResidency {
    /// Name of the zone.
    pub id: String,
    /// Its backing, as in `ReclaimStats::backing`.
    pub backing: String,
    /// Size of its pages, bytes, the smallest unit that can be returned.
    pub page_bytes: u64,
    /// Its size, bytes; for the zone in which another grows (`mem0-hotplug`), the plugged part.
    pub configured_bytes: u64,
    /// Part in host memory now, bytes.
    pub resident_bytes: u64,
    /// `configured_bytes - resident_bytes`.
    pub reclaimed_bytes: u64,
    /// Part in the host's swap, bytes.
    pub swapped_bytes: u64,
    /// Whether the guest can report free pages of this zone, and if not, why.
    pub reporting: ZoneReporting,
}

/// Whether free pages of one zone can be reported.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct ZoneReporting {
    /// True if reported memory is discarded.
    pub active: bool,
    /// Reason why reporting is inactive; absent if it is active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Requests of one queue since the VM booted, and their outcome. Every requested byte is counted in exactly one of
/// `discarded_bytes`, `skipped_bytes` and `failed_bytes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct ReclaimPath {
    /// Bytes the guest named.
    pub requested_bytes: u64,
    /// Ranges the guest named, before merging.
    pub requested_ranges: u64,
    /// Bytes that the host kernel freed on request.
    pub discarded_bytes: u64,
    /// Part of `discarded_bytes` that did not cover whole blocks of 2 MiB of private memory, since this VMM started. If
    /// such a block was a transparent huge page, the VMM made the host kernel split it, to free the memory.
    #[serde(default)]
    pub discarded_partial_bytes: u64,
    /// `discarded_bytes` per second, the mean of the last ten whole seconds.
    #[serde(default)]
    pub discarded_bytes_per_second: u64,
    /// Ranges that the host kernel freed, after merging.
    pub discarded_ranges: u64,
    /// Bytes deliberately not discarded, by reason.
    #[serde(default)]
    pub skipped_bytes: BTreeMap<String, u64>,
    /// Bytes that the host kernel failed to free.
    pub failed_bytes: u64,
    /// Ranges that the host kernel failed to free.
    pub failed_ranges: u64,
    /// Batches: descriptor chains of the guest, each completed as one.
    pub batches: u64,
    /// System calls that discarded memory.
    pub discard_syscalls: u64,
    /// Time from the removal of a batch from the queue to its completion, µs.
    #[serde(default)]
    pub latency_us: LatencySummary,
    /// The most recent batch; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_batch: Option<LastBatch>,
}

impl ReclaimPath {
    /// Bytes skipped for any reason.
    pub fn skipped_bytes_total(&self) -> u64 {
        self.skipped_bytes
            .values()
            .fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }
}

/// A distribution of durations. The name of the enclosing field gives the unit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct LatencySummary {
    /// Number of durations.
    pub count: u64,
    /// Median; an upper bound from a histogram.
    pub p50: u64,
    /// 99th percentile; an upper bound from a histogram.
    pub p99: u64,
    /// The longest.
    pub max: u64,
    /// The complete distribution: buckets that are not empty, ascending. A power of two has eight buckets, so each
    /// duration is known to within an eighth.
    #[serde(default)]
    pub buckets: Vec<LatencyBucket>,
}

/// The durations above the previous bucket's `le` and up to this `le`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct LatencyBucket {
    /// The longest duration in this bucket.
    pub le: u64,
    /// Number of durations in this bucket alone.
    pub count: u64,
}

/// The most recent batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct LastBatch {
    /// Bytes discarded.
    pub bytes: u64,
    /// Ranges the guest named.
    pub ranges: u64,
    /// Time from its removal from the queue to its completion, µs.
    pub latency_us: u64,
    /// Time since it was completed, ms.
    pub age_ms: u64,
}

/// The guest's statistics with their age.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct GuestSample {
    /// The statistics the guest sent.
    pub stats: BalloonStats,
    /// Reporting statistics of a guest with our kernel patches; absent for other guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reporting: Option<GuestReporting>,
    /// Time since they arrived, ms.
    pub age_ms: u64,
}
