//! The operator's limits for one VM.

use serde::{Deserialize, Serialize};

use super::Bytes;

/// Priority of a VM. Memory is taken from the lowest class first, and the last resorts follow the same order.
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
    strum::VariantArray,
)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum PriorityClass {
    /// May be paused, and even killed, if the settings allow it.
    Batch,
    /// Memory is taken from it before others.
    Low,
    /// The default.
    #[default]
    Normal,
    /// Memory is taken from it after all others.
    High,
    /// Memory is never taken from it: for control planes, which must keep working.
    Critical,
}

/// Limits and weight of one VM, in bytes of its own configured size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmPolicy {
    /// The VM's guaranteed memory.
    pub min: Bytes,
    /// The VM's maximum memory.
    pub max: Bytes,
    /// Its weight when memory is distributed: twice the shares, twice the memory. 0: it is not managed.
    pub shares: u32,
    /// Its priority class.
    pub class: PriorityClass,
    /// Whether its balloon may be moved.
    pub balloon: bool,
    /// Whether its reporting policy may be changed.
    pub reporting: bool,
    /// Whether a limit on its control group may enforce the balloon that it claims.
    pub enforce: bool,
}

impl VmPolicy {
    /// A VM of `configured` bytes with half of them guaranteed.
    pub fn halves(configured: Bytes) -> Self {
        Self {
            min: Bytes(configured.0 / 2),
            max: configured,
            shares: 1000,
            class: PriorityClass::Normal,
            balloon: true,
            reporting: true,
            enforce: false,
        }
    }

    /// The largest balloon that leaves the VM its minimum.
    pub fn balloon_max(&self, configured: Bytes) -> Bytes {
        configured - self.min
    }

    /// The smallest balloon that keeps the VM to its maximum.
    pub fn balloon_min(&self, configured: Bytes) -> Bytes {
        (configured - self.max).min(self.balloon_max(configured))
    }

    /// Whether the manager may change its balloon.
    pub fn managed(&self) -> bool {
        self.balloon && self.shares > 0
    }
}
