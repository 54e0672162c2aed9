//! Tests the device with a mock driver and sockets of the host.

mod hostile;
mod saved;
mod streams;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::packet::{CID_HOST, HEADER_BYTES, Header, Op, TYPE_STREAM};
use super::{Vsock, VsockParams};
use crate::device::{QueueHandler, VirtioDevice};
use crate::testing::{Chain, HandlerHarness, Segment, conformance};

const GUEST_CID: u32 = 3;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// A test that waits longer than this has failed.
const DEADLINE: Duration = Duration::from_secs(60);
/// Data bytes in one receive buffer, as in Linux.
const ROOM: usize = 4096;
/// The buffer size that the guest reports.
const GUEST_BUFFER: u32 = 256 << 10;

struct Rig {
    vsock: Vsock,
    harness: HandlerHarness<Box<dyn QueueHandler>>,
    /// Receive buffers provided to the device.
    offered: Vec<Chain>,
    folder: TempDir,
}

fn params(folder: &TempDir) -> VsockParams {
    VsockParams {
        id: "_vsock0".to_owned(),
        cid: GUEST_CID,
        socket: folder.path().join("vsock"),
    }
}

impl Rig {
    /// A device with receive buffers for this number of packets.
    fn new(buffers: usize) -> Self {
        Self::restored(buffers, None)
    }

    fn restored(buffers: usize, own: Option<&state::Saved>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut vsock = Vsock::new(params(&folder)).unwrap();
        let mut handler = vsock.take_handlers().remove(0);
        if own.is_some() {
            handler.restore(own).unwrap();
        }
        let mut harness = HandlerHarness::new(handler, 1 << 32);
        harness.add_queues(3);
        harness.activate().unwrap();
        let mut rig = Self {
            vsock,
            harness,
            offered: Vec::new(),
            folder,
        };
        rig.offer(buffers);
        rig
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("vsock")
    }

    /// Listens where the guest's connections to `port` arrive.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("vsock_{port}"))).unwrap()
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
    }

    fn counter(&self, name: &str) -> u64 {
        self.vsock.counters()[name]
    }

    /// Provides this number of further receive buffers.
    fn offer(&mut self, buffers: usize) {
        for _ in 0..buffers {
            let segments = [Segment::Writable((HEADER_BYTES + ROOM) as u32)];
            let chain = self.harness.queue(RECEIVE).push(&segments);
            self.offered.push(chain);
        }
        self.harness.kick(RECEIVE).unwrap();
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let bytes = header.to_bytes();
        let segments = [Segment::Readable(&bytes), Segment::Readable(data)];
        let segments = if data.is_empty() {
            &segments[..1]
        } else {
            &segments
        };
        let (_, used) = self.harness.request(TRANSMIT, segments).unwrap();
        assert_eq!(used.unwrap().len, 0);
    }

    /// The next packet for the guest, if one is available without waiting.
    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let used = self.harness.queue(RECEIVE).pop_used()?;
        let at = self
            .offered
            .iter()
            .position(|it| u32::from(it.head) == used.head);
        let chain = self.offered.remove(at.expect("a buffer that was offered"));
        let bytes = self.harness.queue(RECEIVE).read_buffer(chain.buffers[0]);
        let (header, data) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::from_bytes(header);
        assert_eq!(used.len, HEADER_BYTES as u32 + header.len);
        assert_eq!(header.src_cid, CID_HOST);
        assert_eq!(header.dst_cid, u64::from(GUEST_CID));
        assert_eq!(header.socket_type, TYPE_STREAM);
        Some((header, data[..header.len as usize].to_vec()))
    }

    /// The next packet for the guest.
    fn next(&mut self) -> (Header, Vec<u8>) {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(packet) = self.poll() {
                return packet;
            }
            assert!(Instant::now() < end, "no packet came");
            self.harness.serve_sources(100).unwrap();
        }
    }

    fn next_is(&mut self, op: Op) -> Header {
        let (header, _) = self.next();
        assert_eq!(Op::from_repr(header.op), Some(op), "{header:?}");
        header
    }

    /// Serves the host until it is idle for 20 ms, and requires that the guest receives no packet.
    fn nothing_comes(&mut self) {
        while self.harness.serve_sources(20).unwrap() > 0 {}
        assert_eq!(self.poll(), None);
    }

    /// Connects the guest to `port` of the host, from `guest_port`.
    fn connect_to_host(&mut self, guest_port: u32, port: u32) -> (UnixStream, Header) {
        let listener = self.listen(port);
        self.send(packet(guest_port, port, Op::Request), &[]);
        let response = self.next_is(Op::Response);
        assert_eq!((response.src_port, response.dst_port), (port, guest_port));
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        (stream, packet(guest_port, port, Op::Data))
    }

    /// Connects a host program to `port` of the guest, which accepts.
    fn connect_to_guest(&mut self, port: u32) -> (UnixStream, Header) {
        let mut stream = self.connect();
        writeln!(stream, "CONNECT {port}").unwrap();
        let request = self.next_is(Op::Request);
        assert_eq!(request.dst_port, port);
        self.send(packet(port, request.src_port, Op::Response), &[]);
        let answer = format!("OK {}\n", request.src_port);
        assert_eq!(read_exactly(&mut stream, answer.len()), answer.as_bytes());
        (stream, packet(port, request.src_port, Op::Data))
    }
}

/// A packet of the guest, with its buffer space for data of the host.
fn packet(guest_port: u32, host_port: u32, op: Op) -> Header {
    Header {
        src_cid: u64::from(GUEST_CID),
        dst_cid: CID_HOST,
        src_port: guest_port,
        dst_port: host_port,
        socket_type: TYPE_STREAM,
        op: op as u16,
        buf_alloc: GUEST_BUFFER,
        ..Header::default()
    }
}

fn of(header: Header, op: Op) -> Header {
    Header {
        op: op as u16,
        len: 0,
        ..header
    }
}

fn data_of(header: Header, data: &[u8]) -> Header {
    Header {
        len: u32::try_from(data.len()).unwrap(),
        ..header
    }
}

fn read_exactly(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn vsock_conforms() {
    // Each device has its own socket, because the saved device and the continued one exist at the same time.
    let folders = Mutex::new(Vec::new());
    conformance("vsock", |_| {
        let folder = tempfile::tempdir().unwrap();
        let vsock = Vsock::new(params(&folder)).unwrap();
        folders.lock().unwrap().push(folder);
        Arc::new(Mutex::new(vsock))
    });
}
