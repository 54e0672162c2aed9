//! Tests that a command interrupts the balloon between two system calls without losing a request or counting one twice.

use super::rig::{DEFLATE, FREE_PFN, INFLATE, PAGE, REPORTING, Rig, pfns};
use crate::reclaim::SkipReason;
use crate::testing::Segment;
use vm_memory::GuestAddress;

/// Pages of one chain: the maximum.
const PAGES: u64 = 4096;
const CHAINS: usize = 3;

/// Every second page, so that none can be discarded together with another.
fn scattered() -> Vec<u64> {
    (0..PAGES).map(|page| FREE_PFN + 2 * page).collect()
}

/// Sends a command while scattered pages are discarded. The rig's engine discards one range per call.
fn interrupt(rig: &mut Rig, queue: u16, look: u64) {
    rig.harness.turn.call_after(look);
    rig.harness.kick(queue).unwrap();
    let in_spite = rig.harness.turn.done_in_spite();
    assert!(in_spite.chains == 0 && in_spite.calls <= 1, "{in_spite:?}");
    rig.harness.turn.set_called(false);
}

#[test]
fn inflation_that_a_command_interrupts_is_done_in_full_and_counted_once() {
    for look in [0, 1, 2, 3, 100, PAGES + 10] {
        let mut rig = Rig::new();
        rig.dirty(FREE_PFN, 2 * PAGES);
        let list = pfns(scattered());
        for _ in 0..CHAINS {
            rig.harness.queue(INFLATE).push(&[Segment::Readable(&list)]);
        }
        interrupt(&mut rig, INFLATE, look);
        let answered = rig.harness.queue(INFLATE).used_idx();
        assert!(answered <= 1, "{answered} chains before the command");
        assert_eq!(rig.snapshot().inflate.chains, u64::from(answered));

        rig.harness.kick(INFLATE).unwrap();
        assert_eq!(usize::from(rig.harness.queue(INFLATE).used_idx()), CHAINS);
        assert_eq!(rig.gone(FREE_PFN, 2 * PAGES), scattered());
        let inflate = rig.snapshot().inflate;
        assert_eq!(inflate.requested.bytes, CHAINS as u64 * PAGES * PAGE);
        assert_eq!(
            inflate.requested.bytes,
            inflate.discarded.bytes + inflate.skipped.get(SkipReason::Duplicate)
        );
        let most = rig.harness.turn.most_between_looks();
        assert!(most.chains <= 1 && most.calls <= 1, "{most:?}");
    }
}

#[test]
fn faults_of_a_chain_that_is_served_again_are_counted_once() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 8);
    let page = |page: u64| {
        let start = GuestAddress((FREE_PFN + page) * PAGE);
        Segment::WritableAt(start, PAGE as u32)
    };
    let readable = Segment::ReadableAt(GuestAddress((FREE_PFN + 6) * PAGE), PAGE as u32);
    let report = [readable, page(0), page(2), page(4)];
    rig.harness.queue(REPORTING).push(&report);
    // Before the chain, then before its second range.
    interrupt(&mut rig, REPORTING, 1);
    assert_eq!(rig.harness.queue(REPORTING).used_idx(), 0);
    assert_eq!(rig.snapshot().faults.descriptors_wrong_direction, 0);
    rig.harness.kick(REPORTING).unwrap();
    assert_eq!(rig.harness.queue(REPORTING).used_idx(), 1);
    assert_eq!(rig.snapshot().faults.descriptors_wrong_direction, 1);
    assert_eq!(rig.snapshot().report.discarded.bytes, 3 * PAGE);
    assert_eq!(rig.gone(FREE_PFN, 8), [0, 2, 4].map(|page| FREE_PFN + page));
}

#[test]
fn deflation_is_not_answered_before_an_inflation_that_a_command_interrupts() {
    let mut rig = Rig::new();
    rig.dirty(FREE_PFN, 2 * PAGES);
    let list = pfns(scattered());
    rig.harness.queue(INFLATE).push(&[Segment::Readable(&list)]);
    rig.harness.queue(DEFLATE).push(&[Segment::Readable(&list)]);
    interrupt(&mut rig, DEFLATE, 10);
    assert_eq!(rig.harness.queue(INFLATE).used_idx(), 0);
    assert_eq!(rig.harness.queue(DEFLATE).used_idx(), 0);
    // The queue has signalled its doorbell.
    rig.harness.kick(DEFLATE).unwrap();
    assert_eq!(rig.harness.queue(INFLATE).used_idx(), 1);
    assert_eq!(rig.harness.queue(DEFLATE).used_idx(), 1);
}
