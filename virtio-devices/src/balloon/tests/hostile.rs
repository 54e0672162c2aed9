//! Tests of hostile drivers: every request is completed and counted, and has no other effect.

use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::rig::{DEFLATE, FREE_PFN, INFLATE, PAGE, RAM_BYTES, REPORTING, Rig, STATS, pfns};
use crate::device::WorkerError;
use crate::reclaim::SkipReason;
use crate::testing::{Desc, NEXT, Segment, WRITE};

const QUEUES: [u16; 4] = [INFLATE, DEFLATE, STATS, REPORTING];

#[test]
fn page_numbers_beyond_ram_are_skipped() {
    let mut rig = Rig::new();
    let end = RAM_BYTES / PAGE;
    let list = pfns([end, end + 7, u64::from(u32::MAX), u64::from(u32::MAX) - 1]);
    rig.send(INFLATE, &[Segment::Readable(&list)]);
    let inflate = rig.snapshot().inflate;
    assert_eq!(inflate.skipped.get(SkipReason::OutsideRam), 4 * PAGE);
    assert_eq!((inflate.discarded.bytes, inflate.syscalls), (0, 0));
}

#[test]
fn page_named_many_times_is_discarded_once() {
    let mut rig = Rig::new();
    let list = pfns(std::iter::repeat_n(FREE_PFN, 256));
    rig.send(INFLATE, &[Segment::Readable(&list)]);
    let inflate = rig.snapshot().inflate;
    assert_eq!((inflate.discarded.bytes, inflate.syscalls), (PAGE, 1));
    assert_eq!(inflate.skipped.get(SkipReason::Duplicate), 255 * PAGE);
}

#[test]
fn page_numbers_the_device_would_have_to_write_are_not_read() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 2);
    let buffer = rig.harness.ram.alloc(4, 4);
    rig.harness.ram.write(buffer, &pfns([FREE_PFN]));
    rig.send(INFLATE, &[Segment::WritableAt(buffer, 4)]);
    rig.send(DEFLATE, &[Segment::WritableAt(buffer, 4)]);
    assert!(rig.gone(FREE_PFN, 2).is_empty());
    let snapshot = rig.snapshot();
    assert_eq!(snapshot.faults.descriptors_wrong_direction, 2);
    assert_eq!(snapshot.deflated.bytes, 0);
}

#[test]
fn report_of_buffers_the_device_may_not_write_is_refused() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 2);
    let start = GuestAddress(FREE_PFN * PAGE);
    rig.send(REPORTING, &[Segment::ReadableAt(start, PAGE as u32)]);
    assert!(rig.gone(FREE_PFN, 2).is_empty());
    assert_eq!(rig.snapshot().faults.descriptors_wrong_direction, 1);
}

#[test]
fn reports_of_any_shape_free_whole_pages_of_ram_only() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 8);
    let at = FREE_PFN * PAGE;
    rig.send(
        REPORTING,
        &[
            // Unaligned at both ends: one whole page inside.
            Segment::WritableAt(GuestAddress(at + 100), 2 * PAGE as u32),
            // Overlaps the previous segment.
            Segment::WritableAt(GuestAddress(at + PAGE), PAGE as u32),
            // Wraps around the end of the address space.
            Segment::WritableAt(GuestAddress(u64::MAX - 0xfff), 0x0010_0000),
            // Outside of RAM.
            Segment::WritableAt(GuestAddress(RAM_BYTES), 0x0010_0000),
            // Less than a page.
            Segment::WritableAt(GuestAddress(at + 5 * PAGE), 1),
        ],
    );
    assert_eq!(rig.gone(FREE_PFN, 8), [FREE_PFN + 1]);
    let report = rig.snapshot().report;
    assert_eq!(
        report.requested.bytes,
        report.discarded.bytes + report.skipped.total()
    );
    assert_eq!(report.skipped.get(SkipReason::OutsideRam), 0x0020_0000);
    assert_eq!(report.skipped.get(SkipReason::Duplicate), PAGE);
    assert_eq!(report.skipped.get(SkipReason::Unaligned), PAGE + 1);
}

