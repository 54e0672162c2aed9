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
use serde_json::{Value, json};

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
    [answers(), config()].into_iter().flatten().collect()
}

fn answers() -> Vec<Sample> {
    vec![
        sample(
            "ErrorBody",
            &ErrorBody(vec!["outer".to_owned(), "inner".to_owned()]),
        ),
        sample("VmmPingResponse", &ping()),
        sample("VmState", &VmState::Running),
        sample("VmInfo", &info()),
        sample("DeviceNode", &device_node()),
        sample(
            "VmCounters",
            &VmCounters::from([(
                "_disk0".to_owned(),
                BTreeMap::from([("read_ops".to_owned(), 1)]),
            )]),
        ),
        sample(
            "VmResize",
            &VmResize {
                desired_vcpus: Some(1),
                desired_ram: Some(2),
                desired_balloon: Some(3),
            },
        ),
        sample(
            "VmRemoveDevice",
            &VmRemoveDevice {
                id: "_disk0".to_owned(),
            },
        ),
        sample(
            "PciDeviceInfo",
            &PciDeviceInfo {
                id: "_disk0".to_owned(),
                bdf: "0000:00:05.0".to_owned(),
            },
        ),
        sample("BalloonStatsResponse", &balloon_stats_response()),
        sample("BalloonStats", &balloon_stats()),
        sample("ReclaimStats", &reclaim_stats()),
        sample(
            "VmBalloonHinting",
            &VmBalloonHinting {
                action: HintingAction::Start,
            },
        ),
        sample(
            "VmBalloonReporting",
            &VmBalloonReporting {
                action: ReportingAction::ReportNow,
                again: true,
            },
        ),
        sample("ReportingAction", &ReportingAction::Pause),
        sample("ReportNow", &report_now()),
        sample("HintingAction", &HintingAction::Stop),
        sample("HintingStatus", &hinting_status()),
        sample("ZoneResidency", &zone_residency()),
        sample("ZoneReporting", &zone_reporting()),
        sample("ReportingStatus", &reporting_status()),
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

fn config() -> Vec<Sample> {
    generated![
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

fn ping() -> VmmPingResponse {
    VmmPingResponse {
        build_version: "b".to_owned(),
        version: "v".to_owned(),
        pid: 1,
        features: vec!["kvm".to_owned()],
    }
}

fn info() -> VmInfo {
    VmInfo {
        config: filled(),
        state: VmState::Running,
        memory_actual_size: 1,
        device_tree: Some(BTreeMap::from([("_disk0".to_owned(), device_node())])),
    }
}

fn device_node() -> DeviceNode {
    DeviceNode {
        id: "_disk0".to_owned(),
        resources: vec![json!({"PciBar": {"index": 0}})],
        parent: Some("p".to_owned()),
        children: vec!["c".to_owned()],
        pci_bdf: Some("0000:00:05.0".to_owned()),
    }
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
        reporting: reporting_status(),
        report: reclaim_path(),
        inflate: reclaim_path(),
        hint: reclaim_path(),
        hinting: hinting_status(),
        guest: Some(guest_sample()),
    }
}

fn hinting_status() -> HintingStatus {
    HintingStatus {
        state: "running".to_owned(),
        command_id: 2,
        runs_requested: 3,
        runs_completed: 4,
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

fn reporting_status() -> ReportingStatus {
    ReportingStatus {
        active: false,
        reason: Some("not negotiated".to_owned()),
        state: "paused".to_owned(),
        paused_by: Some("guest".to_owned()),
        report_now: report_now(),
    }
}

fn report_now() -> ReportNow {
    ReportNow {
        id: 2,
        pending: true,
        done_id: 1,
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
