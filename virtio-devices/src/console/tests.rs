//! Tests of the console's guarantees, on pipes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use super::output::BACKLOG_BYTES_MAX;
use super::{Console, ConsoleEndpoint, WindowSize};
use crate::device::{QueueHandler, VirtioDevice};
use crate::testing::{Desc, HandlerHarness, MockPciDriver, Segment, TestRam, conformance};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

struct Rig {
    console: Console,
    harness: HandlerHarness<Box<dyn QueueHandler>>,
    /// The host's end.
    host: UnixStream,
}

fn pair() -> (UnixStream, UnixStream) {
    let (guest_end, host_end) = UnixStream::pair().unwrap();
    guest_end.set_nonblocking(true).unwrap();
    host_end.set_nonblocking(true).unwrap();
    (guest_end, host_end)
}

fn rig() -> Rig {
    let (guest_end, host) = pair();
    let input = guest_end.try_clone().unwrap();
    let endpoint = ConsoleEndpoint::new(Some(input.into()), Some(guest_end.into()));
    let (console, harness) = active(endpoint);
    Rig {
        console,
        harness,
        host,
    }
}

fn active(endpoint: ConsoleEndpoint) -> (Console, HandlerHarness<Box<dyn QueueHandler>>) {
    let mut console = Console::new("__console", endpoint, None).unwrap();
    let handler = console.take_handlers().remove(0);
    let mut harness = HandlerHarness::new(handler, console.features());
    harness.add_queues(2);
    harness.activate().unwrap();
    (console, harness)
}

fn drain(host: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    // Ends with WouldBlock, which is not an error here.
    host.read_to_end(&mut all).ok();
    all
}

#[test]
fn console_conforms() {
    conformance("console", |_| {
        let zero = File::open("/dev/zero").unwrap();
        let null = File::options().write(true).open("/dev/null").unwrap();
        let endpoint = ConsoleEndpoint::new(Some(zero.into()), Some(null.into()));
        let window = WindowSize {
            columns: 80,
            rows: 25,
        };
        let console = Console::new("__console", endpoint, Some(window)).unwrap();
        Arc::new(Mutex::new(console))
    });
}

#[test]
fn output_of_several_buffers_arrives_in_order() {
    let mut rig = rig();
    let segments = [Segment::Readable(b"hello, "), Segment::Readable(b"host")];
    let (chain, used) = rig.harness.request(TRANSMIT, &segments).unwrap();
    let used = used.unwrap();
    assert_eq!((used.head, used.len), (u32::from(chain.head), 0));
    assert_eq!(drain(&mut rig.host), b"hello, host");
    assert_eq!(rig.harness.interrupt.queue_signals(TRANSMIT), 1);
    assert_eq!(rig.console.counters()["tx_bytes"], 11);
}

#[test]
fn input_waits_for_buffers_and_fills_them_in_order() {
    let mut rig = rig();
    rig.host.write_all(b"abcdef").unwrap();
    assert_eq!(rig.harness.serve_sources(1000).unwrap(), 1);
    // No buffers: the input is no longer watched, and does not cause a busy loop.
    assert_eq!(rig.harness.serve_sources(0).unwrap(), 0);

    let segments = [Segment::Writable(2), Segment::Writable(2)];
    let first = rig.harness.queue(RECEIVE).push(&segments);
    rig.harness.kick(RECEIVE).unwrap();
    let second = rig.harness.queue(RECEIVE).push(&segments);
    while rig.harness.serve_sources(0).unwrap() > 0 {}
    let used = rig.harness.queue(RECEIVE).pop_used().unwrap();
    assert_eq!((used.head, used.len), (u32::from(first.head), 4));
    let used = rig.harness.queue(RECEIVE).pop_used().unwrap();
    assert_eq!((used.head, used.len), (u32::from(second.head), 2));
    let queue = rig.harness.queue(RECEIVE);
    assert_eq!(queue.read_buffer(first.buffers[0]), b"ab");
    assert_eq!(queue.read_buffer(first.buffers[1]), b"cd");
    assert_eq!(queue.read_buffer(second.buffers[0]), b"ef");
    assert_eq!(rig.console.counters()["rx_bytes"], 6);
}

#[test]
fn input_arriving_after_buffers_is_delivered() {
    let mut rig = rig();
    for _ in 0..2 {
        rig.harness.queue(RECEIVE).push(&[Segment::Writable(16)]);
    }
    rig.harness.kick(RECEIVE).unwrap();
    for byte in [b"x", b"y"] {
        rig.host.write_all(byte).unwrap();
        while rig.harness.queue(RECEIVE).used_idx() == 0 {
            rig.harness.serve_sources(1000).unwrap();
        }
    }
    assert_eq!(rig.harness.queue(RECEIVE).pop_used().unwrap().len, 1);
}

#[test]
fn input_that_ends_is_left_alone() {
    let mut rig = rig();
    rig.harness.queue(RECEIVE).push(&[Segment::Writable(16)]);
    rig.host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(rig.harness.serve_sources(1000).unwrap(), 1);
    assert_eq!(rig.harness.serve_sources(0).unwrap(), 0);
    assert_eq!(rig.harness.queue(RECEIVE).pop_used(), None);
    rig.harness
        .request(TRANSMIT, &[Segment::Readable(b"still here")])
        .unwrap();
    assert_eq!(drain(&mut rig.host), b"still here");
}

#[test]
fn input_that_cannot_be_polled_is_read_when_there_are_buffers() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"from a file").unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let (_, mut harness) = active(ConsoleEndpoint::new(Some(file.into()), None));
    let (chain, used) = harness.request(RECEIVE, &[Segment::Writable(64)]).unwrap();
    assert_eq!(used.unwrap().len, 11);
    assert_eq!(
        &harness.queue(RECEIVE).read_buffer(chain.buffers[0])[..11],
        b"from a file"
    );
}