#[test]
fn report_past_the_end_of_ram_frees_up_to_the_end() {
    let mut rig = Rig::new();
    let last = RAM_BYTES / PAGE - 1;
    rig.dirty(last, 1);
    let start = GuestAddress(last * PAGE);
    rig.send(REPORTING, &[Segment::WritableAt(start, u32::MAX - 0xfff)]);
    assert_eq!(rig.gone(last, 1), [last]);
    assert_eq!(rig.snapshot().report.discarded.bytes, PAGE);
}

#[test]
fn chain_without_end_is_cut_counted_and_answered() {
    for queue in QUEUES {
        let mut rig = Rig::new();
        let flags = if queue == REPORTING {
            WRITE | NEXT
        } else {
            NEXT
        };
        let desc = Desc {
            addr: FREE_PFN * PAGE,
            len: PAGE as u32,
            flags,
            next: 0,
        };
        rig.harness.queue(queue).push_raw(&[desc]);
        rig.harness.kick(queue).unwrap();
        if queue != STATS {
            assert!(
                rig.harness.queue(queue).pop_used().is_some(),
                "queue {queue}"
            );
        }
        assert_eq!(rig.snapshot().faults.chains_without_end, 1, "queue {queue}");
    }
}

#[test]
fn chains_through_a_huge_indirect_table_are_cut() {
    let mut rig = Rig::new();
    let range = Segment::WritableAt(GuestAddress(FREE_PFN * PAGE), 0x1000);
    rig.harness.queue(REPORTING).push_indirect(&[range; 1000]);
    rig.harness.kick(REPORTING).unwrap();
    assert!(rig.harness.queue(REPORTING).pop_used().is_some());
    let snapshot = rig.snapshot();
    assert_eq!(snapshot.faults.chains_too_long, 1);
    assert_eq!(snapshot.report.requested.ranges, 256);
}

#[test]
fn empty_and_unreadable_descriptors_are_counted() {
    let mut rig = Rig::new();
    let nowhere = Segment::ReadableAt(GuestAddress(RAM_BYTES + PAGE), 64);
    let nothing = Segment::ReadableAt(GuestAddress(FREE_PFN * PAGE), 0);
    rig.send(INFLATE, &[nowhere, nothing]);
    let faults = rig.snapshot().faults;
    assert_eq!(
        (faults.descriptors_unreadable, faults.descriptors_empty),
        (1, 1)
    );
    assert_eq!(rig.snapshot().inflate.requested.bytes, 0);
}

#[test]
fn page_list_of_gigantic_length_is_read_up_to_the_bound() {
    let mut rig = Rig::new();
    // Zeros: every number in it is page zero, which the test does not use.
    let zeros = Segment::ReadableAt(GuestAddress(FREE_PFN * PAGE), 16 << 20);
    rig.send(INFLATE, &[zeros]);
    let snapshot = rig.snapshot();
    assert_eq!(snapshot.faults.chains_too_long, 1);
    assert_eq!(snapshot.inflate.requested.bytes, 4096 * PAGE);
    rig.send(DEFLATE, &[zeros]);
    assert_eq!(rig.snapshot().deflated.bytes, 4096 * PAGE);
}

#[test]
fn page_list_that_ends_within_a_number_is_used_up_to_there() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 2);
    let mut list = pfns([FREE_PFN]);
    list.extend([1, 2, 3]);
    rig.send(INFLATE, &[Segment::Readable(&list)]);
    assert_eq!(rig.gone(FREE_PFN, 2), [FREE_PFN]);
    assert_eq!(rig.snapshot().faults.page_lists_ragged, 1);
}

#[test]
fn statistics_of_gigantic_length_are_read_up_to_the_bound() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 4);
    let start = GuestAddress(FREE_PFN * PAGE);
    rig.harness
        .queue(STATS)
        .push(&[Segment::ReadableAt(start, u32::MAX)]);
    rig.harness.kick(STATS).unwrap();
    let faults = rig.snapshot().faults;
    assert_eq!((faults.chains_too_long, faults.stats_ragged), (1, 1));
    assert_eq!(faults.stats_unknown_tags, 409);
}

