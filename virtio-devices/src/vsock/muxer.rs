//! All connections of a guest, the socket for host programs, and the order in which connections are served.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use state::{Part, State, StateError, parts, require};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{BUFFER_BYTES, Connection, Outgoing, Ports};
use super::counters::Shared;
use super::packet::{CID_HOST, Header, Op, TYPE_STREAM};
use crate::listening_socket::{ACCEPT_PAUSE, ListeningSocket};
use crate::unix_connect::connect;
use crate::worker::Turn;

const PART: Part = parts::VSOCK_CONNECTIONS;

/// Maximum number of streams, including those whose host program has not sent its greeting. The same as in Cloud
/// Hypervisor.
pub const CONNECTIONS_MAX: usize = 1023;
/// Maximum number of resets for the guest that belong to no connection and wait to be sent. Further ones are dropped
/// and counted. The guest can reach the limit only by sending as many invalid packets without receiving.
const RESETS_MAX: usize = 2 * CONNECTIONS_MAX;
/// Maximum number of events per call. Further ones stay ready.
const EVENTS_MAX: usize = 64;
/// Length of "CONNECT 4294967295\n", plus some spaces.
const GREETING_BYTES_MAX: usize = 32;
/// Ports of host programs: bit 30 set, bit 31 clear, as in Cloud Hypervisor.
const FIRST_HOST_PORT: u32 = 1 << 30;
const LAST_HOST_PORT: u32 = (1 << 31) - 1;

// Data in the epoll set; streams use their slot.
const LISTENER: u64 = u64::MAX;
const ACCEPT_AGAIN: u64 = LISTENER - 1;

/// The saved connections. Where the machine continues, the guest is notified that they are gone, and host programs have
/// to connect again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConnectionsState {
    /// The port of the next host program. A guest may still remember earlier ones.
    pub next_host_port: u32,
    /// Host port and guest port of each connection.
    pub connections: Vec<(u32, u32)>,
}

impl State for VsockConnectionsState {
    const PART: Part = PART;
}

/// A host program that has connected but not sent its greeting.
#[derive(Debug)]
struct Greeting {
    stream: UnixStream,
    line: Vec<u8>,
}

#[derive(Debug)]
enum Slot {
    Free,
    Greeting(Greeting),
    Connected {
        connection: Connection,
        /// Whether it is in `ready`.
        queued: bool,
    },
    /// The guest has closed the connection, and its last bytes are still in transit to the host.
    Draining(Connection),
}

/// The state of a greeting.
enum Progress {
    /// The line is not complete.
    Incomplete,
    /// The guest port that the program requests.
    Port(u32),
    /// The line is not `CONNECT PORT`.
    Invalid,
}

pub(super) struct Muxer {
    guest_cid: u64,
    listener: ListeningSocket,
    epoll: Epoll,
    /// The listener is watched.
    listening: bool,
    /// Runs while a driver is active and the listener is not watched.
    accept_again: TimerFd,
    slots: Vec<Slot>,
    free: Vec<usize>,
    by_ports: BTreeMap<Ports, usize>,
    /// Connections that may have a packet for the guest, each listed once.
    ready: VecDeque<usize>,
    resets: VecDeque<Ports>,
    next_host_port: u32,
    shared: Arc<Shared>,
}

crate::debug_fields!(Muxer(it) { listener: it.listener, connections: it.by_ports.len() });

impl Muxer {
    pub(super) fn new(
        guest_cid: u64,
        listener: ListeningSocket,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let accept_again = TimerFd::new()?;
        let event = EpollEvent::new(EventSet::IN, ACCEPT_AGAIN);
        epoll.ctl(ControlOperation::Add, accept_again.as_raw_fd(), event)?;
        Ok(Self {
            guest_cid,
            listener,
            epoll,
            listening: false,
            accept_again,
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            shared,
        })
    }

    /// Readable when [`Muxer::serve_host`] has work to do.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// A driver is active. Until now, programs waited in the listener's backlog.
    pub(super) fn start(&mut self) -> io::Result<()> {
        self.accept_again.clear()?;
        if !std::mem::replace(&mut self.listening, true) {
            let event = EpollEvent::new(EventSet::IN, LISTENER);
            self.epoll
                .ctl(ControlOperation::Add, self.listener.as_raw_fd(), event)?;
        }
        Ok(())
    }

