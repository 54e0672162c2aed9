//! Tests of the control queue.

use super::*;

const CTRL: u16 = 2;

struct Control {
    net: Net,
    harness: HandlerHarness<Box<dyn QueueHandler>>,
}

impl Control {
    /// A driver that supports three pairs, on descriptors that are not taps.
    fn new() -> Self {
        let taps = (0..3)
            .map(|_| Tap::untested(UnixDatagram::unbound().unwrap().into()))
            .collect();
        let mut net = Net::with_taps(&params(6), taps).unwrap();
        let handler = net.take_handlers().pop().expect("control comes last");
        let mut harness = HandlerHarness::new(handler, net.features() & !(1 << 29));
        harness.add_queue(CTRL, 64);
        harness.activate().unwrap();
        Self { net, harness }
    }

    fn command(&mut self, command: &[u8]) -> u8 {
        let segments = [Segment::Readable(command), Segment::Writable(1)];
        let (chain, used) = self.harness.request(CTRL, &segments).unwrap();
        assert_eq!(used.expect("answered at once").len, 1);
        self.harness.queue(CTRL).read_buffer(chain.buffers[1])[0]
    }
}

#[test]
fn number_of_pairs_is_taken_within_bounds() {
    let mut control = Control::new();
    for (pairs, status) in [(1u16, 0), (3, 0), (2, 0), (0, 1), (4, 1), (u16::MAX, 1)] {
        let [low, high] = pairs.to_le_bytes();
        assert_eq!(control.command(&[4, 0, low, high]), status, "{pairs} pairs");
    }
    assert_eq!(control.net.counters()["bad_requests"], 3);
}

#[test]
fn commands_that_make_no_sense_are_answered_with_an_error() {
    let mut control = Control::new();
    let offloads_not_negotiated = [5, 0, 0, 0, 0, 0, 0, 0, 0, 0x80];
    let commands: [&[u8]; 8] = [
        &[],
        &[4],
        &[4, 0],
        &[4, 0, 1],
        &[4, 1, 1, 0],
        &[0, 0, 1],
        &offloads_not_negotiated,
        &[5; 4096],
    ];
    for command in commands {
        assert_eq!(control.command(command), 1);
    }
    assert_eq!(control.net.counters()["bad_requests"], 8);
}

#[test]
fn command_without_room_for_an_answer_is_returned() {
    let mut control = Control::new();
    let (_, used) = control
        .harness
        .request(CTRL, &[Segment::Readable(&[4, 0, 1, 0])])
        .unwrap();
    assert_eq!(used.expect("answered at once").len, 0);
    assert_eq!(control.net.counters()["bad_requests"], 1);
}
