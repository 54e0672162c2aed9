//! The operator's limits for one VM.

use serde::{Deserialize, Serialize};

use super::Bytes;

/// How much a VM matters. Memory is taken from the lowest class first, and the last resorts go by it.
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
pub enum PriorityClass {
    /// May be stopped, and even killed, when that has been allowed.
    Batch,
    /// Gives before others.
    Low,
    /// What a VM is when nothing was said.
    #[default]
    Normal,
    /// Gives after all others.
    High,
    /// Never gives anything: control planes, without which nobody could act.
    Critical,
}

/// Limits and weight of one VM, in bytes of its own configured size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmPolicy {
    /// Memory the VM is never driven below.
    pub min: Bytes,
    /// Memory the VM never gets more of.
    pub max: Bytes,
    /// Its weight when memory is shared out: twice the shares, twice the part. 0: it is left alone.
    pub shares: u32,
    /// How much it matters.
    pub class: PriorityClass,
    /// Whether its balloon may be moved.
    pub balloon: bool,
    /// Whether its reporting policy may be changed.
    pub reporting: bool,
    /// Whether a limit on its control group may hold it to what it gave up.
    pub enforce: bool,
}

impl VmPolicy {
    /// A VM of `configured` bytes that may be driven to half of them.
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

    /// Whether its balloon is the manager's to move at all.
    pub fn managed(&self) -> bool {
        self.balloon && self.shares > 0
    }
}
