//! `PUT /vm.balloon-hinting`: one run of free page hinting.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// A command to free page hinting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"action": "start"})))]
pub struct VmBalloonHinting {
    /// The action.
    pub action: HintingAction,
}

/// Action on free page hinting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HintingAction {
    /// Ask the guest for hints about all its free memory. The request does not wait for the guest.
    Start,
    /// End the run. Only the batch in progress is still discarded.
    Stop,
}

/// State of free page hinting.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct HintingStatus {
    /// `idle`, `requested` (the guest has not started), `running`, or `stopping` (the guest has not confirmed the end).
    pub state: String,
    /// Number of the latest run as the guest knows it; 0 before the first.
    pub command_id: u32,
    /// Runs requested since the VM booted.
    pub runs_requested: u64,
    /// Runs in which the guest gave hints about all its free memory.
    pub runs_completed: u64,
}
