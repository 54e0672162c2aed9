//! One stream between a port of the guest and a UNIX socket of the host.
//!
//! ```text
//!   Requested ── the guest accepts ──► Open ── either side stops sending ──► Open, in one direction
//!       │                               │                                      │
//!       └──────── a reset from either side, or both directions ended ──────────┴──► gone
//! ```
//!
//! Credit (virtio 1.2 §5.10.6.3): each side reports the size of its buffer and the number of received bytes that it has
//! passed on. The counts wrap at 2³².

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Maximum number of bytes of one connection in transit to the host, which is the buffer size reported to the guest.
pub(super) const BUFFER_BYTES: u32 = 256 << 10;
/// The guest is notified of free buffer space if the space it knows of is smaller than this.
const ROOM_KNOWN_MIN: u32 = BUFFER_BYTES / 2;

/// A connection's ports: the host's and the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The guest has not yet responded to the request.
    Requested,
    Open,
}

/// A packet for the guest, without the fields that all packets of a connection share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) op: Op,
    pub(super) flags: u32,
    /// Number of data bytes in the caller's buffer.
    pub(super) len: usize,
}

/// The guest violated the protocol, so the connection is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Violation;

/// Packets that must still be sent to the guest, apart from data.
#[derive(Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    reset: bool,
    credit_update: bool,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    stream: UnixStream,
    phase: Phase,
    owed: Owed,

    // Host to guest.
    /// The stream may be readable; false only after a read would have blocked.
    readable: bool,
    /// The stream has ended.
    at_end: bool,
    /// Bytes that were read from the stream and not yet sent. Linux has buffers of 4 KiB, and a read for each would take
    /// longer than the data.
    ahead: VecDeque<u8>,
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    /// Credit was requested from the guest, and no data was sent since. A guest without credit responds immediately, so
    /// a new request after each response would keep both sides busy until a program in the guest reads.
    credit_requested: bool,
    /// SHUTDOWN_* that was sent to the guest.
    shutdown_sent: u32,

    // Guest to host.
    backlog: VecDeque<u8>,
    received: u32,
    forwarded: u32,
    /// `forwarded` as last reported to the guest.
    forwarded_known: u32,
    /// The host's program no longer accepts data.
    host_closed: bool,
    /// SHUTDOWN_* that the guest has sent.
    shutdown_received: u32,
    /// The end of the guest's data was passed on to the host.
    end_passed_on: bool,
}

impl Connection {
    /// A connection from a host program to the guest.
    pub(super) fn to_guest(ports: Ports, stream: UnixStream) -> Self {
        let mut connection = Self::new(ports, stream, Phase::Requested);
        connection.owed.request = true;
        connection
    }

    /// A connection from the guest to the host.
    pub(super) fn from_guest(ports: Ports, stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(ports, stream, Phase::Open);
        connection.owed.response = true;
        connection.take_credit(request);
        connection
    }

    fn new(ports: Ports, stream: UnixStream, phase: Phase) -> Self {
        Self {
            ports,
            stream,
            phase,
            owed: Owed::default(),
            readable: true,
            at_end: false,
            ahead: VecDeque::new(),
            sent: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            credit_requested: false,
            shutdown_sent: 0,
            backlog: VecDeque::new(),
            received: 0,
            forwarded: 0,
            forwarded_known: 0,
            host_closed: false,
            shutdown_received: 0,
            end_passed_on: false,
        }
    }

    /// Number of bytes passed on to the host, reported to the guest with every packet.
    pub(super) fn forwarded(&self) -> u32 {
        self.forwarded
    }

    /// Sends a reset to the guest; then the connection is removed.
    pub(super) fn reset(&mut self) {
        self.owed.reset = true;
    }

    /// Handles a stream that may be readable.
    pub(super) fn host_readable(&mut self) {
        self.readable = true;
    }

    /// Handles a stream whose other end is closed: it accepts no data, but there may be data left to read.
    pub(super) fn host_hung_up(&mut self) {
        self.readable = true;
        self.host_gone();
    }

