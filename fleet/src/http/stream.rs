//! Streams that are given up at a moment, however little goes through them until then.
//!
//! A limit on each read and write would let a client that takes a byte now and then hold its connection for ever.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustls::{ServerConnection, StreamOwned};

/// A socket whose reads and writes can be given a limit.
pub(super) trait Socket: Read + Write {
    fn limit(&self, timeout: Duration) -> io::Result<()>;

    /// Says that nothing more comes.
    fn end(&self);
}

impl Socket for UnixStream {
    fn limit(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }

    fn end(&self) {
        // The other side may be gone.
        let _ = self.shutdown(Shutdown::Write);
    }
}

impl Socket for TcpStream {
    fn limit(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }

    fn end(&self) {
        // As above.
        let _ = self.shutdown(Shutdown::Write);
    }
}

/// A stream with a moment at which it is given up.
pub(super) trait Timed: Read + Write {
    /// From now on, at `until`.
    fn until(&mut self, until: Instant);

    /// Whether an answer can be sent without waiting for the other side.
    fn answers_at_once(&self) -> bool;

    /// Sends what is left, and that nothing more comes.
    fn finish(&mut self) -> io::Result<()>;
}

/// A socket that is given up at a moment.
#[derive(Debug)]
pub(super) struct Limited<S> {
    socket: S,
    until: Instant,
}

impl<S: Socket> Limited<S> {
    pub(super) fn new(socket: S) -> Self {
        let until = Instant::now();
        Self { socket, until }
    }

    fn arm(&self) -> io::Result<()> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.limit(left)
    }
}

impl<S: Socket> Read for Limited<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.arm()?;
        self.socket.read(buffer)
    }
}

impl<S: Socket> Write for Limited<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.arm()?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

impl<S: Socket> Timed for Limited<S> {
    fn until(&mut self, until: Instant) {
        self.until = until;
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn finish(&mut self) -> io::Result<()> {
        self.flush()?;
        self.socket.end();
        Ok(())
    }
}

/// The same with TLS on it. The handshake takes place with the first read, and counts as part of the request.
impl<S: Socket> Timed for StreamOwned<ServerConnection, Limited<S>> {
    fn until(&mut self, until: Instant) {
        self.sock.until = until;
    }

    /// First there is a handshake.
    fn answers_at_once(&self) -> bool {
        false
    }

    fn finish(&mut self) -> io::Result<()> {
        self.conn.send_close_notify();
        self.flush()?;
        self.sock.finish()
    }
}
