//! `[policy.NAME]`: limits and weight of VMs.

use serde::{Deserialize, Serialize};

use crate::model::{Amount, Bytes, Fraction, PriorityClass, VmPolicy};

/// What a VM is granted. Parts are parts of its configured size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyConfig {
    /// Memory it is never driven below.
    pub min: Amount,
    /// And never below this either, however small `min` comes out.
    pub floor: Bytes,
    /// Memory it never gets more of.
    pub max: Amount,
    /// Its weight.
    pub shares: u32,
    /// How much it matters.
    pub class: PriorityClass,
    /// Whether its balloon may be moved.
    pub balloon: bool,
    /// Whether its reporting policy may be changed.
    pub reporting: bool,
    /// Whether its control group may be limited to what it said it gave up (`memory.max`), so that a guest that lies
    /// harms itself alone.
    pub enforce: bool,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            min: Amount::Part(Fraction(0.5)),
            floor: Bytes::mib(512),
            max: Amount::Part(Fraction(1.0)),
            shares: 1000,
            class: PriorityClass::Normal,
            balloon: true,
            reporting: true,
            enforce: false,
        }
    }
}

impl PolicyConfig {
    /// Whether it grants less than it guarantees, as far as that shows without the size of a VM.
    pub(super) fn contradicts_itself(&self) -> bool {
        match (self.min, self.max) {
            (_, Amount::Bytes(max)) if self.floor > max => true,
            (Amount::Bytes(min), Amount::Bytes(max)) => min > max,
            (Amount::Part(min), Amount::Part(max)) => min > max,
            _ => false,
        }
    }

    /// The limits of a VM of `configured` bytes.
    pub fn resolve(&self, configured: Bytes) -> VmPolicy {
        let max = self.max.of(configured).min(configured);
        VmPolicy {
            min: self.min.of(configured).max(self.floor).min(max),
            max,
            shares: self.shares,
            class: self.class,
            balloon: self.balloon,
            reporting: self.reporting,
            enforce: self.enforce,
        }
    }
}
