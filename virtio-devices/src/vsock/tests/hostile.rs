//! Tests that a guest which violates the protocol is contained and counted.

use super::super::CONNECTIONS_MAX;
use super::super::packet::SHUTDOWN_BOTH;
use super::*;

#[test]
fn packets_with_wrong_addresses_are_dropped() {
    let mut rig = Rig::new(4);
    let sound = packet(1024, 80, Op::Request);
    for header in [
        Header {
            src_cid: 4,
            ..sound
        },
        Header {
            dst_cid: 1,
            ..sound
        },
        Header {
            dst_cid: 1 << 32 | CID_HOST,
            ..sound
        },
    ] {
        rig.send(header, &[]);
    }
    rig.nothing_comes();
    assert_eq!(rig.counter("bad_packets"), 3);
}

#[test]
fn packets_of_no_connection_are_reset_and_resets_are_not_answered() {
    let mut rig = Rig::new(16);
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        rig.send(packet(1024, 80, op), &[]);
        rig.next_is(Op::Reset);
    }
    rig.send(packet(1024, 80, Op::Reset), &[]);
    rig.nothing_comes();
    for (socket_type, op) in [(2, Op::Request as u16), (TYPE_STREAM, 0), (TYPE_STREAM, 8)] {
        let odd = Header {
            socket_type,
            op,
            ..packet(1024, 80, Op::Request)
        };
        rig.send(odd, &[]);
        rig.next_is(Op::Reset);
    }
}

#[test]
fn packets_that_lie_about_their_length_are_dropped() {
    let mut rig = Rig::new(4);
    let (_stream, header) = rig.connect_to_guest(52);
    rig.send(Header { len: 5, ..header }, b"four");
    rig.send(
        Header {
            len: u32::MAX,
            ..header
        },
        b"four",
    );
    let short = [0; HEADER_BYTES - 1];
    rig.harness
        .request(TRANSMIT, &[Segment::Readable(&short)])
        .unwrap();
    rig.harness
        .request(TRANSMIT, &[Segment::Writable(64)])
        .unwrap();
    rig.nothing_comes();
    assert_eq!(rig.counter("bad_packets"), 4);
    assert_eq!(rig.counter("connections"), 1);
}

