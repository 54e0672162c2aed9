//! Tests on real taps, each in a separate network namespace.

#![allow(unsafe_code)]
// UNSAFETY: `unshare`, for a namespace that vanishes with the test's thread, and an ioctl that queries the kernel's
// settings of a tap.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::*;
use crate::net::TapError;

const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const HOST_MAC: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];

/// Runs a test if it may create taps; otherwise skips it.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let outcome = std::thread::spawn(|| {
        // SAFETY: takes a number; changes the namespace of this thread only.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err("no right to make a network namespace");
        }
        if !std::path::Path::new("/dev/net/tun").exists() {
            return Err("no /dev/net/tun");
        }
        test();
        Ok(())
    });
    if let Err(why) = outcome.join().expect("the test passes") {
        test_skip::skip(why);
    }
}

fn tap_params(name: Option<&str>, num_queues: u16) -> NetParams {
    NetParams {
        backend: Backend::Tap {
            name: name.map(Into::into),
            ip: Some((HOST, MASK)),
            host_mac: Some(HOST_MAC),
        },
        mtu: Some(1400),
        ..params(num_queues)
    }
}

/// Whether this thread's namespace has such an interface.
fn exists(name: &str) -> bool {
    std::fs::read_to_string("/proc/thread-self/net/dev")
        .unwrap()
        .lines()
        .any(|line| line.trim_start().starts_with(&format!("{name}:")))
}

#[test]
fn tap_is_made_named_and_gone_with_the_device() {
    in_namespace(|| {
        let net = Net::new(tap_params(Some("mytap"), 2)).unwrap();
        assert_eq!(net.tap_name(), "mytap");
        assert!(exists("mytap"));
        drop(net);
        assert!(!exists("mytap"));
        let net = Net::new(tap_params(None, 4)).unwrap();
        assert_eq!(net.tap_name(), "vmtap0");
    });
}

#[test]
fn tap_in_use_is_busy_and_left_alone() {
    in_namespace(|| {
        let _net = Net::new(tap_params(Some("mytap"), 2)).unwrap();
        let error = Net::new(tap_params(Some("mytap"), 2)).unwrap_err();
        assert!(
            matches!(error, NetError::Tap(TapError::Busy { .. })),
            "{error:?}"
        );
        assert!(exists("mytap"));
    });
}

#[test]
fn failed_setting_leaves_no_tap_behind() {
    in_namespace(|| {
        let mut params = tap_params(Some("mytap"), 2);
        let mask = Ipv4Addr::new(255, 0, 255, 0);
        params.backend = Backend::Tap {
            name: Some("mytap".into()),
            ip: Some((HOST, mask)),
            host_mac: None,
        };
        let error = Net::new(params).unwrap_err();
        assert!(
            matches!(
                error,
                NetError::Tap(TapError::Configure {
                    what: "netmask",
                    ..
                })
            ),
            "{error:?}"
        );
        assert!(!exists("mytap"));
    });
}

#[test]
fn names_that_are_none_are_refused() {
    for name in ["", "a-name-of-16-byt", "a/b", "a b", "tap%d", "."] {
        let error = Net::new(tap_params(Some(name), 2)).unwrap_err();
        assert!(
            matches!(error, NetError::Tap(TapError::Name { .. })),
            "{name}: {error:?}"
        );
    }
}

#[test]
fn interface_that_is_no_tap_is_unsuitable() {
    in_namespace(|| {
        let error = Net::new(tap_params(Some("lo"), 2)).unwrap_err();
        assert!(
            matches!(error, NetError::Tap(TapError::Unsuitable { .. })),
            "{error:?}"
        );
    });
}

#[test]
fn descriptors_are_taken_over_only_from_taps() {
    in_namespace(|| {
        let with_fd = |fd: OwnedFd| NetParams {
            backend: Backend::Fds(vec![fd]),
            ..params(2)
        };
        let error = Net::new(with_fd(
            std::io::stdin().as_fd().try_clone_to_owned().unwrap(),
        ));
        assert!(matches!(
            error.unwrap_err(),
            NetError::Tap(TapError::NotATap { .. })
        ));
        let taps = Tap::open(Some("given"), 1, Default::default()).unwrap();
        let fd = {
            use std::os::fd::{AsRawFd, BorrowedFd};
            // SAFETY: the tap is open for the rest of this test.
            unsafe { BorrowedFd::borrow_raw(taps[0].as_raw_fd()) }
                .try_clone_to_owned()
                .unwrap()
        };
        let net = Net::new(with_fd(fd)).unwrap();
        assert_eq!(net.tap_name(), "given");
        drop(net);
        assert!(exists("given"), "the caller's own descriptor keeps it");
    });
}

/// The guest side of a conversation: one receive buffer, refilled after each frame.
struct Guest {
    net: Net,
    harness: HandlerHarness<Box<dyn QueueHandler>>,
    buffers: std::collections::HashMap<u32, Chain>,
}

impl Guest {
    fn new(mut net: Net) -> Self {
        let features = net.features() & !(1 << 29);
        let handler = net.take_handlers().remove(0);
        let mut harness = HandlerHarness::new(handler, features);
        harness.add_queues(2);
        harness.activate().unwrap();
        let mut guest = Self {
            net,
            harness,
            buffers: Default::default(),
        };
        for _ in 0..32 {
            guest.refill();
        }
        guest
    }

