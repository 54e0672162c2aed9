//! Tests with well-behaved drivers.

use vm_memory::GuestAddress;

use super::rig::{DEFLATE, FREE_PFN, INFLATE, LINUX_FEATURES, PAGE, REPORTING, Rig, pfns};
use crate::balloon::ReportingState;
use crate::balloon::spec::{
    VIRTIO_BALLOON_F_FREE_PAGE_HINT, VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING,
    VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_F_VERSION_1,
};
use crate::device::VirtioDevice;
use crate::reclaim::{InhibitReason, SkipReason};
use crate::testing::Segment;

fn free_range(first: u64, pages: u64) -> Segment<'static> {
    let start = GuestAddress((FREE_PFN + first) * PAGE);
    Segment::WritableAt(start, u32::try_from(pages * PAGE).unwrap())
}

#[test]
fn inflate_of_scattered_pages_frees_those_and_only_those() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 64);
    let given: Vec<u64> = [9, 3, 4, 5, 40, 63].map(|page| FREE_PFN + page).to_vec();
    rig.send(INFLATE, &[Segment::Readable(&pfns(given.clone()))]);
    let mut sorted = given;
    sorted.sort_unstable();
    assert_eq!(rig.gone(FREE_PFN, 64), sorted);
    let figures = rig.snapshot().inflate;
    assert_eq!((figures.chains, figures.batches), (1, 1));
    assert_eq!(figures.requested.bytes, 6 * PAGE);
    assert_eq!(figures.discarded.bytes, 6 * PAGE);
    assert_eq!(figures.discarded.ranges, 4);
    assert_eq!(figures.syscalls, 4);
    assert_eq!(figures.latency.count(), 1);
    assert_eq!(rig.harness.interrupt.queue_signals(INFLATE), 1);
}

#[test]
fn inflate_list_split_within_a_number_is_read_as_one() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 4);
    let list = pfns([FREE_PFN, FREE_PFN + 2]);
    let (head, tail) = list.split_at(3);
    rig.send(INFLATE, &[Segment::Readable(head), Segment::Readable(tail)]);
    assert_eq!(rig.gone(FREE_PFN, 4), [FREE_PFN, FREE_PFN + 2]);
}

#[test]
fn chains_available_together_become_one_batch() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 32);
    for chain in 0..8 {
        let list = pfns((0..4).map(|page| FREE_PFN + 4 * chain + page));
        rig.harness.queue(INFLATE).push(&[Segment::Readable(&list)]);
    }
    rig.harness.kick(INFLATE).unwrap();
    let figures = rig.snapshot().inflate;
    assert_eq!(
        (figures.chains, figures.batches, figures.syscalls),
        (8, 1, 1)
    );
    assert_eq!(figures.discarded.bytes, 32 * PAGE);
    assert_eq!(rig.harness.interrupt.queue_signals(INFLATE), 1);
    for _ in 0..8 {
        assert!(rig.harness.queue(INFLATE).pop_used().is_some());
    }
}

/// Some drivers name at most 256 pages per chain, so that a block of 2 MiB takes two.
#[test]
fn pages_named_by_several_chains_are_discarded_as_one_range() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 64);
    for list in [FREE_PFN..FREE_PFN + 24, FREE_PFN + 24..FREE_PFN + 64] {
        rig.harness
            .queue(INFLATE)
            .push(&[Segment::Readable(&pfns(list))]);
    }
    rig.harness.kick(INFLATE).unwrap();
    assert_eq!(rig.gone(FREE_PFN, 64).len(), 64);
    let figures = rig.snapshot().inflate;
    assert_eq!((figures.chains, figures.batches), (2, 1));
    assert_eq!((figures.discarded.ranges, figures.syscalls), (1, 1));
}

#[test]
fn batches_end_at_their_bound() {
    let mut rig = Rig::new();
    // No two pages are adjacent, so each is a separate range.
    for chain in 0..3_u64 {
        let list = pfns((0..2048).map(|at| 2 * (2048 * (chain % 2) + at)));
        rig.harness.queue(INFLATE).push(&[Segment::Readable(&list)]);
    }
    // Far away from everything else, so that the rings stay intact.
    let figures = {
        let guard = rig.handle.inhibit(InhibitReason::MemoryExport);
        rig.harness.kick(INFLATE).unwrap();
        drop(guard);
        rig.snapshot().inflate
    };
    assert_eq!((figures.chains, figures.batches), (3, 2));
    assert_eq!(figures.requested.ranges, 3 * 2048);
}