#[test]
fn packets_out_of_order_reset_the_connection() {
    type Break = fn(&mut Rig, Header);
    let breaks: [Break; 4] = [
        |rig, header| rig.send(of(header, Op::Request), &[]),
        |rig, header| rig.send(of(header, Op::Response), &[]),
        |rig, header| rig.send(Header { op: 77, ..header }, &[]),
        |rig, header| {
            let ended = Header {
                flags: super::super::packet::SHUTDOWN_SEND,
                ..of(header, Op::Shutdown)
            };
            rig.send(ended, &[]);
            rig.send(data_of(header, b"more"), b"more");
        },
    ];
    for (count, act) in (1..).zip(breaks) {
        let mut rig = Rig::new(8);
        let (mut stream, header) = rig.connect_to_guest(52);
        act(&mut rig, header);
        rig.next_is(Op::Reset);
        assert_eq!(rig.counter("connections"), 0, "{count}");
        assert_eq!(rig.counter("bad_packets"), 1, "{count}");
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn data_before_the_connection_is_open_resets_it() {
    let mut rig = Rig::new(8);
    let mut stream = rig.connect();
    stream.write_all(b"CONNECT 52\n").unwrap();
    let request = rig.next_is(Op::Request);
    rig.send(packet(52, request.src_port, Op::Data), &[]);
    rig.next_is(Op::Reset);
    // The host's program does not receive "OK".
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn data_beyond_the_credit_resets_the_connection_and_is_not_kept() {
    let mut rig = Rig::new(8);
    let (_stream, header) = rig.connect_to_guest(52);
    let chunk = vec![7; 64 << 10];
    // The host does not read. Its socket and the device's buffer accept a bounded amount.
    for _ in 0..64 {
        rig.send(data_of(header, &chunk), &chunk);
        while let Some((header, _)) = rig.poll() {
            rig.offer(1);
            if Op::from_repr(header.op) == Some(Op::Reset) {
                assert_eq!(rig.counter("connections"), 0);
                assert_eq!(rig.counter("bad_packets"), 1);
                return;
            }
        }
    }
    panic!("4 MiB were taken");
}

#[test]
fn receive_buffers_without_room_go_back() {
    let mut rig = Rig::new(0);
    for bytes in [1, HEADER_BYTES as u32 - 1, HEADER_BYTES as u32] {
        rig.harness.queue(RECEIVE).push(&[Segment::Writable(bytes)]);
    }
    rig.harness
        .queue(RECEIVE)
        .push(&[Segment::Readable(&[0; 64])]);
    rig.harness.kick(RECEIVE).unwrap();
    rig.send(packet(1024, 80, Op::Data), &[]);
    for _ in 0..4 {
        assert_eq!(rig.harness.queue(RECEIVE).pop_used().unwrap().len, 0);
    }
    rig.offer(1);
    rig.next_is(Op::Reset);
}

#[test]
fn resets_that_the_guest_does_not_take_are_bounded() {
    let mut rig = Rig::new(0);
    for _ in 0..3 * CONNECTIONS_MAX {
        rig.send(packet(1024, 80, Op::Data), &[]);
    }
    assert_eq!(rig.counter("resets_dropped"), CONNECTIONS_MAX as u64);
}

#[test]
fn connections_are_bounded_and_those_that_are_there_go_on() {
    let mut rig = Rig::new(8);
    let listener = rig.listen(80);
    listener.set_nonblocking(true).unwrap();
    let mut streams = Vec::new();
    for guest_port in 0..CONNECTIONS_MAX as u32 {
        rig.send(packet(guest_port, 80, Op::Request), &[]);
        rig.next_is(Op::Response);
        streams.push(listener.accept().unwrap().0);
        rig.offer(1);
    }
    rig.send(packet(5000, 80, Op::Request), &[]);
    rig.next_is(Op::Reset);
    assert!(listener.accept().is_err());
    let mut program = rig.connect();
    rig.nothing_comes();
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    assert_eq!(rig.counter("connections"), CONNECTIONS_MAX as u64);
    assert_eq!(rig.counter("connections_refused"), 2);
    // Closing one connection admits another.
    streams[0].write_all(b"x").unwrap();
    assert_eq!(rig.next().1, b"x");
    rig.send(packet(0, 80, Op::Reset), &[]);
    rig.send(packet(5000, 80, Op::Request), &[]);
    rig.offer(2);
    rig.next_is(Op::Response);
}

#[test]
fn command_waits_for_one_of_many_connections_without_packets() {
    const STREAMS: u32 = 40;
    let mut rig = Rig::new(0);
    let mut streams = Vec::new();
    for port in 0..STREAMS {
        rig.offer(1);
        streams.push(rig.connect_to_guest(1000 + port));
    }
    // There is no receive buffer, so each connection may still have a packet for the next one.
    for (_, header) in &streams {
        rig.send(of(*header, Op::CreditUpdate), &[]);
    }
    rig.offer(1);
    rig.nothing_comes();
    let most = rig.harness.turn.most_between_looks();
    assert!(most.calls <= 16, "{most:?}");
}

#[test]
fn host_socket_with_a_full_backlog_resets_and_does_not_wait() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
    const BACKLOG: u32 = 4;
    let mut rig = Rig::new(64);
    // No program accepts.
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let path = rig.folder.path().join("vsock_80");
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, BACKLOG as i32).unwrap();
    for guest_port in 0..=BACKLOG {
        rig.send(packet(guest_port, 80, Op::Request), &[]);
        rig.next_is(Op::Response);
    }
    rig.send(packet(9, 80, Op::Request), &[]);
    rig.next_is(Op::Reset);
}

#[test]
fn shutdown_of_a_connection_that_was_never_open_resets_it() {
    let mut rig = Rig::new(8);
    let mut stream = rig.connect();
    stream.write_all(b"CONNECT 52\n").unwrap();
    let request = rig.next_is(Op::Request);
    let shutdown = Header {
        flags: SHUTDOWN_BOTH,
        ..packet(52, request.src_port, Op::Shutdown)
    };
    rig.send(shutdown, &[]);
    rig.next_is(Op::Reset);
    assert_eq!(rig.counter("connections"), 0);
}

/// Runs in a separate process, because the limit of descriptors applies to the process.
#[test]
fn programs_wait_without_a_spin_while_descriptors_are_out() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    const CASE: &str = "VSOCK_TEST_WITHOUT_DESCRIPTORS";
    const TEST: &str =
        "vsock::tests::hostile::programs_wait_without_a_spin_while_descriptors_are_out";
    const WAKE_UPS: u64 = 1000;
    if std::env::var_os(CASE).is_none() {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture", "--test-threads=1"])
            .env(CASE, "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let mut rig = Rig::new(8);
    let mut program = rig.connect();
    program.write_all(b"CONNECT 52\n").unwrap();
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = Some(64);
    setrlimit(Resource::Nofile, limit).unwrap();
    let mut taken = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        taken.push(file);
    }
    for _ in 0..WAKE_UPS {
        rig.harness.serve_sources(0).unwrap();
    }
    let tried = rig.counter("connections_refused");
    assert!((1..WAKE_UPS / 2).contains(&tried), "{tried}");
    drop(taken);
    assert_eq!(rig.next_is(Op::Request).dst_port, 52);
}