    /// The driver is gone, and all its connections are closed.
    pub(super) fn stop(&mut self) {
        self.stop_listening();
        if let Err(error) = self.accept_again.clear() {
            log::error!("vsock: timer: {error}");
        }
        self.slots.clear();
        self.free.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.resets.clear();
        self.count_connections();
    }

    fn stop_listening(&mut self) {
        if std::mem::take(&mut self.listening) {
            let event = EpollEvent::default();
            let fd = self.listener.as_raw_fd();
            if let Err(error) = self.epoll.ctl(ControlOperation::Delete, fd, event) {
                log::error!("vsock: epoll_ctl(DEL): {error}");
            }
        }
    }

    pub(super) fn state(&self) -> VsockConnectionsState {
        let ports = self.resets.iter().chain(self.by_ports.keys());
        VsockConnectionsState {
            next_host_port: self.next_host_port,
            connections: ports.map(|ports| (ports.host, ports.guest)).collect(),
        }
    }

    pub(super) fn restore(&mut self, state: &VsockConnectionsState) -> Result<(), StateError> {
        let VsockConnectionsState {
            next_host_port,
            connections,
        } = state;
        let ports = FIRST_HOST_PORT..=LAST_HOST_PORT;
        require(
            ports.contains(next_host_port),
            PART,
            "next_host_port",
            || format!("{next_host_port} is not in {ports:?}"),
        )?;
        let most = RESETS_MAX + CONNECTIONS_MAX;
        require(connections.len() <= most, PART, "connections", || {
            format!("{} are more than {most}", connections.len())
        })?;
        self.next_host_port = *next_host_port;
        let ports = connections.iter();
        self.resets = ports.map(|&(host, guest)| Ports { host, guest }).collect();
        Ok(())
    }

