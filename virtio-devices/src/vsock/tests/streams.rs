//! Tests of connections between well-behaved guests and programs.

use std::net::Shutdown;

use super::super::connection::BUFFER_BYTES;
use super::super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;

/// Bytes that differ from their neighbours, also at a distance of 64 KiB.
fn pattern(count: usize) -> Vec<u8> {
    (0..count).map(|at| (at % 251) as u8).collect()
}

#[test]
fn host_program_reaches_a_port_of_the_guest_and_back() {
    let mut rig = Rig::new(8);
    let (mut stream, header) = rig.connect_to_guest(52);
    assert_eq!(header.dst_port, 1 << 30);
    rig.send(data_of(header, b"from the guest"), b"from the guest");
    assert_eq!(read_exactly(&mut stream, 14), b"from the guest");
    stream.write_all(b"from the host").unwrap();
    let (packet, data) = rig.next();
    assert_eq!(Op::from_repr(packet.op), Some(Op::Data));
    assert_eq!(data, b"from the host");
    // The guest's data has reached the host, and every packet reports it.
    assert_eq!((packet.buf_alloc, packet.fwd_cnt), (BUFFER_BYTES, 14));
    assert_eq!(rig.counter("connections"), 1);
    // The next connection has another port.
    let (_other, header) = rig.connect_to_guest(52);
    assert_eq!(header.dst_port, (1 << 30) + 1);
}

#[test]
fn what_follows_the_greeting_at_once_is_the_guests() {
    let mut rig = Rig::new(8);
    let mut stream = rig.connect();
    // In lower case, and with data in the same write.
    stream.write_all(b"connect 7\nhello").unwrap();
    let request = rig.next_is(Op::Request);
    rig.nothing_comes();
    rig.send(packet(7, request.src_port, Op::Response), &[]);
    assert_eq!(rig.next().1, b"hello");
}

#[test]
fn greeting_that_makes_no_sense_is_refused_without_a_packet() {
    let mut rig = Rig::new(8);
    for greeting in [
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "CONNECT 1 2\n",
        "GET / HTTP/1.1\r\n",
        "CONNECT 00000000000000000000000000000001\n",
        "\n",
    ] {
        let mut stream = rig.connect();
        stream.write_all(greeting.as_bytes()).unwrap();
        rig.nothing_comes();
        // The end of the stream, or a reset if part of the greeting was not read.
        assert!(!matches!(stream.read(&mut [0]), Ok(1)), "{greeting:?}");
    }
    assert_eq!(rig.counter("connections_refused"), 7);
    assert_eq!(rig.counter("connections_opened"), 0);
}

#[test]
fn port_that_no_guest_program_listens_on_closes_the_stream() {
    let mut rig = Rig::new(8);
    let mut stream = rig.connect();
    stream.write_all(b"CONNECT 52\n").unwrap();
    let request = rig.next_is(Op::Request);
    rig.send(packet(52, request.src_port, Op::Reset), &[]);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    rig.nothing_comes();
    assert_eq!(rig.counter("connections"), 0);
}

#[test]
fn guest_reaches_a_host_program_and_a_missing_one_resets() {
    let mut rig = Rig::new(8);
    let (mut stream, header) = rig.connect_to_host(1024, 80);
    rig.send(data_of(header, b"ping"), b"ping");
    assert_eq!(read_exactly(&mut stream, 4), b"ping");
    stream.write_all(b"pong").unwrap();
    assert_eq!(rig.next().1, b"pong");
    rig.send(packet(1025, 81, Op::Request), &[]);
    let reset = rig.next_is(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (81, 1025));
    assert_eq!(rig.counter("connections"), 1);
}

#[test]
fn many_streams_at_once_keep_their_bytes_apart() {
    const STREAMS: u32 = 100;
    let mut rig = Rig::new(60);
    let mut open = Vec::new();
    for port in 0..STREAMS {
        open.push(rig.connect_to_guest(1000 + port));
        rig.offer(1);
    }
    for (index, (stream, header)) in open.iter_mut().enumerate() {
        let text = format!("{index:08}");
        stream.write_all(text.as_bytes()).unwrap();
        rig.send(data_of(*header, text.as_bytes()), text.as_bytes());
    }
    for (index, (stream, _)) in open.iter_mut().enumerate() {
        assert_eq!(read_exactly(stream, 8), format!("{index:08}").as_bytes());
    }
    let mut seen = std::collections::BTreeMap::new();
    while seen.len() < STREAMS as usize {
        let (header, data) = rig.next();
        seen.insert(header.dst_port, String::from_utf8(data).unwrap());
        rig.offer(1);
    }
    for port in 0..STREAMS {
        assert_eq!(seen[&(1000 + port)], format!("{port:08}"));
    }
}

