//! What the agent learned about a VM and keeps across restarts.

use serde::{Deserialize, Serialize};

use super::Bytes;

/// What an agent learned by what it did to a VM. The next agent would otherwise do the same harm again, and turn a balloon
/// as often as every agent before it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lessons {
    /// When the balloon was moved the other way in the last hour, ms on the planner's clock, newest last.
    pub turns_ms: Vec<u64>,
    /// Which way the balloon was last moved: whether it grew.
    pub grew: Option<bool>,
    /// When something was last taken, ms; 0 when never.
    pub taken_at_ms: u64,
    /// Nothing is taken until then, ms.
    pub take_blocked_until_ms: u64,
    /// How often it suffered soon after something was taken.
    pub reversals: u32,
    /// Memory it proved to need: it suffered with less.
    pub learned_min: Bytes,
    /// When that is forgotten, ms.
    pub learned_until_ms: u64,
    /// Whether its guest has ever reported statistics.
    #[serde(rename = "told")]
    pub guest_reported: bool,
}
