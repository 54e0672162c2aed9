//! `GET /vm.balloon-stats`: the guest's statistics of its own memory.

use device_facts::BalloonStats;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The guest's statistics of its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({
    "balloon_actual": 0, "last_update": 1_700_000_000_000_u64, "age_ms": 120, "stats": {"free_memory": 400_000_000}
})))]
pub struct BalloonStatsResponse {
    /// Bytes in the balloon, as stated by the guest.
    pub balloon_actual: u64,
    /// Time at which the guest last sent statistics: milliseconds since the Unix epoch on the host's clock; 0 before
    /// the first.
    #[serde(default)]
    pub last_update: u64,
    /// Milliseconds since the guest last sent statistics, on a clock that cannot be set; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// The statistics of that sample.
    #[serde(default)]
    pub stats: BalloonStats,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn balloon_stats_response_without_a_sample_has_no_age() {
        let json = serde_json::to_string(&BalloonStatsResponse::default()).unwrap();
        assert_eq!(json, r#"{"balloon_actual":0,"last_update":0,"stats":{}}"#);
    }
}
