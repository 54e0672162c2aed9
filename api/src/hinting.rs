//! `PUT /vm.balloon-hinting`: one run of free page hinting.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::ReclaimPath;

/// A command to free page hinting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"action": "start"})))]
pub struct VmBalloonHinting {
    /// What to do.
    pub action: HintingAction,
}

/// What to do about free page hinting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HintingAction {
    /// Ask the guest to hint at all the memory it has free. Answered at once; the guest follows in its own time.
    Start,
    /// End the run. Only the batch under way is still discarded.
    Stop,
}

/// Where free page hinting stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct HintingStatus {
    /// `idle`, `requested` (the guest has not begun), `running`, or `stopping` (stopped, and the guest has not
    /// confirmed it).
    pub state: String,
    /// Number of the latest run as the guest knows it; 0 before the first.
    pub command_id: u32,
    /// Runs asked for since the VM booted.
    pub runs_requested: u64,
    /// Runs in which the guest has hinted at all it had.
    pub runs_completed: u64,
}

/// The part of `GET /vm.reclaim-stats` that is about hinting.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct HintingReport {
    /// Where it stands.
    pub hinting: HintingStatus,
    /// What it gave back.
    pub hint: ReclaimPath,
}