#[test]
fn deflate_costs_nothing_and_is_counted() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 8);
    rig.send(DEFLATE, &[Segment::Readable(&pfns(FREE_PFN..FREE_PFN + 8))]);
    assert!(rig.gone(FREE_PFN, 8).is_empty());
    let snapshot = rig.snapshot();
    assert_eq!(
        (snapshot.deflated.ranges, snapshot.deflated.bytes),
        (1, 8 * PAGE)
    );
    assert_eq!(snapshot.inflate.syscalls + snapshot.report.syscalls, 0);
}

/// If both doorbells are signalled, the order of service is random.
#[test]
fn deflate_is_answered_after_what_was_inflated_before_it() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 4);
    let list = pfns(FREE_PFN..FREE_PFN + 4);
    rig.harness.queue(INFLATE).push(&[Segment::Readable(&list)]);
    rig.send(DEFLATE, &[Segment::Readable(&list)]);
    assert_eq!(rig.gone(FREE_PFN, 4).len(), 4);
    assert!(rig.harness.queue(INFLATE).pop_used().is_some());
    assert_eq!(rig.harness.interrupt.queue_signals(INFLATE), 1);
    // The guest uses the pages again; the late doorbell then finds no work.
    rig.dirty(FREE_PFN, 4);
    rig.harness.kick(INFLATE).unwrap();
    assert!(rig.gone(FREE_PFN, 4).is_empty());
}

/// Every combination of optional queues, in Linux's and the standard's numbering.
#[test]
fn queues_are_known_by_either_way_of_counting_under_all_features() {
    for combination in 0..8 {
        let optional = [
            (VIRTIO_BALLOON_F_STATS_VQ, 2_u16),
            (VIRTIO_BALLOON_F_FREE_PAGE_HINT, 3),
            (VIRTIO_BALLOON_F_REPORTING, 4),
        ];
        let chosen: Vec<_> = (0..3)
            .filter(|bit| combination >> bit & 1 != 0)
            .map(|bit| optional[bit])
            .collect();
        let features = chosen
            .iter()
            .fold(VIRTIO_F_VERSION_1, |all, (bit, _)| all | bit);
        let fixed: Vec<_> = chosen.iter().map(|(_, number)| *number).collect();
        let dense: Vec<_> = (2..).take(chosen.len()).collect();
        for extra in [dense, fixed] {
            let mut rig = Rig::idle(features);
            for index in [0, 1].iter().chain(&extra) {
                rig.harness.add_queue(*index, 32);
            }
            rig.harness.activate().unwrap();
            rig.dirty(FREE_PFN, 1);
            for ((bit, _), index) in chosen.iter().zip(&extra) {
                let context = format!("{features:#x}, queue {index} of {extra:?}");
                let queue = rig.harness.queue(*index);
                if *bit == VIRTIO_BALLOON_F_STATS_VQ {
                    queue.push(&[Segment::Readable(&[0; 10])]);
                    rig.harness.kick(*index).unwrap();
                    assert!(rig.handle.cached_stats().is_some(), "{context}");
                    continue;
                }
                queue.push(&[free_range(0, 1)]);
                rig.harness.kick(*index).unwrap();
                let figures = rig.snapshot();
                let (reported, hinted) = match *bit == VIRTIO_BALLOON_F_REPORTING {
                    true => (1, figures.hint.chains),
                    false => (0, 1),
                };
                let seen = (figures.report.chains, figures.hint.chains);
                assert_eq!(seen, (reported, hinted), "{context}");
            }
            assert_eq!(rig.snapshot().faults, Default::default(), "{features:#x}");
        }
    }
}

#[test]
fn report_is_discarded_in_one_batch_and_measured() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 64);
    rig.send(
        REPORTING,
        &[free_range(0, 16), free_range(32, 8), free_range(16, 4)],
    );
    let expected: Vec<u64> = (0..20).chain(32..40).map(|page| FREE_PFN + page).collect();
    assert_eq!(rig.gone(FREE_PFN, 64), expected);
    let report = rig.snapshot().report;
    assert_eq!(
        (report.requested.ranges, report.requested.bytes),
        (3, 28 * PAGE)
    );
    assert_eq!(
        (report.discarded.ranges, report.discarded.bytes),
        (2, 28 * PAGE)
    );
    assert_eq!((report.chains, report.batches), (1, 1));
    let last = report.last.expect("there was one");
    assert_eq!(last.discarded.bytes, 28 * PAGE);
    assert_eq!(report.latency.max_us(), last.took_us);
}

#[test]
fn report_over_the_queue_of_the_standard_numbering_is_served() {
    let features = VIRTIO_F_VERSION_1 | VIRTIO_BALLOON_F_STATS_VQ | VIRTIO_BALLOON_F_REPORTING;
    let mut rig = Rig::idle(features);
    for index in [0, 1, 2, 4] {
        rig.harness.add_queue(index, 32);
    }
    rig.harness.activate().unwrap();
    rig.dirty(FREE_PFN, 4);
    rig.send(4, &[free_range(0, 2)]);
    assert_eq!(rig.gone(FREE_PFN, 4), [FREE_PFN, FREE_PFN + 1]);
    assert!(rig.handle.reporting().is_active());
}

