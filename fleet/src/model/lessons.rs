//! Lessons about a VM, which the agent keeps across restarts.

use serde::{Deserialize, Serialize};

use super::Bytes;

/// The effects of an agent's actions on a VM, as observed by the agent. Without it, the next agent would repeat the
/// same harm, and each agent could reverse a balloon as often as the limit allows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lessons {
    /// Times of changes of direction of the balloon in the last hour, ms on the planner's clock, newest last.
    pub turns_ms: Vec<u64>,
    /// The last direction of the balloon: true if it grew.
    pub grew: Option<bool>,
    /// When memory was last taken, ms; 0 if never.
    pub taken_at_ms: u64,
    /// Nothing is taken until then, ms.
    pub take_blocked_until_ms: u64,
    /// Number of times it suffered soon after memory was taken.
    pub reversals: u32,
    /// Memory it proved to need: it suffered with less.
    pub learned_min: Bytes,
    /// When that is forgotten, ms.
    pub learned_until_ms: u64,
    /// Whether its guest has ever reported statistics.
    #[serde(rename = "told")]
    pub guest_reported: bool,
}
