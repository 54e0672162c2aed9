//! The connection between source and target.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use virtio_devices::ListeningSocket;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::errno;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::MigrationError;
use super::tls::{Session, SourceTls, TargetTls, TlsStream};
use super::wire::{self, Channel};

/// How often a waiting thread checks whether the migration was cancelled.
const TICK: Duration = Duration::from_millis(100);
/// How often a client tries to connect to a UNIX socket whose queue is full.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);

/// Where the target listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `tcp:ADDRESS:PORT`
    Tcp(SocketAddr),
    /// `unix:PATH`
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(to, "tcp:{address}"),
            Self::Unix(path) => write!(to, "unix:{}", path.display()),
        }
    }
}

impl Address {
    /// Parses a URL. Names of hosts are not resolved: a confined process cannot read the files for that.
    ///
    /// # Errors
    /// It is not such a URL.
    pub fn parse(url: &str) -> Result<Self, MigrationError> {
        let tcp = url.strip_prefix("tcp:").and_then(|it| it.parse().ok());
        let unix = url.strip_prefix("unix:").map(PathBuf::from);
        let unix = unix.filter(|path| path.is_absolute());
        tcp.map(Self::Tcp)
            .or(unix.map(Self::Unix))
            .ok_or_else(|| MigrationError::Url {
                url: url.to_owned(),
            })
    }

    /// The path of a UNIX socket.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp(_) => None,
        }
    }

    /// Connects within `limit`.
    pub(super) fn connect(&self, cancel: &Cancel, limit: Duration) -> Result<Peer, MigrationError> {
        let connected = match self {
            Self::Tcp(address) => TcpStream::connect_timeout(address, limit).map(Stream::Tcp),
            Self::Unix(path) => connect_unix(path, cancel, limit).map(Stream::Unix),
        };
        connected
            .and_then(|stream| Peer::new(stream, cancel.clone()))
            .map_err(|source| MigrationError::Connect {
                address: self.to_string(),
                source,
            })
    }
}

/// The target of a migration.
#[derive(Debug)]
pub struct Destination {
    /// Where it listens.
    pub address: Address,
    /// Encrypts the connections, if it does so, too.
    pub tls: Option<SourceTls>,
}

impl Destination {
    /// Connects within `limit`.
    pub(super) fn connect(&self, cancel: &Cancel, limit: Duration) -> Result<Peer, MigrationError> {
        let peer = self.address.connect(cancel, limit)?;
        let (Some(tls), Address::Tcp(address)) = (&self.tls, &self.address) else {
            return Ok(peer);
        };
        let secured = tls.session(address.ip());
        let secured = secured.and_then(|session| peer.secured(session, limit));
        secured.map_err(|source| MigrationError::Handshake {
            address: self.address.to_string(),
            source,
        })
    }
}

/// `UnixStream::connect` would wait as long as the listener's queue is full.
fn connect_unix(path: &Path, cancel: &Cancel, limit: Duration) -> io::Result<UnixStream> {
    let until = Instant::now() + limit;
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match net::connect(&socket, &address) {
            Err(Errno::AGAIN) if Instant::now() < until => {
                cancel.check()?;
                std::thread::sleep(CONNECT_INTERVAL);
            }
            Err(error) => return Err(error.into()),
            Ok(()) => return Ok(socket.into()),
        }
    }
}

/// Ends the waits of a migration's thread.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Cancels.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was cancelled.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Why a migration that failed with `error` has ended.
    pub(super) fn or(&self, error: MigrationError) -> MigrationError {
        match self.is_set() {
            true => MigrationError::Cancelled,
            false => error,
        }
    }

    fn check(&self) -> io::Result<()> {
        match self.is_set() {
            true => Err(io::Error::other("the migration was cancelled")),
            false => Ok(()),
        }
    }
}

/// The socket of a target.
#[derive(Debug)]
pub struct Listener {
    socket: ListenerSocket,
    readable: Epoll,
    tls: Option<TargetTls>,
}

#[derive(Debug)]
enum ListenerSocket {
    Tcp(TcpListener),
    /// Its path is removed on drop.
    Unix(ListeningSocket),
}