#[test]
fn report_of_a_poisoning_guest_is_answered_but_not_discarded() {
    let mut rig = Rig::idle(LINUX_FEATURES | VIRTIO_BALLOON_F_PAGE_POISON);
    rig.harness.add_queues(4);
    rig.balloon.write_config(12, &0xaaaa_aaaa_u32.to_le_bytes());
    rig.harness.activate().unwrap();
    rig.dirty(FREE_PFN, 4);
    rig.send(REPORTING, &[free_range(0, 4)]);
    assert!(rig.gone(FREE_PFN, 4).is_empty());
    assert_eq!(
        rig.handle.reporting(),
        ReportingState::PagePoison(0xaaaa_aaaa)
    );
    assert_eq!(
        rig.snapshot().report.skipped.get(SkipReason::PagePoison),
        4 * PAGE
    );
    // Pages in the balloon are not free pages of the guest.
    rig.send(INFLATE, &[Segment::Readable(&pfns([FREE_PFN]))]);
    assert_eq!(rig.gone(FREE_PFN, 4), [FREE_PFN]);
}

#[test]
fn report_of_a_guest_that_zeroes_its_free_pages_is_discarded() {
    let mut rig = Rig::idle(LINUX_FEATURES | VIRTIO_BALLOON_F_PAGE_POISON);
    rig.harness.add_queues(4);
    rig.balloon.write_config(12, &0_u32.to_le_bytes());
    rig.harness.activate().unwrap();
    rig.dirty(FREE_PFN, 4);
    rig.send(REPORTING, &[free_range(0, 4)]);
    assert_eq!(rig.gone(FREE_PFN, 4).len(), 4);
}

#[test]
fn inhibited_balloon_answers_and_tells_why_it_keeps_the_memory() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 4);
    let guard = rig.handle.inhibit(InhibitReason::AssignedDevice);
    assert!(guard.is_settled());
    rig.send(REPORTING, &[free_range(0, 4)]);
    rig.send(INFLATE, &[Segment::Readable(&pfns([FREE_PFN]))]);
    assert!(rig.gone(FREE_PFN, 4).is_empty());
    let snapshot = rig.snapshot();
    assert_eq!(
        snapshot.reporting,
        ReportingState::Inhibited(InhibitReason::AssignedDevice)
    );
    assert_eq!(snapshot.inhibited, Some(InhibitReason::AssignedDevice));
    assert_eq!(snapshot.report.skipped.get(SkipReason::Inhibited), 4 * PAGE);
    assert_eq!(snapshot.inflate.skipped.get(SkipReason::Inhibited), PAGE);
    drop(guard);
    rig.send(REPORTING, &[free_range(0, 4)]);
    assert_eq!(rig.gone(FREE_PFN, 4).len(), 4);
    assert!(rig.handle.reporting().is_active());
    assert_eq!(rig.snapshot().inhibited, None);
    // An operator's pause of reporting does not affect the balloon.
    let _guard = rig.handle.inhibit(InhibitReason::ReportingPaused);
    assert_eq!(rig.snapshot().inhibited, None);
}

#[test]
fn driver_that_resets_and_returns_is_served_again() {
    let mut rig = Rig::new();
    for _ in 0..3 {
        rig.dirty(FREE_PFN, 4);
        rig.send(REPORTING, &[free_range(0, 4)]);
        assert_eq!(rig.gone(FREE_PFN, 4).len(), 4);
        rig.harness.reset();
        rig.balloon.reset();
        assert_eq!(rig.handle.reporting(), ReportingState::DriverNotReady);
        rig.harness.kick(REPORTING).unwrap();
        rig.harness.activate().unwrap();
    }
    assert_eq!(rig.snapshot().report.chains, 3, "figures outlive a reset");
}

#[test]
fn reporting_state_names_what_is_missing() {
    let mut rig = Rig::idle(VIRTIO_F_VERSION_1);
    assert_eq!(rig.handle.reporting(), ReportingState::DriverNotReady);
    rig.harness.add_queues(2);
    rig.harness.activate().unwrap();
    assert_eq!(rig.handle.reporting(), ReportingState::GuestDeclined);

    let mut rig = Rig::idle(LINUX_FEATURES);
    rig.harness.add_queues(3);
    rig.harness.activate().unwrap();
    assert_eq!(rig.handle.reporting(), ReportingState::QueueNotEnabled);
}
