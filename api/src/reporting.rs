//! `PUT /vm.balloon-reporting`: pauses and resumes free page reporting, and requests a full report.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// A command to free page reporting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"action": "pause"})))]
pub struct VmBalloonReporting {
    /// The action.
    pub action: ReportingAction,
    /// With `report-now`: include memory that the guest has reported before, for example after a restore that made it
    /// resident.
    #[serde(default)]
    pub again: bool,
}

/// Action on free page reporting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReportingAction {
    /// Pause reporting. The VMM responds once it no longer discards reported memory: after the guest has confirmed that
    /// it reports nothing, or without the guest if it cannot confirm, or does not within five seconds.
    Pause,
    /// Resume reporting. The VMM responds immediately.
    Resume,
    /// Request an immediate report of all free memory. The VMM responds before the guest has reported, and rejects the
    /// request if the guest does not support it.
    ReportNow,
}

/// State of free page reporting.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({
    "active": false,
    "reason": "inactive: paused by the operator, and the guest has stopped",
    "state": "paused",
    "paused_by": "guest",
    "report_now": {"id": 0, "pending": false, "done_id": 0},
})))]
pub struct ReportingStatus {
    /// True if reported memory is discarded.
    pub active: bool,
    /// Reason why reporting is inactive; absent if it is active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// State that the operator requested: `running`, `pausing` (not confirmed; reports in progress are still discarded)
    /// or `paused`. Empty without a balloon.
    #[serde(default)]
    pub state: String,
    /// Side that enforces the pause: `guest`, which has confirmed that it reports nothing, or `device`, which ignores
    /// reports. Absent unless paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_by: Option<String>,
    /// The latest request for a report of everything.
    #[serde(default)]
    pub report_now: ReportNow,
}

/// A request for a report of all free memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct ReportNow {
    /// Number of the latest request; 0 before the first.
    pub id: u32,
    /// True if the guest has not completed the latest request.
    pub pending: bool,
    /// Number of the last request that the guest has completed; 0 if it has completed none since its driver started.
    pub done_id: u32,
}