impl Listener {
    /// Listens on `address`. A stale UNIX socket is replaced. With `tls`, connections are encrypted.
    ///
    /// # Errors
    /// The address is in use or not one of this host.
    pub fn bind(address: &Address, tls: Option<TargetTls>) -> Result<Self, MigrationError> {
        Self::try_bind(address, tls).map_err(|source| MigrationError::Listen {
            address: address.to_string(),
            source,
        })
    }

    fn try_bind(address: &Address, tls: Option<TargetTls>) -> io::Result<Self> {
        let socket = match address {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                ListenerSocket::Tcp(listener)
            }
            Address::Unix(path) => ListenerSocket::Unix(ListeningSocket::bind(path)?),
        };
        let readable = Epoll::new()?;
        let interest = EpollEvent::new(EventSet::IN, 0);
        readable.ctl(ControlOperation::Add, socket.as_raw_fd(), interest)?;
        Ok(Self {
            socket,
            readable,
            tls,
        })
    }

    /// The address, with the port that the host has chosen.
    #[cfg(any(test, fuzzing))]
    pub(super) fn address(&self) -> Address {
        match &self.socket {
            ListenerSocket::Tcp(listener) => Address::Tcp(listener.local_addr().expect("bound")),
            ListenerSocket::Unix(socket) => Address::Unix(socket.path().to_owned()),
        }
    }

    /// Waits for a connection, until `until` if given. A client has `limit` for the TLS handshake; if it fails, the next
    /// one is waited for.
    pub(super) fn accept(
        &self,
        cancel: &Cancel,
        limit: Duration,
        until: Option<Instant>,
    ) -> io::Result<Peer> {
        loop {
            let peer = self.accept_plain(cancel, until)?;
            let Some(tls) = &self.tls else {
                return Ok(peer);
            };
            match tls
                .session()
                .and_then(|session| peer.secured(session, limit))
            {
                Ok(peer) => return Ok(peer),
                Err(error) => {
                    let error = api::error_line(&error);
                    log::warn!("The TLS handshake with a client failed: {error}");
                }
            }
        }
    }

    fn accept_plain(&self, cancel: &Cancel, until: Option<Instant>) -> io::Result<Peer> {
        loop {
            let accepted = match &self.socket {
                ListenerSocket::Tcp(listener) => {
                    listener.accept().map(|(stream, _)| Stream::Tcp(stream))
                }
                ListenerSocket::Unix(socket) => match socket.accept() {
                    Ok(Some(stream)) => Ok(Stream::Unix(stream)),
                    Ok(None) => Err(io::ErrorKind::WouldBlock.into()),
                    Err(error) => Err(error),
                },
            };
            match accepted {
                Ok(stream) => return Peer::new(stream, cancel.clone()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The client was gone before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            }
            cancel.check()?;
            if until.is_some_and(|until| Instant::now() >= until) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut events = [EpollEvent::default()];
            match self.readable.wait(TICK.as_millis() as i32, &mut events) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
    }
}

impl AsRawFd for ListenerSocket {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Tcp(listener) => listener.as_raw_fd(),
            Self::Unix(socket) => socket.as_raw_fd(),
        }
    }
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream>),
}

/// One end of a connection; clones share it, but not the limits.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    stream: Arc<Stream>,
    cancel: Cancel,
    /// For one message.
    limit: Duration,
    /// For all messages.
    until: Option<Instant>,
    /// For the current message.
    message_until: Option<Instant>,
    /// On all connections of the migration.
    written: Arc<AtomicU64>,
    /// Set if another connection of the migration has failed: this one then ends, too.
    broken: Cancel,
}

