//! Four named states of memory pressure on a host.

use serde::{Deserialize, Serialize};

/// The states, from ease to emergency. Which values enter and leave them is in the configuration.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    strum::Display,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum HostState {
    /// Enough memory: nothing is taken, what was taken is given back as far as it goes.
    #[default]
    Green,
    /// Memory is getting scarce: guests report eagerly, and free memory is collected.
    Yellow,
    /// Memory is scarce: guests' caches are taken as well, nothing new is admitted.
    Orange,
    /// The host is about to run out: steps are large, and the last resorts that were allowed are used.
    Red,
}

impl HostState {
    /// The name in configuration, answers and metrics.
    pub fn name(self) -> &'static str {
        self.into()
    }
}
