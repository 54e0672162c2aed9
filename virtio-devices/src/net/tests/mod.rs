//! Tests a network device with a mock driver. A datagram socket replaces the tap: it also preserves frame boundaries,
//! truncates frames that do not fit, and rejects writes when full.

mod announce;
mod control;
mod hostile;
mod limits;
mod real_tap;
mod traffic;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Instant;

use super::frame_io::HEADER_BYTES;
use super::tap::Tap;
use super::{Backend, Net, NetError, NetLimiters, NetParams};
use crate::testing::{Chain, DEADLINE, HandlerHarness, Segment, Used};
use crate::{QueueHandler, VirtioDevice};

pub(super) const RX: u16 = 0;
pub(super) const TX: u16 = 1;
pub(super) const MRG_RXBUF: u64 = 1 << 15;

pub(super) fn params(num_queues: u16) -> NetParams {
    NetParams {
        id: "_net0".into(),
        backend: Backend::Fds(Vec::new()),
        mac: [0x52, 0x54, 0, 1, 2, 3],
        mtu: None,
        num_queues,
        queue_size: 64,
        offload_tso: true,
        offload_ufo: true,
        offload_csum: true,
        limiters: NetLimiters::default(),
    }
}

/// One active pair, and the far end of its tap.
pub(super) struct Rig {
    pub(super) net: Net,
    pub(super) harness: HandlerHarness<Box<dyn QueueHandler>>,
    pub(super) far: UnixDatagram,
}

impl Rig {
    /// Accepts all offered features except mergeable buffers, plus `features`.
    pub(super) fn new(features: u64) -> Self {
        Self::with_params(features, &params(2))
    }

    pub(super) fn with_params(features: u64, params: &NetParams) -> Self {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        let tap = Tap::untested(OwnedFd::from(near));
        let mut net = Net::with_taps(params, vec![tap]).unwrap();
        let features = net.features() & !MRG_RXBUF & !(1 << 29) | features;
        let handler = net.take_handlers().remove(0);
        let mut harness = HandlerHarness::new(handler, features);
        harness.add_queues(2);
        harness.activate().unwrap();
        Self { net, harness, far }
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        self.net.counters()[name]
    }

    /// Makes a buffer available for receiving.
    pub(super) fn offer(&mut self, bytes: u32) -> Chain {
        let chain = self.harness.queue(RX).push(&[Segment::Writable(bytes)]);
        self.harness.kick(RX).expect("device continues");
        chain
    }

    /// Simulates the arrival of a frame from outside, `bytes` long without its header.
    pub(super) fn arrive(&self, bytes: usize, fill: u8) {
        let mut frame = vec![0; HEADER_BYTES];
        frame.resize(HEADER_BYTES + bytes, fill);
        self.far.send(&frame).expect("socket has room");
    }

    /// Serves the device until a chain of `queue` is completed.
    pub(super) fn wait_used(&mut self, queue: u16) -> Used {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(used) = self.harness.queue(queue).pop_used() {
                return used;
            }
            assert!(Instant::now() < end, "no answer before the deadline");
            self.harness.serve_sources(100).expect("device continues");
        }
    }

    /// Serves until the device is idle.
    pub(super) fn settle(&mut self) {
        while self.harness.serve_sources(0).expect("device continues") > 0 {}
    }

    /// Returns the frame that arrives at the far end.
    pub(super) fn leave(&self) -> Vec<u8> {
        let mut frame = vec![0; 1 << 17];
        let bytes = self.far.recv(&mut frame).expect("a frame has left");
        frame.truncate(bytes);
        frame
    }
}

/// A frame with a header of zeroes, as a guest without offloads sends it.
pub(super) fn outgoing(bytes: usize, fill: u8) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.resize(HEADER_BYTES + bytes, fill);
    frame
}

