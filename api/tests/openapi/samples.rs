//! One value of every wire type, with every field set, generated from the schemas of the OpenAPI file.

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
    pub(crate) schema: String,
    /// The value with every field set.
    pub(crate) full: Value,
    /// Decodes into the type and encodes again.
    pub(crate) round_trip: fn(&Value) -> Result<Value, String>,
}

fn sample<T: Serialize + DeserializeOwned>(document: &Document, schema: &str) -> Sample {
    let round_trip = |json: &Value| {
        let value: T = serde_json::from_value(json.clone()).map_err(|error| error.to_string())?;
        serde_json::to_value(value).map_err(|error| error.to_string())
    };
    Sample {
        schema: schema.to_owned(),
        full: round_trip(&document.fill(document.schema(schema))).unwrap(),
        round_trip,
    }
}

macro_rules! samples {
    ($($kind:ty),* $(,)?) => {
        pub(crate) fn samples() -> Vec<Sample> {
            let document = Document::load();
            vec![
                sample::<VmCounters>(&document, "VmCounters"),
                $(sample::<$kind>(&document, &<$kind>::schema_name())),*
            ]
        }
    };
}

samples![
    ErrorBody,
    VmmPingResponse,
    VmState,
    VmInfo,
    DeviceNode,
    SnapshotProgress,
    MigrationProgress,
    VmResize,
    VmResizeZone,
    VmResizeDisk,
    VmUpdateRateLimiter,
    VmRemoveDevice,
    VmSnapshotConfig,
    VmSnapshotMergeConfig,
    VmCoredumpData,
    RestoreConfig,
    MemoryRestoreMode,
    MemoryUnavailableAction,
    RestoredNetConfig,
    ZoneUpdate,
    VmSendMigrationData,
    VmReceiveMigrationData,
    MigrationTimeoutStrategy,
    MigrationMemoryMode,
    PciDeviceInfo,
    VmBalloonHinting,
    HintingAction,
    HintingStatus,
    VmBalloonReporting,
    ReportingAction,
    ReportingStatus,
    ReportNow,
    BalloonStatsResponse,
    BalloonStats,
    ReclaimStats,
    ZoneResidency,
    ZoneReporting,
    ReclaimPath,
    LatencySummary,
    LatencyBucket,
    LastBatch,
    GuestSample,
    GuestReporting,
    ReclaimThresholds,
    AlertStatus,
    AlertDirection,
    ReportingPolicyStatus,
    SettingStatus,
    ReclaimThresholdsChange,
    AlertChange,
    ReportingPolicyChange,
    VmConfig,
    LandlockConfig,
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
    RateLimitGroupConfig,
    TokenBucket,
    RngConfig,
    RtcConfig,
    BalloonConfig,
    FsConfig,
    GenericVhostUserConfig,
    DeviceConfig,
    PmemConfig,
    VsockConfig,
    SerialConfig,
    ConsoleConfig,
    DebugConsoleConfig,
    ConsoleOutputMode,
    NumaConfig,
    NumaDistance,
    PciSegmentConfig,
    PlatformConfig,
];