    /// Serves the listener and the ready streams once.
    pub(super) fn serve_host(&mut self, turn: &mut Turn) -> io::Result<()> {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            turn.charge_call(1, 0);
            match event.data() {
                LISTENER => self.accept()?,
                ACCEPT_AGAIN => self.start()?,
                // The number of a slot. In this loop a slot is freed only by its own event, so it is still the same
                // stream.
                slot => self.serve_stream(slot as usize, event.event_set(), turn),
            }
        }
        Ok(())
    }

    fn accept(&mut self) -> io::Result<()> {
        match self.listener.accept() {
            Ok(None) => {}
            Ok(Some(stream)) if self.has_room() => match self.watch(stream.as_raw_fd()) {
                Ok(index) => {
                    let line = Vec::new();
                    self.slots[index] = Slot::Greeting(Greeting { stream, line });
                }
                Err(error) => self.refuse(error),
            },
            // Closed immediately: the program sees the end of the stream.
            Ok(Some(_)) => self.refuse("too many connections"),
            Err(error) => {
                // No descriptor is left. The program keeps waiting, and would wake this thread endlessly.
                self.refuse(error);
                self.stop_listening();
                self.accept_again.reset(ACCEPT_PAUSE, None)?;
            }
        }
        Ok(())
    }

    fn refuse(&self, reason: impl std::fmt::Display) {
        if self.shared.connections_refused.count_loudly() {
            log::warn!(
                "{}: connection refused: {reason}",
                self.listener.path().display()
            );
        }
    }

    fn has_room(&self) -> bool {
        self.slots.len() - self.free.len() < CONNECTIONS_MAX
    }

    /// Watches a stream. The caller fills the slot that this returns. The kernel reports each change once.
    fn watch(&mut self, fd: RawFd) -> io::Result<usize> {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::Free);
            self.slots.len() - 1
        });
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(events, index as u64);
        let added = self.epoll.ctl(ControlOperation::Add, fd, event);
        if added.is_err() {
            self.free.push(index);
        }
        added.map(|()| index)
    }

    /// Closes the stream, which also stops watching it.
    fn remove(&mut self, index: usize) {
        let slot = std::mem::replace(&mut self.slots[index], Slot::Free);
        if let Slot::Connected { connection, .. } = slot {
            self.by_ports.remove(&connection.ports);
            self.count_connections();
        }
        self.free.push(index);
    }

    fn count_connections(&self) {
        let count = self.by_ports.len() as u64;
        self.shared.connections.set(count);
    }

    fn serve_stream(&mut self, index: usize, events: EventSet, turn: &mut Turn) {
        match self.slots.get_mut(index) {
            None | Some(Slot::Free) => {}
            Some(Slot::Greeting(greeting)) => {
                turn.charge_call(GREETING_BYTES_MAX as u64, GREETING_BYTES_MAX as u64);
                match greeting.read_line() {
                    Progress::Incomplete => {}
                    Progress::Port(port) => self.connect_to_guest(index, port),
                    Progress::Invalid => {
                        self.refuse("not CONNECT and a port");
                        self.remove(index);
                    }
                }
            }
            Some(Slot::Connected { connection, .. }) => {
                if events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
                    connection.host_readable();
                }
                if events.contains(EventSet::OUT) {
                    turn.charge_call(1, connection.host_writable() as u64);
                }
                if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                    connection.host_hung_up();
                }
                self.make_ready(index);
            }
            Some(Slot::Draining(connection)) => {
                turn.charge_call(1, connection.host_writable() as u64);
                if events.intersects(EventSet::HANG_UP | EventSet::ERROR)
                    || !connection.is_draining()
                {
                    self.remove(index);
                }
            }
        }
    }

    /// Handles the request of the program in `index` to connect to guest port `port`.
    fn connect_to_guest(&mut self, index: usize, port: u32) {
        let ports = Ports {
            host: self.new_host_port(port),
            guest: port,
        };
        // The stream is watched already, under the same number.
        if let Slot::Greeting(greeting) = std::mem::replace(&mut self.slots[index], Slot::Free) {
            self.connect(index, Connection::to_guest(ports, greeting.stream));
        }
    }

    fn connect(&mut self, index: usize, connection: Connection) {
        self.by_ports.insert(connection.ports, index);
        self.slots[index] = Slot::Connected {
            connection,
            queued: false,
        };
        self.shared.connections_opened.count();
        self.count_connections();
        self.make_ready(index);
    }

    /// A port that no connection to `guest` uses. There are more ports than connections.
    fn new_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = match host {
                LAST_HOST_PORT => FIRST_HOST_PORT,
                port => port + 1,
            };
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn make_ready(&mut self, index: usize) {
        if let Some(Slot::Connected { queued, .. }) = self.slots.get_mut(index)
            && !std::mem::replace(queued, true)
        {
            self.ready.push_back(index);
        }
    }

    /// Handles a packet of the guest; `data` contains its `len` bytes.
    pub(super) fn take_packet(&mut self, header: &Header, data: &[u8], turn: &mut Turn) {
        if header.src_cid != self.guest_cid || header.dst_cid != CID_HOST {
            self.shared.bad_packet("wrong address");
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let op = Op::from_repr(header.op).filter(|_| header.socket_type == TYPE_STREAM);
        let Some(&index) = self.by_ports.get(&ports) else {
            match op {
                Some(Op::Request) => self.connect_to_host(ports, header),
                // A reset gets no response; otherwise two sides could exchange resets endlessly.
                Some(Op::Reset) => {}
                Some(_) => self.push_reset(ports),
                None => {
                    self.shared.bad_packet("unknown type or operation");
                    self.push_reset(ports);
                }
            }
            return;
        };
        if op == Some(Op::Reset) {
            return self.reset_by_guest(index);
        }
        let Slot::Connected { connection, .. } = &mut self.slots[index] else {
            return;
        };
        connection.take_credit(header);
        let kept = match op {
            Some(Op::Response) => connection.accepted(),
            Some(Op::Data) => {
                turn.charge_call(1, data.len() as u64);
                connection.take_data(data)
            }
            Some(Op::Shutdown) => connection.take_shutdown(header.flags),
            Some(Op::CreditUpdate) => Ok(()),
            Some(Op::CreditRequest) => {
                connection.credit_requested();
                Ok(())
            }
            Some(Op::Request | Op::Reset) | None => Err(super::connection::Violation),
        };
        if kept.is_err() {
            connection.reset();
            self.shared.bad_packet("out of order, or beyond its credit");
        }
        self.make_ready(index);
    }

    /// The guest has removed a connection. After closing it, a guest does so within seconds, even if the host's program
    /// has not read everything.
    fn reset_by_guest(&mut self, index: usize) {
        self.ready.retain(|ready| *ready != index);
        let slot = std::mem::replace(&mut self.slots[index], Slot::Free);
        match slot {
            Slot::Connected { connection, .. } if connection.is_draining() => {
                self.by_ports.remove(&connection.ports);
                self.count_connections();
                self.slots[index] = Slot::Draining(connection);
            }
            slot => {
                self.slots[index] = slot;
                self.remove(index);
            }
        }
    }

    /// Handles the guest's request to connect to a host port: a socket whose path is the listener's plus the port.
    fn connect_to_host(&mut self, ports: Ports, request: &Header) {
        let mut path = self.listener.path().as_os_str().to_owned();
        path.push(format!("_{}", ports.host));
        let connected = if self.has_room() {
            connect(Path::new(&path))
        } else {
            Err(Errno::MFILE.into())
        };
        let watched = connected.and_then(|stream| Ok((self.watch(stream.as_raw_fd())?, stream)));
        match watched {
            Ok((index, stream)) => {
                self.connect(index, Connection::from_guest(ports, stream, request));
            }
            Err(error) => {
                self.shared.connections_refused.count();
                log::debug!("vsock: port {} of the host: {error}", ports.host);
                self.push_reset(ports);
            }
        }
    }

    fn push_reset(&mut self, ports: Ports) {
        if self.resets.len() < RESETS_MAX {
            self.resets.push_back(ports);
        } else {
            self.shared.resets_dropped.count();
        }
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest: its header, and at most `room` bytes of data in `buffer`. `None` if there is none.
    pub(super) fn next_packet(
        &mut self,
        buffer: &mut [u8],
        room: usize,
        turn: &mut Turn,
    ) -> Option<Header> {
        if let Some(ports) = self.resets.pop_front() {
            let reset = Outgoing {
                op: Op::Reset,
                flags: 0,
                len: 0,
            };
            return Some(self.header(ports, reset, 0));
        }
        // Each connection at most once: it moves to the end of the queue or is removed.
        for _ in 0..self.ready.len() {
            let index = self.ready.pop_front()?;
            let Slot::Connected { connection, queued } = &mut self.slots[index] else {
                continue;
            };
            turn.charge_call(1, 0);
            let ports = connection.ports;
            let Some(outgoing) = connection.next(buffer, room) else {
                *queued = false;
                // The caller will continue with the others.
                if turn.is_called() {
                    return None;
                }
                continue;
            };
            let forwarded = connection.forwarded();
            turn.charge_call(0, outgoing.len as u64);
            if outgoing.op == Op::Reset {
                self.remove(index);
            } else {
                self.ready.push_back(index);
            }
            return Some(self.header(ports, outgoing, forwarded));
        }
        None
    }

    fn header(&self, ports: Ports, outgoing: Outgoing, forwarded: u32) -> Header {
        Header {
            src_cid: CID_HOST,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            // At most the size of a buffer.
            len: outgoing.len as u32,
            socket_type: TYPE_STREAM,
            op: outgoing.op as u16,
            flags: outgoing.flags,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: forwarded,
        }
    }
}

impl Greeting {
    /// Reads one byte at a time, because data after the line belongs to the guest.
    fn read_line(&mut self) -> Progress {
        while self.line.len() < GREETING_BYTES_MAX {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => {
                    return self.port().map_or(Progress::Invalid, Progress::Port);
                }
                Ok(1) => self.line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Progress::Incomplete,
                Ok(_) | Err(_) => return Progress::Invalid,
            }
        }
        Progress::Invalid
    }

    fn port(&self) -> Option<u32> {
        let line = std::str::from_utf8(&self.line).ok()?;
        let mut words = line.split_ascii_whitespace();
        let is_connect = words.next()?.eq_ignore_ascii_case("connect");
        let port = words.next()?.parse().ok()?;
        (is_connect && words.next().is_none()).then_some(port)
    }
}
