//! One value of every wire type, with every field set.
//!
//! Structs are written out in full: a field added to a type does not compile here until it has a sample, and then not
//! pass until it has a description.

use std::borrow::Cow;
use std::collections::BTreeMap;

use api::config::*;
use api::*;
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::schema::Document;

/// A type with its schema.
pub(crate) struct Sample {
    /// Name of its schema.
    pub(crate) schema: Cow<'static, str>,
    /// The value with every field set.
    pub(crate) full: Value,
    /// Decodes into the type and encodes again.
    pub(crate) round_trip: fn(&Value) -> Result<Value, String>,
}

fn sample<T: Serialize + DeserializeOwned>(
    schema: impl Into<Cow<'static, str>>,
    value: &T,
) -> Sample {
    Sample {
        schema: schema.into(),
        full: serde_json::to_value(value).unwrap(),
        round_trip: |json| {
            let value: T =
                serde_json::from_value(json.clone()).map_err(|error| error.to_string())?;
            serde_json::to_value(value).map_err(|error| error.to_string())
        },
    }
}

pub(crate) fn samples() -> Vec<Sample> {
    [answers(), from_schemas()].into_iter().flatten().collect()
}

fn answers() -> Vec<Sample> {
    vec![
        sample(
            "VmCounters",
            &VmCounters::from([(
                "_disk0".to_owned(),
                BTreeMap::from([("read_ops".to_owned(), 1)]),
            )]),
        ),
        sample("BalloonStatsResponse", &balloon_stats_response()),
        sample("BalloonStats", &balloon_stats()),
        sample("ReclaimStats", &reclaim_stats()),
        sample("ZoneResidency", &zone_residency()),
        sample("ZoneReporting", &zone_reporting()),
        sample("ReclaimPath", &reclaim_path()),
        sample("LatencySummary", &latency()),
        sample("LatencyBucket", &LatencyBucket { le: 1, count: 2 }),
        sample("LastBatch", &last_batch()),
        sample("GuestSample", &guest_sample()),
        sample("GuestReporting", &guest_reporting()),
        sample("ReclaimThresholds", &reclaim_thresholds()),
        sample("AlertStatus", &alert_status()),
        sample("AlertDirection", &AlertDirection::Below),
        sample("ReportingPolicyStatus", &reporting_policy_status()),
        sample("SettingStatus", &setting_status()),
        sample("ReclaimThresholdsChange", &reclaim_thresholds_change()),
        sample("AlertChange", &alert_change()),
        sample("ReportingPolicyChange", &reporting_policy_change()),
    ]
}

/// The value with every field set of a type whose schema is generated, made from that schema.
fn filled<T: DeserializeOwned + JsonSchema>() -> T {
    let document = Document::load();
    let full = document.fill(document.schema(&T::schema_name()));
    serde_json::from_value(full).unwrap()
}

macro_rules! generated {
    ($($kind:ty),* $(,)?) => {
        vec![$(sample(<$kind>::schema_name(), &filled::<$kind>())),*]
    };
}

fn from_schemas() -> Vec<Sample> {
    generated![
        ErrorBody,
        VmmPingResponse,
        VmState,
        VmInfo,
        DeviceNode,
        VmResize,
        VmRemoveDevice,
        PciDeviceInfo,
        VmBalloonHinting,
        HintingAction,
        HintingStatus,
        VmBalloonReporting,
        ReportingAction,
        ReportingStatus,
        ReportNow,
        VmConfig,
        PayloadConfig,
        CpusConfig,
        CpuTopology,
        CpuAffinity,
        CpuFeatures,
        CoreScheduling,
        MemoryConfig,
        MemoryZoneConfig,
        HotplugMethod,
        DiskConfig,
        VirtQueueAffinity,
        ImageType,
        LockGranularity,
        NetConfig,
        VhostMode,
        RateLimiterConfig,
        TokenBucket,
        RngConfig,
        BalloonConfig,
        SerialConfig,
        ConsoleConfig,
        DebugConsoleConfig,
        ConsoleOutputMode,
        NumaConfig,
        NumaDistance,
        PlatformConfig,
    ]
}

fn balloon_stats() -> BalloonStats {
    let mut stats = BalloonStats::default();
    for &(_, tag) in BALLOON_STAT_TAGS {
        assert!(stats.set(tag, u64::from(tag)));
    }
    stats
}

fn balloon_stats_response() -> BalloonStatsResponse {
    BalloonStatsResponse {
        balloon_actual: 1,
        last_update: 2,
        age_ms: Some(3),
        stats: balloon_stats(),
    }
}

