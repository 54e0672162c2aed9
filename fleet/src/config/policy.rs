//! `[policy.NAME]`: limits and weight of VMs.

use serde::{Deserialize, Serialize};

use super::Millis;
use crate::model::{Amount, Bytes, Fraction, PriorityClass, VmPolicy};

/// Limits and weight of a VM. Fractions refer to its configured size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PolicyConfig {
    /// Guaranteed memory.
    pub min: Amount,
    /// Lower bound of `min`.
    pub floor: Bytes,
    /// Maximum memory.
    pub max: Amount,
    /// Weight when memory is distributed; with 0 the VM is not managed.
    pub shares: u32,
    /// Priority class.
    pub class: PriorityClass,
    /// Whether the balloon may be moved.
    pub balloon: bool,
    /// Whether the reporting policy may be changed.
    pub reporting: bool,
    /// Whether the control group may be limited (`memory.max`). The limit follows the balloon that the guest reports, so
    /// that a lying guest harms only itself.
    pub enforce: bool,
    /// Idle time after which the VM is put in standby; 0: never.
    pub idle_standby: Millis,
    /// Maximum part of a processor that the VMM of an idle VM uses.
    pub idle_cpu: Fraction,
    /// Maximum rate at which the disks and networks of an idle VM transfer data.
    pub idle_io: Bytes,
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
            idle_standby: Millis(0),
            idle_cpu: Fraction(0.02),
            idle_io: Bytes(4 << 10),
        }
    }
}

impl PolicyConfig {
    /// Whether an idle VM is put in standby.
    pub(crate) fn watches_idle(&self) -> bool {
        self.idle_standby > Millis(0)
    }

    /// Whether its maximum is below its minimum, as far as this is known without the size of a VM.
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