#[test]
fn host_sends_no_more_than_the_guest_has_room_for() {
    let mut rig = Rig::new(16);
    let (mut stream, header) = rig.connect_to_guest(52);
    let small = Header {
        buf_alloc: 1000,
        ..of(header, Op::CreditUpdate)
    };
    rig.send(small, &[]);
    let text = pattern(1500);
    stream.write_all(&text).unwrap();
    assert_eq!(rig.next().1, text[..1000]);
    // Credit is requested once, not repeatedly, nor again after a response without credit.
    rig.next_is(Op::CreditRequest);
    rig.nothing_comes();
    rig.send(small, &[]);
    rig.nothing_comes();
    // The count of read bytes wraps around and continues.
    rig.send(
        Header {
            fwd_cnt: 300,
            ..small
        },
        &[],
    );
    assert_eq!(rig.next().1, text[1000..1300]);
    rig.send(
        Header {
            fwd_cnt: 1300,
            ..small
        },
        &[],
    );
    let rest = loop {
        let (header, data) = rig.next();
        if Op::from_repr(header.op) == Some(Op::Data) {
            break data;
        }
    };
    assert_eq!(rest, text[1300..]);
}

#[test]
fn guest_is_told_of_room_once_the_host_reads() {
    let mut rig = Rig::new(32);
    let (mut stream, header) = rig.connect_to_guest(52);
    // More than a host socket holds, so that the device has to buffer some.
    let chunk = pattern(16 << 10);
    let mut sent = 0u32;
    let mut known = 0u32;
    while sent < 4 << 20 {
        // A guest sends only while it has credit.
        if sent - known + 16384 > BUFFER_BYTES {
            match rig.poll() {
                Some((header, _)) => known = header.fwd_cnt,
                None if rig.harness.serve_sources(20).unwrap() == 0 => break,
                None => {}
            }
            continue;
        }
        rig.send(data_of(header, &chunk), &chunk);
        sent += 16384;
        rig.offer(1);
    }
    assert!(sent < 4 << 20, "the host's socket never filled");
    // No data is lost, and the room is reported. A socket reports room only when most of it is free.
    stream.set_nonblocking(true).unwrap();
    let mut read: Vec<u8> = Vec::new();
    let mut part = vec![0; chunk.len()];
    let end = Instant::now() + DEADLINE;
    while read.len() < sent as usize || sent - known > BUFFER_BYTES / 2 {
        assert!(Instant::now() < end, "{} of {sent} bytes came", read.len());
        if let Ok(count) = stream.read(&mut part) {
            read.extend_from_slice(&part[..count]);
        }
        rig.harness.serve_sources(0).unwrap();
        if let Some((header, _)) = rig.poll() {
            known = header.fwd_cnt;
            rig.offer(1);
        }
    }
    assert!(read.chunks(chunk.len()).all(|read| read == chunk));
    assert_eq!(rig.counter("bad_packets"), 0);
}

#[test]
fn guest_that_closes_and_does_not_wait_leaves_its_last_bytes_to_the_host() {
    let mut rig = Rig::new(64);
    let (mut stream, header) = rig.connect_to_guest(52);
    // Until the host's socket is full, and then up to the device's buffer.
    let chunk = pattern(16 << 10);
    let mut sent = 0;
    let mut known = 0;
    while sent - known + 16384 <= BUFFER_BYTES {
        rig.send(data_of(header, &chunk), &chunk);
        sent += 16384;
        rig.send(of(header, Op::CreditRequest), &[]);
        while let Some((update, _)) = rig.poll() {
            known = update.fwd_cnt;
            rig.offer(1);
        }
    }
    // The device therefore buffers more than half of its limit.
    let close = Header {
        flags: SHUTDOWN_BOTH,
        ..of(header, Op::Shutdown)
    };
    rig.send(close, &[]);
    rig.send(of(header, Op::Reset), &[]);
    assert_eq!(rig.counter("connections"), 0);
    let reader = std::thread::spawn(move || {
        let mut read = Vec::new();
        stream.read_to_end(&mut read).unwrap();
        read
    });
    let end = Instant::now() + DEADLINE;
    while !reader.is_finished() {
        assert!(Instant::now() < end, "the end does not come");
        rig.harness.serve_sources(100).unwrap();
    }
    let read = reader.join().unwrap();
    assert_eq!(read.len(), sent as usize);
    assert!(read.chunks(16384).all(|read| read == chunk));
    // The ports are free, and no further packet of the old connection arrives.
    rig.nothing_comes();
}

#[test]
fn guest_that_asks_for_credit_is_told() {
    let mut rig = Rig::new(4);
    let (_stream, header) = rig.connect_to_guest(52);
    rig.send(of(header, Op::CreditRequest), &[]);
    assert_eq!(rig.next_is(Op::CreditUpdate).buf_alloc, BUFFER_BYTES);
}

#[test]
fn host_that_sends_no_more_can_still_be_sent_to() {
    let mut rig = Rig::new(8);
    let (mut stream, header) = rig.connect_to_guest(52);
    stream.write_all(b"request").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.next().1, b"request");
    assert_eq!(rig.next_is(Op::Shutdown).flags, SHUTDOWN_SEND);
    rig.send(data_of(header, b"answer"), b"answer");
    let done = Header {
        flags: SHUTDOWN_BOTH,
        ..of(header, Op::Shutdown)
    };
    rig.send(done, &[]);
    // All data, then the end of the stream.
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"answer");
    rig.next_is(Op::Reset);
    assert_eq!(rig.counter("connections"), 0);
}

