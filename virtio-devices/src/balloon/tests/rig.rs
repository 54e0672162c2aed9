//! A balloon with a mock driver.

use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::balloon::spec::{
    VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_F_VERSION_1,
};
use crate::balloon::{Balloon, BalloonHandle, BalloonParams, BalloonSnapshot};
use crate::device::{QueueHandler, VirtioDevice};
use crate::reclaim::DiscardEngine;
use crate::testing::{HandlerHarness, Segment, TestRam};
use device_facts::policy_space::VIRTIO_BALLOON_F_REPORTING_POLICY;

pub(super) const PAGE: u64 = 4096;
pub(super) const RAM_BYTES: u64 = 64 << 20;
/// First page of the RAM that the tests return; rings and buffers are below it.
pub(super) const FREE_PFN: u64 = (32 << 20) / PAGE;

/// Linux's numbering with statistics and reporting.
pub(super) const INFLATE: u16 = 0;
pub(super) const DEFLATE: u16 = 1;
pub(super) const STATS: u16 = 2;
pub(super) const REPORTING: u16 = 3;

pub(super) const LINUX_FEATURES: u64 =
    VIRTIO_F_VERSION_1 | VIRTIO_BALLOON_F_STATS_VQ | VIRTIO_BALLOON_F_REPORTING;

pub(super) struct Rig {
    pub(super) balloon: Balloon,
    pub(super) handle: BalloonHandle,
    pub(super) harness: HandlerHarness<Box<dyn QueueHandler>>,
}

impl Rig {
    /// A running driver with all queues of [`LINUX_FEATURES`].
    pub(super) fn new() -> Self {
        let mut rig = Self::idle(LINUX_FEATURES);
        rig.harness.add_queue(INFLATE, 128);
        rig.harness.add_queue(DEFLATE, 128);
        rig.harness.add_queue(STATS, 64);
        rig.harness.add_queue(REPORTING, 32);
        rig.harness.activate().unwrap();
        rig
    }

    /// A driver without queues, not active.
    pub(super) fn idle(features: u64) -> Self {
        let ram = TestRam::new(RAM_BYTES as usize);
        let params = BalloonParams::with_everything(ram.mem());
        // Without vectors, so that the number of system calls is the same on every kernel; the engine's own tests
        // compare both variants.
        let (mut balloon, handle) =
            Balloon::with_engine(params, DiscardEngine::without_vectors).unwrap();
        let handler = balloon.take_handlers().remove(0);
        let harness = HandlerHarness::with_ram(handler, features, ram);
        balloon.set_interrupt(Arc::clone(&harness.interrupt) as _);
        Self {
            balloon,
            handle,
            harness,
        }
    }

    pub(super) fn snapshot(&self) -> BalloonSnapshot {
        self.handle.snapshot()
    }

    /// Fills `count` pages with ones.
    pub(super) fn dirty(&self, first_pfn: u64, count: u64) {
        let ones = vec![1; (count * PAGE) as usize];
        self.harness
            .ram
            .write(GuestAddress(first_pfn * PAGE), &ones);
    }

    /// The pages among the first `count` that are no longer all ones; each must be all zeros.
    pub(super) fn gone(&self, first_pfn: u64, count: u64) -> Vec<u64> {
        let mut gone = Vec::new();
        for pfn in first_pfn..first_pfn + count {
            let page = self
                .harness
                .ram
                .read(GuestAddress(pfn * PAGE), PAGE as usize);
            if page.iter().all(|byte| *byte == 0) {
                gone.push(pfn);
            } else {
                assert!(
                    page.iter().all(|byte| *byte == 1),
                    "page {pfn:#x} is damaged"
                );
            }
        }
        gone
    }

    /// Sends one chain and expects its completion, of length zero.
    pub(super) fn send(&mut self, queue: u16, segments: &[Segment<'_>]) {
        let (chain, used) = self.harness.request(queue, segments).unwrap();
        let used = used.expect("the chain is answered");
        assert_eq!((used.head, used.len), (u32::from(chain.head), 0));
    }
}

/// As [`Rig::new`], with a driver that supports a reporting policy.
pub(super) fn policy_rig() -> Rig {
    let features = LINUX_FEATURES | VIRTIO_BALLOON_F_REPORTING_POLICY;
    let mut rig = Rig::idle(features);
    rig.balloon.ack_features(features);
    rig.harness.add_queues(4);
    rig.harness.activate().unwrap();
    rig
}

/// Page frame numbers in their in-memory format.
pub(super) fn pfns(pfns: impl IntoIterator<Item = u64>) -> Vec<u8> {
    pfns.into_iter()
        .flat_map(|pfn| u32::try_from(pfn).unwrap().to_le_bytes())
        .collect()
}