#[test]
fn head_that_does_not_exist_is_counted_and_the_queue_goes_on() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 1);
    rig.harness.queue(INFLATE).offer(0xffff);
    rig.send(INFLATE, &[Segment::Readable(&pfns([FREE_PFN]))]);
    assert_eq!(rig.gone(FREE_PFN, 1), [FREE_PFN]);
    let faults = rig.snapshot().faults;
    assert_eq!((faults.chains_without_head, faults.chains_empty), (1, 1));
}

/// Counts the lines that the queue code itself logs.
struct QueueLines(AtomicUsize);

impl log::Log for QueueLines {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("virtio_queue")
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

#[test]
fn heads_that_do_not_exist_leave_the_log_alone() {
    static LINES: QueueLines = QueueLines(AtomicUsize::new(0));
    log::set_logger(&LINES).expect("no other test has a logger");
    log::set_max_level(log::LevelFilter::Error);
    let mut rig = Rig::new();
    for queue in QUEUES {
        for _ in 0..16 {
            rig.harness.queue(queue).offer(0xffff);
        }
        rig.harness.kick(queue).unwrap();
    }
    assert!(rig.snapshot().faults.chains_without_head > 3 * 16);
    assert_eq!(LINES.0.load(Ordering::Relaxed), 0);
}

#[test]
fn ring_that_claims_more_chains_than_it_has_stops_the_device() {
    for queue in QUEUES {
        let mut rig = Rig::new();
        rig.harness.queue(queue).set_avail_idx(1000);
        let error = rig.harness.kick(queue).unwrap_err();
        assert!(matches!(error, WorkerError::Queue { index, .. } if index == queue));
        // No request is served any more, and no caller waits.
        rig.harness.kick(INFLATE).unwrap();
        assert!(!rig.handle.reporting().is_active());
    }
}

#[test]
fn queue_nobody_negotiated_is_counted_and_not_served() {
    let mut rig = Rig::idle(super::rig::LINUX_FEATURES);
    for index in 0..5 {
        rig.harness.add_queue(index, 32);
    }
    rig.harness.activate().unwrap();
    let range = Segment::WritableAt(GuestAddress(FREE_PFN * PAGE), PAGE as u32);
    let (_, used) = rig.harness.request(4, &[range]).unwrap();
    assert_eq!(used, None);
    assert_eq!(rig.snapshot().faults.queues_unexplained, 1);
}

fn descriptors() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![
        // The upper half, which holds no rings.
        4 => (0..RAM_BYTES / 2).prop_map(|at| RAM_BYTES / 2 + at),
        2 => (0..512_u64).prop_map(|page| (FREE_PFN + page) * PAGE),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0..0x2_0000_u32, 1 => any::<u32>()];
    (addr, len, 0..4_u16, 0..6_u16).prop_map(|(addr, len, flags, next)| Desc {
        addr,
        len,
        flags,
        next,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_chain_on_any_queue_balances_the_books(
        chains in vec((0..QUEUES.len(), vec(descriptors(), 1..6)), 1..5),
    ) {
        let mut rig = Rig::new();
        for (queue, descs) in &chains {
            let queue = QUEUES[*queue];
            rig.harness.queue(queue).push_raw(descs);
            rig.harness.kick(queue).unwrap();
        }
        let snapshot = rig.snapshot();
        for path in [&snapshot.report, &snapshot.inflate] {
            prop_assert_eq!(path.failed.bytes, 0);
            prop_assert_eq!(
                path.requested.bytes,
                path.discarded.bytes + path.skipped.total()
            );
        }
        let parked = u64::from(chains.iter().any(|(queue, _)| QUEUES[*queue] == STATS));
        let answered: u64 = QUEUES.iter().map(|q| u64::from(rig.harness.queue(*q).used_idx())).sum();
        prop_assert_eq!(answered + parked, chains.len() as u64);
    }
}