    fn refill(&mut self) {
        let chain = self.harness.queue(RX).push(&[Segment::Writable(2048)]);
        self.buffers.insert(u32::from(chain.head), chain);
        self.harness.kick(RX).unwrap();
    }

    /// Receives frames until one has this EtherType; returns it without the header.
    fn receive(&mut self, ether_type: u16) -> Vec<u8> {
        let end = Instant::now() + DEADLINE;
        loop {
            assert!(Instant::now() < end, "no such frame before the deadline");
            while let Some(used) = self.harness.queue(RX).pop_used() {
                let chain = self.buffers.remove(&used.head).unwrap();
                let mut frame = self.harness.queue(RX).read_buffer(chain.buffers[0]);
                frame.truncate(used.len as usize);
                self.refill();
                if frame[24..26] == ether_type.to_be_bytes() {
                    return frame.split_off(HEADER_BYTES);
                }
            }
            self.harness.serve_sources(100).unwrap();
        }
    }

    fn send(&mut self, frame: &[u8]) {
        let mut all = vec![0; HEADER_BYTES];
        all.extend(frame);
        let sent = self.harness.request(TX, &[Segment::Readable(&all)]);
        assert!(sent.unwrap().1.is_some());
    }
}

#[test]
fn host_and_guest_exchange_arp_and_udp() {
    in_namespace(|| {
        let mut guest = Guest::new(Net::new(tap_params(None, 2)).unwrap());
        let socket = UdpSocket::bind((HOST, 7777)).unwrap();
        socket.send_to(b"hello guest", (GUEST, 9)).unwrap();

        let request = guest.receive(0x0806);
        assert_eq!(request[6..12], HOST_MAC);
        assert_eq!(request[38..42], GUEST.octets());
        let mac = params(2).mac;
        let mut reply = Vec::new();
        reply.extend(HOST_MAC);
        reply.extend(mac);
        reply.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        reply.extend(mac);
        reply.extend(GUEST.octets());
        reply.extend(HOST_MAC);
        reply.extend(HOST.octets());
        guest.send(&reply);

        loop {
            let packet = guest.receive(0x0800);
            if packet.ends_with(b"hello guest") {
                assert_eq!(packet[..6], mac);
                break;
            }
        }
        assert!(guest.net.counters()["rx_frames"] >= 2);
        assert_eq!(guest.net.counters()["tx_frames"], 1);
        assert_eq!(guest.net.counters()["tap_errors"], 0);
    });
}

#[test]
fn frame_with_nonsense_in_its_header_is_dropped() {
    in_namespace(|| {
        let mut guest = Guest::new(Net::new(tap_params(None, 2)).unwrap());
        let mut frame = vec![0xff; HEADER_BYTES];
        frame.extend([0xee; 60]);
        let sent = guest.harness.request(TX, &[Segment::Readable(&frame)]);
        assert!(sent.unwrap().1.is_some());
        assert_eq!(guest.net.counters()["tx_drops"], 1);
    });
}

/// Whether the kernel sends this tap segments longer than its MTU.
fn sends_long_segments(name: &str) -> bool {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    const ETHTOOL_GTSO: u32 = 0x1e;
    let mut value = [ETHTOOL_GTSO, 0];
    // SAFETY: `ifreq` is plain data, for which all zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    // SAFETY: reads the command from `value` and writes the answer behind it.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    value[1] != 0
}

#[test]
fn offloads_of_one_driver_end_with_it() {
    in_namespace(|| {
        let mut net = Net::new(tap_params(None, 2)).unwrap();
        let name = net.tap_name().to_owned();
        assert!(!sends_long_segments(&name));
        let control = net.take_handlers().pop().unwrap();
        let mut harness = HandlerHarness::new(control, net.features());
        harness.add_queue(2, 16);
        harness.activate().unwrap();
        assert!(sends_long_segments(&name));
        harness.reset();
        assert!(!sends_long_segments(&name));
    });
}

#[test]
fn pairs_are_switched_on_and_off_on_a_multi_queue_tap() {
    in_namespace(|| {
        let mut net = Net::new(tap_params(None, 8)).unwrap();
        let control = net.take_handlers().pop().unwrap();
        let mut harness = HandlerHarness::new(control, net.features() & !(1 << 29));
        harness.add_queue(8, 16);
        harness.activate().unwrap();
        let mut command = |command: &[u8]| {
            let segments = [Segment::Readable(command), Segment::Writable(1)];
            let (chain, _) = harness.request(8, &segments).unwrap();
            harness.queue(8).read_buffer(chain.buffers[1])[0]
        };
        for pairs in [4, 2, 3, 1] {
            assert_eq!(command(&[4, 0, pairs, 0]), 0);
        }
        // Checksums and TSO4, then nothing.
        assert_eq!(command(&[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0]), 0);
        assert_eq!(command(&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
        assert_eq!(net.counters()["tap_errors"], 0);
        assert_eq!(net.counters()["bad_requests"], 0);
    });
}
