//! Streams with a deadline for all of their I/O together.
//!
//! With a limit on each read and write, a client that transfers a byte now and then could hold its connection forever.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustls::{ServerConnection, StreamOwned};

/// A socket with time limits for reads and writes.
pub(super) trait Socket: Read + Write {
    fn limit(&self, timeout: Duration) -> io::Result<()>;

    /// Shuts down the sending side.
    fn end(&self);
}

impl Socket for UnixStream {
    fn limit(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }

    fn end(&self) {
        // The client may have disconnected.
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

/// A stream with a deadline.
pub(super) trait Timed: Read + Write {
    /// Sets the deadline to `until`.
    fn until(&mut self, until: Instant);

    /// Whether a response can be sent without waiting for the client.
    fn answers_at_once(&self) -> bool;

    /// Sends pending data and shuts down the sending side.
    fn finish(&mut self) -> io::Result<()>;
}

/// A socket with a deadline.
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

/// The same with TLS. The handshake takes place during the first read, and counts as part of the request.
impl<S: Socket> Timed for StreamOwned<ServerConnection, Limited<S>> {
    fn until(&mut self, until: Instant) {
        self.sock.until = until;
    }

    /// A handshake comes first.
    fn answers_at_once(&self) -> bool {
        false
    }

    fn finish(&mut self) -> io::Result<()> {
        self.conn.send_close_notify();
        self.flush()?;
        self.sock.finish()
    }
}
