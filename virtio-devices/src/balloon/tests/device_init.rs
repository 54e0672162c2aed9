//! Tests the initialized lengths of reports.

use vm_memory::GuestAddress;

use super::rig::{FREE_PFN, LINUX_FEATURES, PAGE, RAM_BYTES, REPORTING, Rig};
use crate::balloon::spec::{
    VIRTIO_BALLOON_F_DEVICE_INIT_REPORTED, VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING,
};
use crate::balloon::{Balloon, BalloonParams};
use crate::device::VirtioDevice;
use crate::reclaim::InhibitReason;
use crate::testing::{Segment, TestRam};

/// Pages of the driver's free memory; `first` may be beyond RAM.
fn range(first: u64, pages: u64) -> Segment<'static> {
    let start = GuestAddress((FREE_PFN + first) * PAGE);
    Segment::WritableAt(start, u32::try_from(pages * PAGE).unwrap())
}

/// A driver that uses the lengths, and that fills free pages with `poison` if there is one.
fn rig(poison: Option<u32>) -> Rig {
    let mut features = LINUX_FEATURES | VIRTIO_BALLOON_F_DEVICE_INIT_REPORTED;
    if poison.is_some() {
        features |= VIRTIO_BALLOON_F_PAGE_POISON;
    }
    let mut rig = Rig::idle(features);
    rig.harness.add_queues(4);
    if let Some(value) = poison {
        rig.balloon.write_config(12, &value.to_le_bytes());
    }
    rig.harness.activate().unwrap();
    rig.dirty(FREE_PFN, 64);
    rig
}

/// The length in pages with which the device completes one report.
fn reported(rig: &mut Rig, segments: &[Segment<'_>]) -> u64 {
    let (_, used) = rig.harness.request(REPORTING, segments).unwrap();
    let bytes = u64::from(used.expect("the chain is completed").len);
    assert_eq!(bytes % PAGE, 0);
    bytes / PAGE
}

const BEYOND_RAM: u64 = RAM_BYTES / PAGE;

#[test]
fn report_is_completed_with_the_length_of_what_reads_as_zeros() {
    let mut rig = rig(None);
    assert_eq!(reported(&mut rig, &[range(0, 16)]), 16);
    assert_eq!(rig.gone(FREE_PFN, 16).len(), 16);
    // In the order of the chain, whatever their addresses.
    let segments = [range(40, 8), range(0, 4), range(20, 2)];
    assert_eq!(reported(&mut rig, &segments), 14);
}

#[test]
fn length_ends_where_a_range_was_not_discarded() {
    let mut rig = rig(None);
    let segments = [range(4, 4), range(BEYOND_RAM, 2), range(8, 4)];
    assert_eq!(reported(&mut rig, &segments), 4);
    assert_eq!(rig.gone(FREE_PFN, 16).len(), 8);
    assert_eq!(reported(&mut rig, &[range(BEYOND_RAM, 2), range(0, 4)]), 0);
    let half = Segment::WritableAt(GuestAddress(FREE_PFN * PAGE + 512), 1024);
    assert_eq!(reported(&mut rig, &[half]), 0);
}

#[test]
fn chains_of_one_batch_have_each_its_own_length() {
    let mut rig = rig(None);
    let chains: [&[Segment<'_>]; 4] = [
        &[range(8, 8)],
        &[range(BEYOND_RAM, 1)],
        &[range(0, 2), range(4, 2)],
        // Named twice, and just as zero.
        &[range(8, 4)],
    ];
    for chain in chains {
        rig.harness.queue(REPORTING).push(chain);
    }
    rig.harness.kick(REPORTING).unwrap();
    let mut length = || {
        let used = rig.harness.queue(REPORTING).pop_used();
        u64::from(used.unwrap().len) / PAGE
    };
    assert_eq!([length(), length(), length(), length()], [8, 0, 4, 4]);
    assert_eq!(rig.snapshot().report.batches, 1);
}

#[test]
fn report_that_is_not_discarded_has_no_length() {
    let mut poisoned = rig(Some(0xaaaa_aaaa));
    assert_eq!(reported(&mut poisoned, &[range(0, 4)]), 0);
    let mut zeroing = rig(Some(0));
    assert_eq!(reported(&mut zeroing, &[range(0, 4)]), 4);

    let mut rig = rig(None);
    // What an earlier batch discarded does not count.
    assert_eq!(reported(&mut rig, &[range(0, 4)]), 4);
    let guard = rig.handle.inhibit(InhibitReason::AssignedDevice);
    assert_eq!(reported(&mut rig, &[range(0, 4)]), 0);
    drop(guard);
    rig.handle.pause_reporting().unwrap();
    let phase = rig.handle.wait_for_pause(std::time::Instant::now());
    assert!(matches!(phase, device_facts::PausePhase::PausedByDevice));
    assert_eq!(reported(&mut rig, &[range(0, 4)]), 0);
    rig.handle.resume_reporting().unwrap();
    assert_eq!(reported(&mut rig, &[range(0, 4)]), 4);
}

#[test]
fn feature_is_offered_only_if_configured_and_with_reporting() {
    for (reporting, device_init) in [(true, false), (false, true), (true, true)] {
        let ram = TestRam::new(1 << 20);
        let (balloon, _handle) = Balloon::new(BalloonParams {
            free_page_reporting: reporting,
            device_init,
            ..BalloonParams::with_everything(ram.mem())
        })
        .unwrap();
        let offered = balloon.features() & VIRTIO_BALLOON_F_DEVICE_INIT_REPORTED != 0;
        assert_eq!(offered, reporting && device_init);
    }
}

#[test]
fn driver_without_the_feature_or_without_reporting_gets_no_length() {
    let mut rig = Rig::new();
    // `send` expects length zero.
    rig.send(REPORTING, &[range(0, 4)]);
    let only_init = LINUX_FEATURES & !VIRTIO_BALLOON_F_REPORTING;
    let mut rig = Rig::idle(only_init | VIRTIO_BALLOON_F_DEVICE_INIT_REPORTED);
    rig.harness.add_queues(3);
    rig.harness.activate().unwrap();
    assert!(!rig.handle.reporting().is_active());
}
