//! Tests the announcements of a restored interface.

use super::*;

/// A device with an active driver, restored from `state` if there is one, and the far end of its tap.
fn started(state: Option<&state::Saved>) -> Rig {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    let tap = Tap::untested(OwnedFd::from(near));
    let mut net = Net::with_taps(&params(2), vec![tap]).unwrap();
    if let Some(state) = state {
        net.restore(state).unwrap();
    }
    let features = net.features() & !(1 << 29);
    let mut harness = HandlerHarness::new(net.take_handlers().remove(0), features);
    harness.add_queues(2);
    Rig { net, harness, far }
}

fn is_silent(rig: &Rig) -> bool {
    rig.far.recv(&mut [0]).is_err()
}

#[test]
fn restored_interface_announces_its_address_once_its_driver_is_active() {
    let saved = started(None).net.state();
    let mut rig = started(Some(&saved));
    assert!(is_silent(&rig));
    rig.harness.activate().unwrap();
    let mac = params(2).mac;
    let end = Instant::now() + DEADLINE;
    for round in 0..5 {
        while round > 0 && rig.harness.serve_sources(100).expect("device continues") == 0 {
            assert!(Instant::now() < end, "no announcement {round}");
        }
        let frame = rig.leave();
        assert_eq!(frame.len(), HEADER_BYTES + 60);
        let (header, frame) = frame.split_at(HEADER_BYTES);
        assert_eq!(header, [0; HEADER_BYTES]);
        let (to, from) = (&frame[..6], &frame[6..12]);
        assert_eq!((to, from), (&[0xff; 6][..], &mac[..]));
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac[..], &mac[..]));
    }
    assert_eq!(rig.harness.serve_sources(300).unwrap(), 0);
    assert!(is_silent(&rig));
}

#[test]
fn new_interface_and_one_that_is_reset_announce_nothing() {
    let mut rig = started(None);
    rig.harness.activate().unwrap();
    rig.settle();
    assert!(is_silent(&rig));
    let mut rig = started(Some(&rig.net.state()));
    rig.harness.activate().unwrap();
    rig.leave();
    rig.harness.reset();
    rig.harness.add_queues(2);
    rig.harness.activate().unwrap();
    assert_eq!(rig.harness.serve_sources(300).unwrap(), 0);
    assert!(is_silent(&rig));
}