impl Peer {
    fn new(stream: Stream, cancel: Cancel) -> io::Result<Self> {
        match &stream {
            Stream::Tcp(stream) => {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(TICK))?;
                stream.set_write_timeout(Some(TICK))?;
            }
            Stream::Unix(stream) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(TICK))?;
                stream.set_write_timeout(Some(TICK))?;
            }
            Stream::Tls(_) => {}
        }
        Ok(Self {
            stream: Arc::new(stream),
            cancel,
            limit: Duration::ZERO,
            until: None,
            message_until: None,
            written: Arc::default(),
            broken: Cancel::default(),
        })
    }

    /// Encrypts the connection: completes the handshake within `limit`, and waits for the target's verdict on it.
    fn secured(mut self, session: Session, limit: Duration) -> io::Result<Self> {
        let Some(Stream::Tcp(socket)) = Arc::into_inner(self.stream) else {
            return Err(io::Error::other("only a TCP connection can be encrypted"));
        };
        let stream = TlsStream::new(session, socket);
        let is_source = stream.is_of_source();
        self.stream = Arc::new(Stream::Tls(Box::new(stream)));
        self.limit = limit;
        self.begin_message();
        self.patiently(|stream| match stream {
            Stream::Tls(stream) => match stream.shake_hands()? {
                true => Ok(1),
                false => Err(io::ErrorKind::WouldBlock.into()),
            },
            _ => Ok(0),
        })?;
        match is_source {
            true => self.read_exact(&mut [0])?,
            false => {
                self.write_all(&[0])?;
                self.flush()?;
            }
        }
        Ok(self)
    }

    /// Makes this a connection of the same migration as `first`.
    pub(super) fn join(&mut self, first: &Self) {
        self.written = Arc::clone(&first.written);
        self.broken = first.broken.clone();
    }

    /// Ends the transfers on all other connections of the migration.
    pub(super) fn break_others(&self) {
        self.broken.set();
    }

    /// Bytes sent so far.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Every message must be complete then, or there is no such time.
    pub(super) fn set_end(&mut self, until: Option<Instant>) {
        self.until = until;
    }

    /// Whether that time has come.
    pub(super) fn is_over(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }

    /// Waits until `due`, unless the migration ends before.
    pub(super) fn wait_until(&self, due: Instant) {
        while !self.cancel.is_set() && !self.broken.is_set() && !self.is_over() {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(TICK));
        }
    }

    /// Waits regardless of a cancellation and of other connections from now on: the outcome no longer depends on them.
    pub(super) fn ignore_cancel(&mut self) {
        self.cancel = Cancel::default();
        self.broken = Cancel::default();
    }

    /// Repeats `transfer` until it moves bytes, the time of the message is over, or the migration is cancelled.
    fn patiently(
        &self,
        mut transfer: impl FnMut(&Stream) -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            self.cancel.check()?;
            if self.broken.is_set() {
                let reason = "another connection of the migration has failed";
                return Err(io::Error::other(reason));
            }
            if self
                .message_until
                .is_none_or(|until| Instant::now() >= until)
            {
                let reason = "the peer did not send or accept a whole message in time";
                return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
            }
            match transfer(&self.stream) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted
                            | io::ErrorKind::WouldBlock
                            | io::ErrorKind::TimedOut
                    ) => {}
                moved => return moved,
            }
        }
    }
}

impl Channel for Peer {
    fn begin_message(&mut self) {
        let own = Instant::now() + self.limit;
        self.message_until = Some(self.until.map_or(own, |until| until.min(own)));
    }

    fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    fn send_file(&mut self, file: &File) -> io::Result<()> {
        self.patiently(|stream| match stream {
            Stream::Tcp(_) | Stream::Tls(_) => Err(wire::no_files()),
            Stream::Unix(stream) => stream
                .send_with_fd(&[0_u8][..], file.as_raw_fd())
                .map_err(of_errno),
        })
        .map(drop)
    }

    fn receive_file(&mut self) -> io::Result<Option<File>> {
        let mut received = None;
        let bytes = self.patiently(|stream| match stream {
            Stream::Tcp(_) | Stream::Tls(_) => Err(wire::no_files()),
            Stream::Unix(stream) => {
                let (bytes, file) = stream.recv_with_fd(&mut [0]).map_err(of_errno)?;
                received = file;
                Ok(bytes)
            }
        })?;
        match bytes {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(received),
        }
    }
}

fn of_errno(error: errno::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl Read for Peer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.patiently(|stream| match stream {
            Stream::Tcp(stream) => (&*stream).read(buffer),
            Stream::Unix(stream) => (&*stream).read(buffer),
            Stream::Tls(stream) => stream.read(buffer),
        })
    }
}

impl Write for Peer {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.patiently(|stream| match stream {
            Stream::Tcp(stream) => (&*stream).write(data),
            Stream::Unix(stream) => (&*stream).write(data),
            Stream::Tls(stream) => stream.write(data),
        })?;
        self.written.fetch_add(written as u64, Ordering::Relaxed);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.patiently(|stream| match stream {
            Stream::Tls(stream) => stream.flush().map(|()| 0),
            Stream::Tcp(_) | Stream::Unix(_) => Ok(0),
        })
        .map(drop)
    }
}
