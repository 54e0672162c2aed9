//! The API contract: types, option syntax, endpoints and a client, which the VMM and its clients share.
//!
//! This crate holds the wire types of the REST API (serde and schema), and the syntax of the command line options that
//! produce them. It also has the table of endpoints, and a small synchronous client. The VMM, `ch-remote` and the fleet
//! manager use the same types, so each field is defined once. The devices need some of these facts too; they are in
//! `device-facts`. The crate starts no thread.
//!
//! Conventions of the wire format, which are Cloud Hypervisor's:
//! - sizes are bytes as `u64`, durations carry their unit in the name;
//! - upstream's endpoints ignore unknown fields in requests, and ours reject them by name ([`Origin`]);
//! - an unset optional field is omitted on output;
//! - new fields may appear, an existing field never changes its meaning.

mod ascii_json;
mod balloon_stats;
mod bounded;
pub mod client;
pub mod config;
mod coredump;
mod endpoints;
mod error;
mod event;
mod hinting;
mod hotplug;
mod info;
pub mod options;
mod rate_limit;
mod reclaim;
mod reporting;
mod resize;
mod similar;
mod snapshot;
mod thresholds;

pub use ascii_json::to_ascii_json;
pub use balloon_stats::BalloonStatsResponse;
pub use byte_size::{exact_bytes, format_bytes, scale_bytes};
pub use client::{Client, ClientError, Peer, SocketInode};
pub use config::{RestoreConfig, VmConfig, VmReceiveMigrationData, VmSendMigrationData};
pub use coredump::*;
pub use device_facts::{
    BalloonStats, GuestReporting, PolicyError, ReportingPolicy, ReportingPolicyChange,
};
pub use endpoints::{API_PREFIX, Endpoint, Method, Origin};
pub use error::{ErrorBody, chain_report, error_chain, error_line};
pub use event::{Event, EventTimestamp};
pub use hinting::*;
pub use hotplug::*;
pub use info::{
    DeviceNode, MigrationProgress, PciDeviceInfo, SnapshotProgress, VmCounters, VmInfo, VmState,
    VmmPingResponse, WAITER_NAME,
};
pub use rate_limit::VmUpdateRateLimiter;
pub use reclaim::{
    GuestSample, HintingReport, LastBatch, LatencyBucket, LatencySummary, ReclaimPath,
    ReclaimStats, ZoneReporting, ZoneResidency,
};
pub use reporting::*;
pub use resize::*;
pub use schemars::JsonSchema;
pub use similar::{suggestion, suggestion_among, suggestion_for};
pub use snapshot::*;
pub use thresholds::{
    AlertChange, AlertDirection, AlertRule, AlertStatus, ReclaimThresholds,
    ReclaimThresholdsChange, ReportingPolicyStatus, SettingStatus,
};

/// Runs the examples of the front page.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The OpenAPI description of the API.
pub const OPENAPI_YAML: &str = include_str!("../openapi/cloud-hypervisor.yaml");
