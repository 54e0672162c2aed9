//! The configuration half of the balloon.

use std::io;
use std::sync::Arc;

use ::state::{Saved, StateError};
use device_facts::policy_space::VIRTIO_BALLOON_F_REPORTING_POLICY;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::ConfigWrite;
use super::handle::BalloonHandle;
use super::numbering::{self, QUEUE_SIZES};
use super::reporting_policy::FieldWrite;
use super::shared::{Shared, blocks_can_free, takes_policy};
use super::spec::{
    VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_DEVICE_INIT_REPORTED,
    VIRTIO_BALLOON_F_FREE_PAGE_HINT, VIRTIO_BALLOON_F_MUST_TELL_HOST, VIRTIO_BALLOON_F_PAGE_POISON,
    VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_F_VERSION_1, VIRTIO_ID_BALLOON,
};
use super::stats_timer::StatsTimer;
use super::worker::BalloonWorker;
use crate::device::{Counters, GuestRam, Interrupt, QueueHandler, VirtioDevice, boxed};
use crate::reclaim::{DiscardEngine, Expected};

/// Parameters of a balloon.
#[derive(Debug)]
pub struct BalloonParams {
    /// The guest's memory.
    pub ram: GuestRam,
    /// Initial target in bytes.
    pub size_bytes: u64,
    /// Lets the guest take pages back before it runs out of memory.
    pub deflate_on_oom: bool,
    /// Lets the guest report its free pages.
    pub free_page_reporting: bool,
    /// Lets the host request hints, see [`BalloonHandle::start_hinting`]. In guests that number queues without gaps,
    /// this changes the number of the reporting queue.
    pub free_page_hinting: bool,
    /// Offers the reporting policy to the guest, see [`super::reporting_policy`]. Has no effect without reporting.
    pub reporting_policy: bool,
    /// Tells the guest which reported memory reads as zeros. Has no effect without reporting.
    pub device_init: bool,
}

#[cfg(any(test, feature = "test-utils"))]
impl BalloonParams {
    /// A balloon that offers everything and starts empty.
    pub fn with_everything(ram: GuestRam) -> Self {
        Self {
            ram,
            size_bytes: 0,
            deflate_on_oom: true,
            free_page_reporting: true,
            free_page_hinting: true,
            reporting_policy: true,
            device_init: true,
        }
    }
}

/// A virtio balloon, as its transport sees it.
#[derive(Debug)]
pub struct Balloon {
    shared: Arc<Shared>,
    /// Present until the transport takes it.
    worker: Option<BalloonWorker>,
}

impl Balloon {
    /// Creates a balloon, and the handle by which the VMM controls and reads it.
    ///
    /// Must be called before a seccomp filter is active, or with `pidfd_open`, `process_madvise`, `mmap` and `munmap`
    /// allowed, because it probes the kernel's features.
    ///
    /// # Errors
    /// No event descriptor or timer is available.
    pub fn new(params: BalloonParams) -> io::Result<(Self, BalloonHandle)> {
        Self::with_engine(params, DiscardEngine::new)
    }

    /// As [`Balloon::new`], with the caller's discard engine.
    ///
    /// # Errors
    /// No event descriptor or timer is available.
    pub fn with_engine(
        params: BalloonParams,
        engine: impl FnOnce(Arc<crate::reclaim::DiscardSwitch>) -> DiscardEngine,
    ) -> io::Result<(Self, BalloonHandle)> {
        let offered = features_on_offer(&params);
        let BalloonParams {
            ram,
            size_bytes,
            free_page_reporting,
            ..
        } = params;
        let refill = EventFd::new(EFD_NONBLOCK)?;
        let shared = Arc::new(Shared::new(ram, offered, free_page_reporting, refill));
        shared.config.set_target_bytes(size_bytes);
        let engine = engine(Arc::clone(&shared.switch));
        let worker = BalloonWorker::new(Arc::clone(&shared), engine, StatsTimer::new()?);
        let handle = BalloonHandle::new(Arc::clone(&shared));
        let balloon = Self {
            shared,
            worker: Some(worker),
        };
        Ok((balloon, handle))
    }
}

impl Balloon {
    fn write_policy(&self, offset: u64, data: &[u8]) {
        match self.shared.control.write_config(offset, data) {
            FieldWrite::Taken => {}
            FieldWrite::Invalid => self.shared.ledger.faults().policy_words_invalid += 1,
            FieldWrite::Ignored => self.shared.ledger.faults().config_writes_ignored += 1,
        }
    }
}

fn features_on_offer(params: &BalloonParams) -> u64 {
    let mut features =
        VIRTIO_F_VERSION_1 | VIRTIO_BALLOON_F_MUST_TELL_HOST | VIRTIO_BALLOON_F_STATS_VQ;
    if params.deflate_on_oom {
        features |= VIRTIO_BALLOON_F_DEFLATE_ON_OOM;
    }
    let blocks_can_free = blocks_can_free(&params.ram.memory(), Expected::Anything);
    if params.free_page_hinting && blocks_can_free {
        features |= VIRTIO_BALLOON_F_FREE_PAGE_HINT | VIRTIO_BALLOON_F_PAGE_POISON;
    }
    if params.free_page_reporting && blocks_can_free {
        // A guest that clears or poisons its free pages reports only to a device that accepts the poison value.
        features |= VIRTIO_BALLOON_F_REPORTING | VIRTIO_BALLOON_F_PAGE_POISON;
        if params.reporting_policy {
            features |= VIRTIO_BALLOON_F_REPORTING_POLICY;
        }
        if params.device_init {
            features |= VIRTIO_BALLOON_F_DEVICE_INIT_REPORTED;
        }
    }
    features
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.shared.offered
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let policy = self.shared.control.config_bytes();
        let policy = policy.as_ref().map(AsRef::as_ref);
        self.shared.config.read(policy, offset, data);
    }

    fn ack_features(&mut self, features: u64) {
        self.shared.control.driver_came(takes_policy(features));
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        match self.shared.config.write(offset, data) {
            ConfigWrite::Actual(bytes) => {
                if bytes > self.shared.ram_bytes() {
                    self.shared.ledger.faults().actual_beyond_ram += 1;
                }
            }
            ConfigWrite::PoisonVal => {}
            ConfigWrite::Ignored => self.write_policy(offset, data),
        }
    }

    fn holds_notifier(&self, queue_index: u16) -> bool {
        self.shared.offers(VIRTIO_BALLOON_F_FREE_PAGE_HINT) && numbering::may_be_hint(queue_index)
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        boxed(self.worker.take())
    }

    fn set_interrupt(&mut self, interrupt: Arc<dyn Interrupt>) {
        self.shared.interrupt.attach(&interrupt);
    }

    fn reset(&mut self) {
        self.shared.config.forget_driver();
        self.shared.control.driver_went();
    }

    fn state(&self) -> Saved {
        Saved::of(&self.shared.state())
    }

    fn restore(&mut self, state: &Saved) -> Result<(), StateError> {
        self.shared.restore(state)
    }

    fn counters(&self) -> Counters {
        BalloonHandle::new(Arc::clone(&self.shared)).counters()
    }
}