fn reclaim_stats() -> ReclaimStats {
    ReclaimStats {
        configured_bytes: 1,
        resident_bytes: 2,
        reclaimed_bytes: 3,
        repopulated_bytes: 9,
        repopulated_method: "discarded-minus-absent".to_owned(),
        swapped_bytes: Some(4),
        ballooned_bytes: 5,
        balloon_target_bytes: 6,
        backing: "anonymous-private".to_owned(),
        zones: vec![zone_residency()],
        residency_method: "pagemap".to_owned(),
        resident_sample_us: 7,
        resident_age_ms: 8,
        reporting: filled(),
        report: reclaim_path(),
        inflate: reclaim_path(),
        hint: reclaim_path(),
        hinting: filled(),
        guest: Some(guest_sample()),
    }
}

fn zone_residency() -> ZoneResidency {
    ZoneResidency {
        id: "z".to_owned(),
        backing: "memfd-shared".to_owned(),
        page_bytes: 1,
        configured_bytes: 2,
        resident_bytes: 3,
        reclaimed_bytes: 4,
        swapped_bytes: 5,
        reporting: zone_reporting(),
    }
}

fn zone_reporting() -> ZoneReporting {
    ZoneReporting {
        active: false,
        reason: Some("too large".to_owned()),
    }
}

fn reclaim_path() -> ReclaimPath {
    ReclaimPath {
        requested_bytes: 1,
        requested_ranges: 2,
        discarded_bytes: 3,
        discarded_bytes_per_second: 10,
        discarded_ranges: 4,
        skipped_bytes: BTreeMap::from([("hole".to_owned(), 5)]),
        failed_bytes: 6,
        failed_ranges: 7,
        batches: 8,
        discard_syscalls: 9,
        latency_us: latency(),
        last_batch: Some(last_batch()),
    }
}

fn latency() -> LatencySummary {
    LatencySummary {
        count: 1,
        p50: 2,
        p99: 3,
        max: 4,
        buckets: vec![LatencyBucket { le: 1, count: 2 }],
    }
}

fn last_batch() -> LastBatch {
    LastBatch {
        bytes: 1,
        ranges: 2,
        latency_us: 3,
        age_ms: 4,
    }
}

fn guest_sample() -> GuestSample {
    GuestSample {
        stats: balloon_stats(),
        reporting: Some(guest_reporting()),
        age_ms: 1,
    }
}

fn guest_reporting() -> GuestReporting {
    GuestReporting {
        pending_bytes: Some(1),
        reported_bytes: Some(2),
        batches: Some(3),
        isolation_failures: Some(4),
    }
}

fn reclaim_thresholds() -> ReclaimThresholds {
    ReclaimThresholds {
        alerts: vec![alert_status()],
        reporting_policy: reporting_policy_status(),
    }
}

fn alert_status() -> AlertStatus {
    AlertStatus {
        rule: AlertRule {
            name: "big".to_owned(),
            figure: "resident_bytes".to_owned(),
            direction: AlertDirection::Above,
            enter: 2,
            leave: 1,
            duration_ms: 3,
        },
        active: true,
        since_ms: 4,
        value: Some(5),
        times_entered: 6,
    }
}

fn reporting_policy_status() -> ReportingPolicyStatus {
    ReportingPolicyStatus {
        policy: ReportingPolicy {
            order_min: 1,
            pending_blocks: 2,
            delay_ms_max: 3,
            age_ms_min: 4,
            bytes_per_second_max: 5,
        },
        in_effect: false,
        reason: Some("not offered".to_owned()),
        settings: BTreeMap::from([("order_min".to_owned(), setting_status())]),
    }
}

fn setting_status() -> SettingStatus {
    SettingStatus {
        in_effect: false,
        reason: Some("not followed".to_owned()),
    }
}

fn reclaim_thresholds_change() -> ReclaimThresholdsChange {
    ReclaimThresholdsChange {
        remove_alerts: vec!["old".to_owned()],
        alerts: vec![alert_change()],
        reporting_policy: Some(reporting_policy_change()),
    }
}

fn alert_change() -> AlertChange {
    AlertChange {
        name: "big".to_owned(),
        figure: Some("resident_bytes".to_owned()),
        direction: Some(AlertDirection::Above),
        enter: Some(2),
        leave: Some(1),
        duration_ms: Some(3),
    }
}

fn reporting_policy_change() -> ReportingPolicyChange {
    ReportingPolicyChange {
        order_min: Some(1),
        pending_blocks: Some(2),
        delay_ms_max: Some(3),
        age_ms_min: Some(4),
        bytes_per_second_max: Some(5),
    }
}
