//! The memory accounts of a host: total, used, reserved, and callable memory.
//!
//! Three kinds of memory look alike in the host's free memory and are kept apart here. What a balloon holds is firm as
//! long as the guest is honest. What a guest never touched, or reported and had discarded, is a loan that it calls in at
//! memory speed and without notice: the callable liability. Of the callable liability only a measured quantile is
//! called in at once, and only what is left above that quantile is promised to anybody else.

use serde::{Deserialize, Serialize};

use super::{Bytes, Inventory};

/// The books at one moment. All figures in bytes of this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// Memory that may be handed out: the host's less the reserve.
    pub usable: Bytes,
    /// Available memory above the reserve.
    pub available: Bytes,
    /// Never handed out.
    pub reserved: Bytes,
    /// Sizes of all VMs.
    pub configured: Bytes,
    /// In balloons, as the guests claim.
    pub ballooned: Bytes,
    /// Host memory the VMs occupy.
    pub resident: Bytes,
    /// The VMs' memory that occupies no host memory: configured less resident.
    pub reclaimed: Bytes,
    /// What the guests may take back without asking.
    pub callable_liability: Bytes,
    /// What they will call in within the reaction time, but for one case in a hundred.
    pub burst: Bytes,
    /// The same before it is bounded by what there is to be called in: what it would be if guests had more.
    pub burst_measured: Bytes,
    /// Promised to VMs that are not there yet.
    pub promised: Bytes,
    /// Given back to guests that have not used it yet.
    pub granted: Bytes,
    /// What can be promised to a further VM.
    pub firm_free: Bytes,
}

impl Ledger {
    /// Makes the books. `burst` is the measured quantile, `granted` what guests were given and have not used.
    pub fn of(inventory: &Inventory, reserve: Bytes, burst: Bytes, granted: Bytes) -> Self {
        let mut ledger = Self {
            usable: inventory.host.usable(reserve),
            available: inventory.host.available() - reserve,
            reserved: reserve,
            promised: inventory.promised,
            granted,
            ..Self::default()
        };
        for vm in &inventory.vms {
            let sample = vm.sample.unwrap_or_default();
            ledger.configured += vm.configured;
            ledger.ballooned += sample.ballooned.min(vm.configured);
            ledger.resident += sample.resident;
            ledger.reclaimed += vm.configured - sample.resident;
            ledger.callable_liability += vm.callable();
        }
        // Nobody can call in more than is there to be called in.
        ledger.burst_measured = burst;
        ledger.burst = burst.min(ledger.callable_liability);
        ledger.firm_free = ledger.available - ledger.burst - ledger.promised - ledger.granted;
        ledger
    }

    /// How often the available memory covers the burst; infinite without liability.
    pub fn burst_coverage(&self) -> f64 {
        if self.burst == Bytes::ZERO {
            f64::INFINITY
        } else {
            self.available.0 as f64 / self.burst.0 as f64
        }
    }
}
