//! Four named states of memory pressure on a host.

use serde::{Deserialize, Serialize};

/// The states, in ascending order of memory shortage. The configuration defines when each begins and ends.
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
    /// Enough memory: nothing is taken, and taken memory is returned as far as possible.
    #[default]
    Green,
    /// Memory is getting scarce: guests report eagerly, and free memory is collected.
    Yellow,
    /// Memory is scarce: guests' caches are taken as well, and no VM is admitted.
    Orange,
    /// The host is about to run out of memory: steps are large, and the allowed last resorts are used.
    Red,
}

impl HostState {
    /// The name in configuration, responses and metrics.
    pub fn name(self) -> &'static str {
        self.into()
    }
}
