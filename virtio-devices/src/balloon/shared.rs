//! Data shared by the configuration half, the worker and the handle.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};

use device_facts::policy_space::VIRTIO_BALLOON_F_REPORTING_POLICY;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::accounting::Ledger;
use super::config::ConfigSpace;
use super::hinting::Hinting;
use super::reporting_policy::Control;
use super::spec::{
    VIRTIO_BALLOON_F_DEVICE_INIT_REPORTED, VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING,
};
use super::stats::StatsCell;
use crate::Unpoisoned;
use crate::config_interrupt::ConfigInterrupt;
use crate::device::GuestRam;
use crate::reclaim::{DiscardSwitch, Expected, smallest_reclaimable_page_bytes};

/// Maximum size of blocks that a guest reports or hints (4 MiB, the largest block of the x86-64 buddy allocator). On
/// larger backing pages such blocks free nothing.
pub const FREE_BLOCK_BYTES_MAX: u64 = 4 << 20;

/// Whether any region consists of pages small enough for a free block of the guest to cover.
pub(super) fn blocks_can_free(mem: &GuestMemoryMmap<()>, expected: Expected) -> bool {
    smallest_reclaimable_page_bytes(mem, expected)
        .is_some_and(|bytes| bytes <= FREE_BLOCK_BYTES_MAX)
}

pub(super) struct Shared {
    pub(super) ram: GuestRam,
    /// Feature bits on offer.
    pub(super) offered: u64,
    /// The operator has configured free page reporting.
    pub(super) reporting_configured: bool,
    /// Blocks can be discarded even if the guest expects zeros afterwards.
    pub(super) blocks_can_be_zeros: bool,
    pub(super) config: ConfigSpace,
    pub(super) ledger: Ledger,
    pub(super) stats: StatsCell,
    /// Interval between samples of statistics; 0: only on demand.
    pub(super) stats_poll_ms: AtomicU64,
    pub(super) hinting: Hinting,
    pub(super) control: Control,
    pub(super) switch: Arc<DiscardSwitch>,
    /// Passed by each batch of reports; `control` closes it.
    pub(super) report_gate: Arc<DiscardSwitch>,
    /// Wakes the worker to request statistics or to change the interval.
    pub(super) refill: EventFd,
    driver: Mutex<Option<ActiveDriver>>,
    pub(super) interrupt: ConfigInterrupt,
}

/// The current driver.
#[derive(Clone, Copy, Debug)]
pub(super) struct ActiveDriver {
    pub(super) features: u64,
    pub(super) has_reporting_queue: bool,
    pub(super) has_hint_queue: bool,
}

impl Shared {
    pub(super) fn new(
        ram: GuestRam,
        offered: u64,
        reporting_configured: bool,
        refill: EventFd,
    ) -> Self {
        let report_gate = Arc::default();
        let blocks_can_be_zeros = blocks_can_free(&ram.memory(), Expected::Zeros);
        Self {
            ram,
            offered,
            reporting_configured,
            blocks_can_be_zeros,
            config: ConfigSpace::default(),
            ledger: Ledger::default(),
            stats: StatsCell::default(),
            stats_poll_ms: AtomicU64::new(0),
            hinting: Hinting::default(),
            control: Control::new(
                offered & VIRTIO_BALLOON_F_REPORTING_POLICY != 0,
                Arc::clone(&report_gate),
            ),
            report_gate,
            switch: Arc::default(),
            refill,
            driver: Mutex::new(None),
            interrupt: ConfigInterrupt::default(),
        }
    }

    pub(super) fn ram_bytes(&self) -> u64 {
        self.ram.memory().iter().map(GuestMemoryRegion::len).sum()
    }

    /// The balloon's size as the guest reports it, limited to the guest's RAM.
    pub(super) fn actual_bytes(&self) -> u64 {
        self.config.actual_bytes().min(self.ram_bytes())
    }

    pub(super) fn driver(&self) -> Option<ActiveDriver> {
        *lock(&self.driver)
    }

    pub(super) fn set_driver(&self, driver: Option<ActiveDriver>) {
        *lock(&self.driver) = driver;
    }

    /// The value with which the guest fills free pages, if it differs from a discarded page (all zeros).
    pub(super) fn poison(&self, features: u64) -> Option<u32> {
        let told = features & VIRTIO_BALLOON_F_PAGE_POISON != 0;
        Some(self.config.poison_val()).filter(|value| told && *value != 0)
    }

    pub(super) fn offers(&self, feature: u64) -> bool {
        self.offered & feature != 0
    }
}

crate::debug_fields!(Shared(it) {
    offered: format_args!("{:#x}", it.offered),
    config: it.config,
    driver: it.driver()
});

/// Whether a driver with these features supports a reporting policy: the bit has no meaning without reporting.
pub(super) const fn takes_policy(features: u64) -> bool {
    const BOTH: u64 = VIRTIO_BALLOON_F_REPORTING_POLICY | VIRTIO_BALLOON_F_REPORTING;
    features & BOTH == BOTH
}

/// Whether a driver with these features gets the initialized lengths of its reports.
pub(super) const fn takes_lengths(features: u64) -> bool {
    const BOTH: u64 = VIRTIO_BALLOON_F_DEVICE_INIT_REPORTED | VIRTIO_BALLOON_F_REPORTING;
    features & BOTH == BOTH
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Only single stores run under the lock, so no holder can panic.
    mutex.lock().unpoisoned()
}