#[test]
fn control_queue_follows_the_pairs_the_driver_knows_of() {
    let taps = (0..3)
        .map(|_| Tap::untested(UnixDatagram::unbound().unwrap().into()))
        .collect();
    let net = Net::with_taps(&params(6), taps).unwrap();
    assert_eq!(net.queue_sizes().len(), 7);
    let (control, multi) = (1 << 17, 1 << 22);
    let all = |features| -> Vec<Option<usize>> {
        (0..8)
            .map(|index| net.handler_of_queue(index, features))
            .collect()
    };
    let (a, b, c, ctrl) = (Some(0), Some(1), Some(2), Some(3));
    assert_eq!(all(control | multi), [a, a, b, b, c, c, ctrl, None]);
    assert_eq!(all(control), [a, a, ctrl, None, None, None, None, None]);
    assert_eq!(all(multi), [a, a, None, None, None, None, None, None]);
    assert_eq!(all(0), [a, a, None, None, None, None, None, None]);
}

#[test]
fn config_space_holds_mac_pairs_and_mtu() {
    let tap = Tap::untested(UnixDatagram::unbound().unwrap().into());
    let mut with_mtu = params(2);
    with_mtu.mtu = Some(1400);
    let mut net = Net::with_taps(&with_mtu, vec![tap]).unwrap();
    let mut space = [0xff; 14];
    net.read_config(0, &mut space);
    assert_eq!(space[..6], [0x52, 0x54, 0, 1, 2, 3]);
    assert_eq!(space[8..10], 1u16.to_le_bytes());
    assert_eq!(space[10..12], 1400u16.to_le_bytes());
    assert_eq!(space[12..], [0, 0]);
    assert_ne!(net.features() & (1 << 3), 0);
    net.write_config(0, &[1]);
    assert_eq!(net.counters()["bad_requests"], 1);
}

#[test]
fn offload_switches_take_feature_bits_away() {
    let bits = |tso, ufo, csum| {
        let mut params = params(2);
        (params.offload_tso, params.offload_ufo, params.offload_csum) = (tso, ufo, csum);
        let tap = Tap::untested(UnixDatagram::unbound().unwrap().into());
        Net::with_taps(&params, vec![tap]).unwrap().features()
    };
    let (csum, tso, ufo) = (
        0b11u64 | 1 << 2,
        (0b111u64 << 7) | (0b111 << 11),
        1u64 << 10 | 1 << 14,
    );
    let all = bits(true, true, true);
    assert_eq!(all & (csum | tso | ufo), csum | tso | ufo);
    assert_eq!(bits(false, true, true), all & !tso);
    assert_eq!(bits(true, false, true), all & !ufo);
    assert_eq!(bits(true, true, false), all & !(csum | tso | ufo));
}

#[test]
fn numbers_out_of_range_are_refused() {
    let refused = |change: &dyn Fn(&mut NetParams)| {
        let mut params = params(2);
        change(&mut params);
        Net::new(params).expect_err("must be refused")
    };
    for num_queues in [0, 1, 3, 514] {
        let error = refused(&|params| params.num_queues = num_queues);
        assert!(matches!(error, NetError::QueueCount { .. }));
    }
    for queue_size in [0, 2, 100, 2048] {
        let error = refused(&|params| params.queue_size = queue_size);
        assert!(matches!(error, NetError::QueueSize { .. }));
    }
    let error = refused(&|params| params.mtu = Some(67));
    assert!(matches!(error, NetError::Mtu { mtu: 67 }));
    let error = refused(&|params| params.mac = [1, 0, 0, 0, 0, 0]);
    assert!(matches!(error, NetError::MulticastMac));
    let error = refused(&|_| ());
    assert!(matches!(error, NetError::FdCount { fds: 0, .. }));
}

#[test]
fn net_conforms() {
    use std::sync::{Arc, Mutex};
    for pairs in [1, 2] {
        crate::testing::conformance(&format!("net-{pairs}"), |_| {
            // The far ends are closed: the tap fails each time, without a busy loop.
            let taps = (0..pairs)
                .map(|_| Tap::untested(UnixDatagram::unbound().unwrap().into()))
                .inspect(|tap| crate::net::tap_sys::set_nonblocking(tap.file()).unwrap())
                .collect();
            let net = Net::with_taps(&params(2 * pairs), taps).unwrap();
            Arc::new(Mutex::new(net))
        });
    }
}
