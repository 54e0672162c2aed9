//! Data shared by the configuration half, the worker and the handle.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::access::BlockAccess;
use super::region::MemRegion;
use crate::config_interrupt::ConfigInterrupt;
use crate::counters::counters;
use crate::device::Counters;

counters! {
    /// Counters since the creation of the device; resets do not clear them.
    Tally {
        plug_requests,
        unplug_requests,
        unplug_all_requests,
        state_requests,
        /// Requests to plug more than the requested size.
        requests_nacked,
        /// Requests to unplug blocks that the host could not close or discard, or to plug blocks that it could not open.
        requests_busy,
        /// Requests that name blocks outside the region, or blocks in the wrong state.
        requests_wrong,
        /// Requests of an undefined type.
        requests_unknown,
        /// Chains that are not requests, or have no space for the response.
        requests_malformed,
        config_writes_ignored,
        /// Bytes of blocks to unplug: requested, discarded, failed, and not tried.
        unplug_requested_bytes,
        unplug_discarded_bytes,
        unplug_failed_bytes,
        unplug_skipped_bytes,
        unplug_syscalls,
    }
}

pub(super) struct Shared {
    pub(super) region: MemRegion,
    pub(super) access: Arc<dyn BlockAccess>,
    pub(super) tally: Tally,
    requested_bytes: AtomicU64,
    plugged_bytes: AtomicU64,
    pub(super) interrupt: ConfigInterrupt,
}

impl Shared {
    pub(super) fn new(region: MemRegion, access: Arc<dyn BlockAccess>) -> Self {
        Self {
            region,
            access,
            tally: Tally::default(),
            requested_bytes: AtomicU64::new(0),
            plugged_bytes: AtomicU64::new(0),
            interrupt: ConfigInterrupt::default(),
        }
    }

    pub(super) fn requested_bytes(&self) -> u64 {
        self.requested_bytes.load(Ordering::Acquire)
    }

    pub(super) fn set_requested_bytes(&self, bytes: u64) {
        self.requested_bytes.store(bytes, Ordering::Release);
    }

    pub(super) fn plugged_bytes(&self) -> u64 {
        self.plugged_bytes.load(Ordering::Acquire)
    }

    /// Only for the worker.
    pub(super) fn set_plugged_bytes(&self, bytes: u64) {
        self.plugged_bytes.store(bytes, Ordering::Release);
    }

    pub(super) fn counters(&self) -> Counters {
        let mut counters = self.tally.read();
        counters.insert("region_bytes", self.region.bytes());
        counters.insert("requested_bytes", self.requested_bytes());
        counters.insert("plugged_bytes", self.plugged_bytes());
        counters.insert("unplugged_accesses", self.access.refused_accesses());
        counters
    }
}

crate::debug_fields!(Shared(it) {
    region: it.region,
    requested_bytes: it.requested_bytes(),
    plugged_bytes: it.plugged_bytes()
});