    /// Handles a writable stream. Returns the number of bytes written.
    pub(super) fn host_writable(&mut self) -> usize {
        let before = self.forwarded;
        while !self.backlog.is_empty() && !self.host_closed {
            match self.write(self.backlog.as_slices().0) {
                Ok(0) => break,
                Ok(count) => {
                    self.backlog.drain(..count);
                    self.passed_on(count);
                }
                Err(_) => self.host_gone(),
            }
        }
        if self.backlog.is_empty() {
            // A connection that once filled its buffer frees the memory.
            self.backlog = VecDeque::new();
            self.pass_on_end();
        }
        self.forwarded.wrapping_sub(before) as usize
    }

    /// Number of bytes that the stream accepts now.
    fn write(&self, data: &[u8]) -> io::Result<usize> {
        loop {
            match (&self.stream).write(data) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
                done => return done,
            }
        }
    }

    /// Whether the guest has sent everything, but part of it is not yet delivered to the host.
    pub(super) fn is_draining(&self) -> bool {
        self.shutdown_received & SHUTDOWN_SEND != 0 && !self.backlog.is_empty()
    }

    /// The guest accepts the connection. Notifies the host's program.
    pub(super) fn accepted(&mut self) -> Result<(), Violation> {
        if self.phase != Phase::Requested {
            return Err(Violation);
        }
        self.phase = Phase::Open;
        let text = format!("OK {}\n", self.ports.host);
        // Nothing was written yet, so the text fits, if the program still exists.
        match self.stream.write(text.as_bytes()) {
            Ok(count) if count == text.len() => {}
            Ok(_) | Err(_) => self.host_gone(),
        }
        Ok(())
    }

    /// Stores the credit that every packet of the guest carries.
    pub(super) fn take_credit(&mut self, header: &Header) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
    }

    /// The guest requests credit.
    pub(super) fn credit_requested(&mut self) {
        self.owed.credit_update = true;
    }

    /// Accepts data from the guest for the host.
    pub(super) fn take_data(&mut self, data: &[u8]) -> Result<(), Violation> {
        let on_the_way = self.received.wrapping_sub(self.forwarded);
        let room = (BUFFER_BYTES - on_the_way) as usize;
        let ended = self.shutdown_received & SHUTDOWN_SEND != 0;
        if self.phase != Phase::Open || ended || data.len() > room {
            return Err(Violation);
        }
        // At most BUFFER_BYTES.
        self.received = self.received.wrapping_add(data.len() as u32);
        if self.host_closed {
            self.passed_on(data.len());
            return Ok(());
        }
        let written = if self.backlog.is_empty() {
            self.write(data)
        } else {
            Ok(0)
        };
        match written {
            Ok(count) => {
                self.passed_on(count);
                self.backlog.extend(&data[count..]);
            }
            Err(_) => {
                self.passed_on(data.len());
                self.host_gone();
            }
        }
        if !self.backlog.is_empty() {
            self.host_writable();
        }
        Ok(())
    }

    /// The guest stops sending or receiving.
    pub(super) fn take_shutdown(&mut self, flags: u32) -> Result<(), Violation> {
        if self.phase != Phase::Open {
            return Err(Violation);
        }
        self.shutdown_received |= flags & SHUTDOWN_BOTH;
        if self.shutdown_received & SHUTDOWN_RECEIVE != 0 {
            // The host's program may have closed the stream, which has the same effect.
            self.stream.shutdown(Shutdown::Read).ok();
        }
        self.pass_on_end();
        Ok(())
    }

    /// The next packet for the guest, with at most `room` bytes of data in `buffer`; `None` if there is none now.
    pub(super) fn next(&mut self, buffer: &mut [u8], room: usize) -> Option<Outgoing> {
        let bare = |op| Outgoing {
            op,
            flags: 0,
            len: 0,
        };
        let outgoing = if self.owed.reset {
            bare(Op::Reset)
        } else if std::mem::take(&mut self.owed.request) {
            bare(Op::Request)
        } else if self.phase == Phase::Requested {
            return None;
        } else if std::mem::take(&mut self.owed.response) {
            bare(Op::Response)
        } else if let Some(outgoing) = self.next_data(buffer, room) {
            outgoing
        } else if let Some(flags) = self.next_shutdown() {
            Outgoing {
                flags,
                ..bare(Op::Shutdown)
            }
        } else if self.owed.credit_update {
            bare(Op::CreditUpdate)
        } else {
            return None;
        };
        self.owed.credit_update = false;
        self.forwarded_known = self.forwarded;
        Some(outgoing)
    }

    fn next_data(&mut self, buffer: &mut [u8], room: usize) -> Option<Outgoing> {
        if self.shutdown_received & SHUTDOWN_RECEIVE != 0 {
            self.ahead = VecDeque::new();
            return None;
        }
        if self.ahead.is_empty() && (!self.readable || self.at_end) {
            return None;
        }
        let unread = self.sent.wrapping_sub(self.guest_fwd_cnt);
        let credit = self.guest_buf_alloc.saturating_sub(unread) as usize;
        if credit == 0 {
            let ask = !std::mem::replace(&mut self.credit_requested, true);
            return ask.then_some(Outgoing {
                op: Op::CreditRequest,
                flags: 0,
                len: 0,
            });
        }
        let len = self.take(buffer, room.min(credit))?;
        // At most the size of a buffer.
        self.sent = self.sent.wrapping_add(len as u32);
        self.credit_requested = false;
        Some(Outgoing {
            op: Op::Data,
            flags: 0,
            len,
        })
    }

    /// Takes the next bytes of the stream, at most `room`, into `buffer`; the rest that fits there is read ahead. Returns
    /// their number, or `None` if there are none now.
    fn take(&mut self, buffer: &mut [u8], room: usize) -> Option<usize> {
        let (ahead, _) = self.ahead.as_slices();
        if !ahead.is_empty() {
            let len = ahead.len().min(room);
            buffer[..len].copy_from_slice(&ahead[..len]);
            self.ahead.drain(..len);
            return Some(len);
        }
        match self.read(buffer) {
            Ok(0) => {
                self.at_end = true;
                None
            }
            Ok(count) => {
                let len = count.min(room);
                self.ahead.extend(&buffer[len..count]);
                Some(len)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                // A stream that waits for its program holds no memory.
                self.ahead = VecDeque::new();
                None
            }
            Err(_) => {
                self.at_end = true;
                self.host_gone();
                None
            }
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }

    /// SHUTDOWN_* that must still be sent to the guest. Data that the guest no longer receives need not be read to the
    /// end.
    fn next_shutdown(&mut self) -> Option<u32> {
        let unwanted = self.shutdown_received & SHUTDOWN_RECEIVE != 0;
        let mut flags = self.shutdown_sent;
        if self.at_end || unwanted && self.host_closed {
            flags |= SHUTDOWN_SEND;
        }
        if self.host_closed {
            flags |= SHUTDOWN_RECEIVE;
        }
        let news = flags != self.shutdown_sent;
        self.shutdown_sent = flags;
        news.then_some(flags)
    }

    /// The host's program no longer accepts data; data in transit is lost, as on any socket.
    fn host_gone(&mut self) {
        self.host_closed = true;
        let lost = std::mem::take(&mut self.backlog).len();
        self.passed_on(lost);
        self.pass_on_end();
    }

    fn passed_on(&mut self, count: usize) {
        // At most BUFFER_BYTES are in transit.
        self.forwarded = self.forwarded.wrapping_add(count as u32);
        let on_the_way_as_known = self.received.wrapping_sub(self.forwarded_known);
        let room_known = BUFFER_BYTES.saturating_sub(on_the_way_as_known);
        if self.forwarded != self.forwarded_known && room_known < ROOM_KNOWN_MIN {
            self.owed.credit_update = true;
        }
    }

    /// Passes the end on to the host once all of the guest's data is delivered. A guest that has ended both directions
    /// gets a reset (virtio 1.2 §5.10.6.5).
    fn pass_on_end(&mut self) {
        if !self.backlog.is_empty() || self.shutdown_received & SHUTDOWN_SEND == 0 {
            return;
        }
        if !std::mem::replace(&mut self.end_passed_on, true) {
            // The host's program may have closed the stream, which has the same effect.
            self.stream.shutdown(Shutdown::Write).ok();
        }
        if self.shutdown_received == SHUTDOWN_BOTH {
            self.reset();
        }
    }
}