#[test]
fn slow_output_never_holds_the_guest_up_and_loses_only_the_excess() {
    let mut rig = rig();
    let line = [b'.'; 32 << 10];
    let mut sent = 0;
    while rig.console.counters()["tx_dropped_bytes"] == 0 {
        let (_, used) = rig
            .harness
            .request(TRANSMIT, &[Segment::Readable(&line)])
            .unwrap();
        assert!(used.is_some(), "the guest has its buffer back at once");
        sent += line.len();
        assert!(sent < 64 << 20, "the backlog is bounded");
    }
    let dropped = rig.console.counters()["tx_dropped_bytes"] as usize;
    let mut received = 0;
    loop {
        received += drain(&mut rig.host).len();
        if rig.harness.serve_sources(0).unwrap() == 0 {
            break;
        }
    }
    received += drain(&mut rig.host).len();
    assert_eq!(received + dropped, sent);
    assert!(received > BACKLOG_BYTES_MAX);
    // The backlog is written: the output is no longer watched, and bytes are written directly again.
    rig.harness
        .request(TRANSMIT, &[Segment::Readable(b"end")])
        .unwrap();
    assert_eq!(drain(&mut rig.host), b"end");
}

#[test]
fn output_that_breaks_is_counted_and_survived() {
    let mut rig = rig();
    drop(rig.host);
    rig.harness
        .request(TRANSMIT, &[Segment::Readable(b"lost")])
        .unwrap();
    assert_eq!(rig.console.counters()["tx_dropped_bytes"], 4);
}

#[test]
fn chain_beyond_the_bound_is_cut_and_counted() {
    let mut rig = rig();
    let descs: Vec<Desc> = (0..40)
        .map(|at| Desc {
            addr: 0x10_0000,
            len: 1 << 20,
            flags: u16::from(at < 39),
            next: at + 1,
        })
        .collect();
    rig.harness.queue(TRANSMIT).push_raw(&descs);
    rig.harness.kick(TRANSMIT).unwrap();
    let counters = rig.console.counters();
    assert_eq!(counters["tx_bytes"], 64 << 10);
    assert!(counters["tx_dropped_bytes"] >= (40 << 20) - (64 << 10));
}

#[test]
fn chains_that_cannot_be_used_are_answered_and_counted() {
    let mut rig = rig();
    let outside = Desc {
        addr: u64::MAX - 100,
        len: 64,
        flags: 2,
        next: 0,
    };
    rig.host.write_all(b"input").unwrap();
    rig.harness.queue(RECEIVE).push_raw(&[outside]);
    rig.harness
        .queue(RECEIVE)
        .push(&[Segment::Readable(b"wrong way")]);
    rig.harness.kick(RECEIVE).unwrap();
    while rig.harness.serve_sources(0).unwrap() > 0 {}
    assert_eq!(rig.harness.queue(RECEIVE).pop_used().unwrap().len, 0);
    assert_eq!(rig.harness.queue(RECEIVE).pop_used().unwrap().len, 0);
    assert_eq!(rig.console.counters()["bad_chains"], 2);
}

#[test]
fn console_without_endpoint_takes_output_and_drops_nothing() {
    let (console, mut harness) = active(ConsoleEndpoint::null());
    let (_, used) = harness
        .request(TRANSMIT, &[Segment::Readable(b"void")])
        .unwrap();
    assert!(used.is_some());
    assert_eq!(console.counters()["tx_dropped_bytes"], 0);
}

#[test]
fn window_is_offered_and_changes_are_told() {
    let size = |columns, rows| WindowSize { columns, rows };
    let console = Console::new("__console", ConsoleEndpoint::null(), Some(size(80, 25))).unwrap();
    let handle = console.handle();
    let ram = TestRam::new(4 << 20);
    let mut driver = MockPciDriver::new(Arc::new(Mutex::new(console)), &ram);
    assert_eq!(driver.start(u64::MAX), 1 << 32 | 1);
    let read = |driver: &MockPciDriver| {
        let mut data = [0; 8];
        driver.device_config(0, &mut data);
        data
    };
    assert_eq!(read(&driver), [80, 0, 25, 0, 1, 0, 0, 0]);
    handle.resize(size(80, 25));
    assert_eq!(driver.vectors.triggered(0), 0);
    handle.resize(size(300, 50));
    driver.vectors.wait_triggered(0, 1);
    assert_eq!(read(&driver), [44, 1, 50, 0, 1, 0, 0, 0]);
}

#[test]
fn pause_gives_the_buffer_that_waits_for_input_back() {
    let mut rig = rig();
    let chains: Vec<_> = (0..2)
        .map(|_| rig.harness.queue(RECEIVE).push(&[Segment::Writable(8)]))
        .collect();
    let receive = |rig: &mut Rig, text: &str| {
        rig.host.write_all(text.as_bytes()).unwrap();
        rig.harness.kick(RECEIVE).unwrap();
        let end = std::time::Instant::now() + crate::testing::DEADLINE;
        loop {
            if let Some(used) = rig.harness.queue(RECEIVE).pop_used() {
                return (used.head, used.len);
            }
            assert!(std::time::Instant::now() < end, "no input");
            rig.harness.serve_sources(100).unwrap();
        }
    };
    assert_eq!(receive(&mut rig, "one"), (u32::from(chains[0].head), 3));
    // The second chain has been taken by now, without effect.
    rig.harness.handler.pause();
    rig.harness.kick(RECEIVE).unwrap();
    assert_eq!(receive(&mut rig, "four"), (u32::from(chains[1].head), 4));
    assert!(rig.harness.queue(RECEIVE).pop_used().is_none());
}
