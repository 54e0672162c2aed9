//! Tests of frames in both directions.

use super::*;

#[test]
fn sent_frame_leaves_with_its_header() {
    let mut rig = Rig::new(0);
    let frame = outgoing(100, 7);
    let (head, tail) = frame.split_at(5);
    let segments = [Segment::Readable(head), Segment::Readable(tail)];
    let (chain, used) = rig.harness.request(TX, &segments).unwrap();
    assert_eq!(used.expect("sent at once").head, u32::from(chain.head));
    assert_eq!(rig.leave(), frame);
    assert_eq!(rig.counter("tx_frames"), 1);
    assert_eq!(rig.counter("tx_bytes"), 100);
    assert_eq!(rig.harness.interrupt.queue_signals(TX), 1);
}

#[test]
fn arrived_frame_fills_one_buffer() {
    let mut rig = Rig::new(0);
    let chain = rig.offer(1600);
    rig.offer(1600);
    rig.arrive(100, 9);
    let used = rig.wait_used(RX);
    assert_eq!((used.head, used.len), (u32::from(chain.head), 112));
    let data = rig.harness.queue(RX).read_buffer(chain.buffers[0]);
    assert_eq!(data[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(data[12..112], [9; 100]);
    assert_eq!(rig.counter("rx_frames"), 1);
    assert_eq!(rig.counter("rx_bytes"), 100);
    assert!(rig.harness.queue(RX).pop_used().is_none());
}

#[test]
fn long_frame_is_merged_over_several_buffers() {
    let mut rig = Rig::new(MRG_RXBUF);
    let chains: Vec<Chain> = (0..8).map(|_| rig.offer(100)).collect();
    rig.arrive(250, 3);
    rig.arrive(20, 4);
    let lens: Vec<u32> = (0..4).map(|_| rig.wait_used(RX).len).collect();
    assert_eq!(lens, [100, 100, 62, 32]);
    let read = |rig: &mut Rig, at: usize| rig.harness.queue(RX).read_buffer(chains[at].buffers[0]);
    let first = read(&mut rig, 0);
    assert_eq!(first[10..12], 3u16.to_le_bytes());
    assert_eq!(first[12..], [3; 88]);
    assert_eq!(read(&mut rig, 2)[..62], [3; 62]);
    let second = read(&mut rig, 3);
    assert_eq!(second[10..12], 1u16.to_le_bytes());
    assert_eq!(second[12..32], [4; 20]);
    assert_eq!(rig.counter("rx_frames"), 2);
}

#[test]
fn frame_of_64_kib_fits_mergeable_and_big_buffers() {
    let mut rig = Rig::new(MRG_RXBUF);
    for _ in 0..48 {
        rig.offer(1536);
    }
    rig.arrive(65_000, 5);
    let mut bytes = rig.wait_used(RX).len;
    while let Some(used) = rig.harness.queue(RX).pop_used() {
        bytes += used.len;
    }
    assert_eq!(bytes, 65_012);

    let mut rig = Rig::new(0);
    rig.offer(65_562);
    rig.arrive(65_000, 5);
    assert_eq!(rig.wait_used(RX).len, 65_012);
}

#[test]
fn frame_longer_than_its_buffer_is_dropped_and_counted() {
    let mut rig = Rig::new(0);
    rig.offer(112);
    rig.arrive(101, 1);
    rig.arrive(100, 2);
    let used = rig.wait_used(RX);
    assert_eq!(used.len, 112);
    assert_eq!(rig.counter("rx_drops"), 1);
    assert_eq!(rig.counter("rx_frames"), 1);
}

#[test]
fn frame_longer_than_all_buffers_waits_for_more_of_them() {
    let mut rig = Rig::new(MRG_RXBUF);
    let mut chains = vec![rig.offer(100), rig.offer(100)];
    rig.arrive(300, 6);
    rig.arrive(20, 7);
    rig.settle();
    assert!(rig.harness.queue(RX).pop_used().is_none());
    assert_eq!(
        rig.harness.serve_sources(20).unwrap(),
        0,
        "turns in circles"
    );
    // The buffer is put back for a pause; the frame still waits.
    rig.harness.handler.pause();
    chains.push(rig.offer(100));
    rig.settle();
    assert!(rig.harness.queue(RX).pop_used().is_none());
    chains.push(rig.offer(100));
    chains.push(rig.offer(100));
    let lens: Vec<u32> = (0..5).map(|_| rig.wait_used(RX).len).collect();
    assert_eq!(lens, [100, 100, 100, 12, 32]);
    let mut data = Vec::new();
    for chain in &chains[..4] {
        data.extend(rig.harness.queue(RX).read_buffer(chain.buffers[0]));
    }
    assert_eq!(data[10..12], 4u16.to_le_bytes());
    assert_eq!(data[12..312], [6; 300]);
    assert_eq!(rig.counter("rx_drops"), 0);
    assert_eq!(rig.counter("rx_frames"), 2);
}

#[test]
fn frame_longer_than_a_full_ring_is_dropped_and_counted() {
    let mut rig = Rig::new(MRG_RXBUF);
    rig.arrive(60_000, 6);
    rig.arrive(20, 7);
    // The ring has 64 entries.
    let chains: Vec<Chain> = (0..64).map(|_| rig.offer(100)).collect();
    let used = rig.wait_used(RX);
    assert_eq!((used.head, used.len), (u32::from(chains[0].head), 32));
    assert_eq!(rig.counter("rx_drops"), 1);
}

#[test]
fn frame_waits_without_waking_until_there_is_a_buffer() {
    let mut rig = Rig::new(0);
    rig.arrive(100, 1);
    rig.settle();
    // The frame is still there, and there is no busy loop.
    assert_eq!(rig.harness.serve_sources(20).unwrap(), 0);
    rig.offer(1600);
    assert_eq!(rig.wait_used(RX).len, 112);
}

#[test]
fn frames_wait_for_room_in_the_tap() {
    let mut rig = Rig::new(0);
    let frame = outgoing(1000, 1);
    let mut sent = 0;
    while !rig.counter_stalls(&frame) {
        sent += 1;
        assert!(sent < 10_000, "the socket never fills");
    }
    // Blocked: the last chain is not returned, and the worker is not woken until the tap accepts frames.
    assert_eq!(rig.harness.serve_sources(20).unwrap(), 0);
    let before = rig.counter("tx_frames");
    while rig.far.recv(&mut [0; 2048]).is_ok() {}
    rig.wait_used(TX);
    assert_eq!(rig.counter("tx_frames"), before + 1);
    assert_eq!(rig.counter("tx_drops"), 0);
    assert_eq!(rig.leave(), frame);
}

impl Rig {
    /// Sends a frame; true if it was not completed.
    fn counter_stalls(&mut self, frame: &[u8]) -> bool {
        let (_, used) = self
            .harness
            .request(TX, &[Segment::Readable(frame)])
            .expect("device continues");
        used.is_none()
    }
}

#[test]
fn pause_gives_buffers_taken_ahead_back() {
    let mut rig = Rig::new(MRG_RXBUF);
    let chains: Vec<Chain> = (0..4).map(|_| rig.offer(100)).collect();
    rig.arrive(10, 1);
    assert_eq!(rig.wait_used(RX).head, u32::from(chains[0].head));
    rig.harness.handler.pause();
    // As the worker does when it resumes.
    rig.harness.kick(RX).unwrap();
    for chain in &chains[1..] {
        rig.arrive(10, 2);
        assert_eq!(rig.wait_used(RX).head, u32::from(chain.head));
    }
}

#[test]
fn reset_forgets_buffers_and_serves_the_next_driver() {
    let mut rig = Rig::new(MRG_RXBUF);
    rig.offer(100);
    rig.offer(100);
    rig.harness.reset();
    rig.arrive(10, 1);
    rig.harness.activate().unwrap();
    let chain = rig.offer(100);
    assert_eq!(rig.wait_used(RX).head, u32::from(chain.head));
    assert_eq!(rig.counter("bad_requests"), 0);
}
