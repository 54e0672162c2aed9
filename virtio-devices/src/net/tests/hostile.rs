//! Tests of misbehaving guests. After any invalid input the next valid frame passes, and the invalid input has been
//! counted.

use super::*;
use crate::WorkerError;
use crate::testing::{Desc, NEXT, WRITE};

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

const OUT_OF_RAM: u64 = 1 << 40;

/// Offers a raw chain on `queue` and checks that it is returned unused and counted, and that valid frames pass
/// afterwards.
fn survive(queue: u16, descs: &[Desc]) {
    for features in [0, MRG_RXBUF] {
        let mut rig = Rig::new(features);
        let head = rig.harness.queue(queue).push_raw(descs);
        rig.harness.kick(queue).expect("device continues");
        let used = rig.wait_used(queue);
        assert_eq!((used.head, used.len), (u32::from(head), 0));
        assert_eq!(rig.counter("bad_requests"), 1);

        let frame = outgoing(60, 1);
        let sent = rig.harness.request(TX, &[Segment::Readable(&frame)]);
        assert!(sent.unwrap().1.is_some());
        assert_eq!(rig.leave(), frame);
        rig.offer(1600);
        rig.arrive(60, 2);
        assert_eq!(rig.wait_used(RX).len, 72);
    }
}

#[test]
fn receive_buffer_that_is_no_buffer_is_returned() {
    survive(RX, &[desc(OUT_OF_RAM, 1600, WRITE, 0)]);
    survive(RX, &[desc(0x2000, 1600, 0, 0)]);
    survive(RX, &[desc(0x2000, 11, WRITE, 0)]);
    survive(RX, &[desc(0x2000, 0, WRITE, 0)]);
    survive(RX, &[desc(0x2000, 100, WRITE | NEXT, 0)]);
    survive(
        RX,
        &[desc(0x2000, 16, NEXT, 1), desc(0x3000, 1600, WRITE, 0)],
    );
    survive(RX, &[desc(0, u32::MAX, WRITE, 0)]);
}

#[test]
fn sent_chain_that_is_no_frame_is_returned() {
    survive(TX, &[desc(OUT_OF_RAM, 100, 0, 0)]);
    survive(TX, &[desc(0x2000, 100, WRITE, 0)]);
    survive(TX, &[desc(0x2000, 12, 0, 0)]);
    survive(TX, &[desc(0x2000, 0, 0, 0)]);
    survive(TX, &[desc(0x2000, 1 << 20, 0, 0)]);
    survive(TX, &[desc(0x2000, 100, NEXT, 0)]);
    survive(
        TX,
        &[desc(0x2000, 100, NEXT, 1), desc(0x3000, 100, WRITE, 0)],
    );
}

#[test]
fn bad_buffer_among_good_ones_keeps_their_order() {
    let mut rig = Rig::new(MRG_RXBUF);
    let first = rig.offer(100).head;
    let bad = rig
        .harness
        .queue(RX)
        .push_raw(&[desc(OUT_OF_RAM, 100, WRITE, 0)]);
    let last = rig.offer(100).head;
    rig.arrive(10, 1);
    rig.arrive(10, 2);
    let heads: Vec<u32> = (0..3).map(|_| rig.wait_used(RX).head).collect();
    assert_eq!(heads, [first, bad, last].map(u32::from));
    // The same holds if a pause puts the chains back in between.
    let mut rig = Rig::new(MRG_RXBUF);
    let first = rig.offer(100).head;
    rig.harness
        .queue(RX)
        .push_raw(&[desc(OUT_OF_RAM, 100, WRITE, 0)]);
    let last = rig.offer(100).head;
    rig.harness.handler.pause();
    rig.harness.kick(RX).unwrap();
    rig.arrive(10, 1);
    rig.arrive(10, 2);
    assert_eq!(rig.wait_used(RX).head, u32::from(first));
    rig.wait_used(RX);
    assert_eq!(rig.wait_used(RX).head, u32::from(last));
}

#[test]
fn ring_full_of_bad_heads_is_bounded() {
    for queue in [RX, TX] {
        let mut rig = Rig::new(MRG_RXBUF);
        for _ in 0..64 {
            rig.harness.queue(queue).offer(u16::MAX);
        }
        rig.harness.kick(queue).expect("device continues");
        rig.settle();
        assert_eq!(rig.counter("bad_requests"), 64);
    }
}

#[test]
fn available_index_too_far_ahead_stops_the_device() {
    for queue in [RX, TX] {
        let mut rig = Rig::new(0);
        rig.harness.queue(queue).set_avail_idx(65);
        let error = rig.harness.kick(queue).unwrap_err();
        assert!(matches!(error, WorkerError::Queue { index, .. } if index == queue));
    }
}

#[test]
fn frames_the_tap_refuses_are_dropped_and_counted() {
    let mut rig = Rig::new(0);
    let (_, elsewhere) = UnixDatagram::pair().unwrap();
    rig.far = elsewhere;
    let frame = outgoing(60, 1);
    let sent = rig.harness.request(TX, &[Segment::Readable(&frame)]);
    assert!(sent.unwrap().1.is_some());
    assert_eq!(rig.counter("tx_drops"), 1);
}
