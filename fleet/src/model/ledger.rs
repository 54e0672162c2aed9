//! The memory accounts of a host: total, available, reserved and callable memory.
//!
//! The host's free memory does not show which of it guests can claim. The callable liability is memory that guests can
//! claim without notice: neither ballooned, resident nor swapped, plus memory that they can obtain by hot-plug. In 99 of
//! 100 cases, guests claim at most `burst` of it within the reaction time. The host keeps that much available. It
//! reserves for other VMs only the rest, less earlier reservations and grants that are not used yet.

use serde::{Deserialize, Serialize};

use super::{Bytes, Inventory};

/// The ledger at one moment. All figures are bytes on this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// Memory that may be handed out: the host's minus the reserve.
    pub usable: Bytes,
    /// Available memory above the reserve.
    pub available: Bytes,
    /// Never handed out.
    pub reserved: Bytes,
    /// Sizes of all VMs.
    pub configured: Bytes,
    /// Memory in balloons, as claimed by the guests.
    pub ballooned: Bytes,
    /// Host memory the VMs occupy.
    pub resident: Bytes,
    /// The VMs' memory that occupies no host memory: configured minus resident.
    pub reclaimed: Bytes,
    /// Memory that guests may take without a request.
    pub callable_liability: Bytes,
    /// Memory that they take within the reaction time in 99 of 100 cases.
    pub burst: Bytes,
    /// The burst before it is limited to the callable memory: the burst if guests had more callable memory.
    pub burst_measured: Bytes,
    /// Memory reserved for VMs that do not run yet.
    pub promised: Bytes,
    /// Memory given to guests that have not used it yet.
    pub granted: Bytes,
    /// Memory that can be reserved for another VM.
    pub firm_free: Bytes,
}

impl Ledger {
    /// Computes the ledger. `burst` is the measured quantile, `granted` the memory that guests received and have not
    /// used.
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
            ledger.callable_liability += vm.liability();
        }
        // The burst cannot exceed the callable memory.
        ledger.burst_measured = burst;
        ledger.burst = burst.min(ledger.callable_liability);
        ledger.firm_free = ledger.available - ledger.burst - ledger.promised - ledger.granted;
        ledger
    }

    /// Ratio of the available memory to the burst; infinite without callable memory.
    pub fn burst_coverage(&self) -> f64 {
        if self.burst == Bytes::ZERO {
            f64::INFINITY
        } else {
            self.available.0 as f64 / self.burst.0 as f64
        }
    }
}