#[test]
fn guest_that_sends_no_more_can_still_be_sent_to() {
    let mut rig = Rig::new(8);
    let (mut stream, header) = rig.connect_to_guest(52);
    rig.send(data_of(header, b"request"), b"request");
    let half = Header {
        flags: SHUTDOWN_SEND,
        ..of(header, Op::Shutdown)
    };
    rig.send(half, &[]);
    let mut request = Vec::new();
    stream.read_to_end(&mut request).unwrap();
    assert_eq!(request, b"request");
    stream.write_all(b"answer").unwrap();
    assert_eq!(rig.next().1, b"answer");
    drop(stream);
    assert_eq!(rig.next_is(Op::Shutdown).flags, SHUTDOWN_BOTH);
    rig.send(of(header, Op::Reset), &[]);
    assert_eq!(rig.counter("connections"), 0);
}

#[test]
fn host_that_closes_leaves_its_last_bytes_to_the_guest() {
    let mut rig = Rig::new(8);
    let (mut stream, header) = rig.connect_to_guest(52);
    // More than a buffer of the guest.
    let text = pattern(10_000);
    stream.write_all(&text).unwrap();
    drop(stream);
    let mut got = Vec::new();
    while got.len() < text.len() {
        got.extend(rig.next().1);
    }
    assert_eq!(got, text);
    assert_eq!(rig.next_is(Op::Shutdown).flags, SHUTDOWN_BOTH);
    // Data that the guest sends in the meantime is dropped; it is not a violation.
    rig.send(data_of(header, b"late"), b"late");
    assert_eq!(rig.counter("bad_packets"), 0);
    rig.send(of(header, Op::Reset), &[]);
    assert_eq!(rig.counter("connections"), 0);
}

#[test]
fn guest_that_receives_no_more_ends_the_hosts_writing() {
    let mut rig = Rig::new(8);
    let (mut stream, header) = rig.connect_to_guest(52);
    let deaf = Header {
        flags: SHUTDOWN_RECEIVE,
        ..of(header, Op::Shutdown)
    };
    rig.send(deaf, &[]);
    assert!(stream.write_all(b"unheard").is_err());
    rig.nothing_comes();
    rig.send(data_of(header, b"still"), b"still");
    assert_eq!(read_exactly(&mut stream, 5), b"still");
}

#[test]
fn bytes_read_ahead_for_a_guest_that_receives_no_more_are_dropped() {
    let mut rig = Rig::new(2);
    let (mut stream, header) = rig.connect_to_guest(52);
    stream.write_all(&pattern(2 * ROOM)).unwrap();
    assert_eq!(rig.next().1.len(), ROOM);
    let deaf = Header {
        flags: SHUTDOWN_RECEIVE,
        ..of(header, Op::Shutdown)
    };
    rig.send(deaf, &[]);
    rig.offer(2);
    rig.nothing_comes();
}

#[test]
fn packets_wait_for_buffers_of_the_guest() {
    let mut rig = Rig::new(0);
    let mut stream = rig.connect();
    stream.write_all(b"CONNECT 52\n").unwrap();
    rig.nothing_comes();
    rig.offer(1);
    rig.next_is(Op::Request);
    // Longer than a buffer: in pieces, in order.
    rig.offer(3);
    rig.send(packet(52, 1 << 30, Op::Response), &[]);
    let text = pattern(10_000);
    stream.write_all(&text).unwrap();
    let mut got = Vec::new();
    while got.len() < text.len() {
        got.extend(rig.next().1);
    }
    assert_eq!(got, text);
}

#[test]
fn driver_that_resets_the_device_closes_all_streams() {
    let mut rig = Rig::new(8);
    let (mut stream, _) = rig.connect_to_guest(52);
    let mut greeting = rig.connect();
    greeting.write_all(b"CONN").unwrap();
    rig.nothing_comes();
    rig.harness.reset();
    assert_eq!(rig.counter("connections"), 0);
    // The other ends see the end of the stream, or a reset if data was left unread.
    assert!(!matches!(stream.read(&mut [0]), Ok(1)));
    assert!(!matches!(greeting.read(&mut [0]), Ok(1)));
    // New programs wait for the next driver.
    let mut waiting = rig.connect();
    waiting.write_all(b"CONNECT 9\n").unwrap();
    rig.offered.clear();
    rig.harness.activate().unwrap();
    rig.offer(1);
    assert_eq!(rig.next_is(Op::Request).dst_port, 9);
}

#[test]
fn socket_goes_with_the_worker_and_a_live_one_is_not_stolen() {
    let rig = Rig::new(0);
    let socket = rig.socket();
    let taken = Vsock::new(params(&rig.folder)).unwrap_err();
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    let Rig {
        harness, folder, ..
    } = rig;
    drop(harness);
    assert!(!socket.exists());
    drop(Vsock::new(params(&folder)).unwrap());
}
