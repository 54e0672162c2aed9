//! One client: reads a request, waits for its response, writes it, and reads the next request.
//!
//! ```text
//!            request complete            answer written
//!  Reading ───────────────────► Busy ───────────────────► Reading
//!     │ not HTTP, too large,      │ client wants no more
//!     │ too slow                  ▼
//!     └──────────────────────► Closing ──► Lingering ──► gone
//! ```
//! Lingering reads and discards further data from the client. Closing a UNIX socket with unread bytes would break the
//! client's write and keep it from reading the reason for the rejection.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use micro_http::{Request, Version};
use vmm_sys_util::epoll::EventSet;

use super::framing::Framer;
use super::receive::{FDS_MAX, receive};
use super::reply::{Answer, Status};

/// Maximum number of bytes read and discarded from a rejected client.
const LINGER_BYTES_MAX: usize = 16 << 20;

/// Time limits of a client.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// Maximum silence within a request, or while the client does not read a response.
    pub stall: Duration,
    /// Maximum time for one whole request, even if bytes keep arriving.
    pub request: Duration,
    /// Minimum idle time before a connection can be closed in favour of another client.
    pub idle_grace: Duration,
    /// How long data from a rejected client is read.
    pub linger: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            stall: Duration::from_secs(5),
            request: Duration::from_secs(30),
            idle_grace: Duration::from_secs(5),
            linger: Duration::from_secs(2),
        }
    }
}

/// The server's next action for a connection.
#[derive(Debug)]
pub(super) enum Step {
    /// Wait for the next event.
    Wait,
    /// Pass this request to the handler.
    Serve(Box<Request>),
    /// Drop the connection.
    Close,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Reading,
    Busy,
    Closing,
    Lingering { discarded_bytes: usize },
}

/// One client.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    framer: Framer,
    files: Vec<File>,
    output: Vec<u8>,
    phase: Phase,
    version: Version,
    close_after_answer: bool,
    request_begun: Instant,
    last_progress: Instant,
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Connection {
    /// Takes over a non-blocking stream.
    pub(super) fn new(stream: UnixStream, now: Instant) -> Self {
        Self {
            stream,
            framer: Framer::default(),
            files: Vec::new(),
            output: Vec::new(),
            phase: Phase::Reading,
            version: Version::Http11,
            close_after_answer: false,
            request_begun: now,
            last_progress: now,
        }
    }

    /// The events to wait for. The server does not read from a client whose request is in progress, so that the client
    /// cannot fill memory with further requests.
    pub(super) fn interest(&self) -> EventSet {
        let mut interest = EventSet::empty();
        if matches!(self.phase, Phase::Reading | Phase::Lingering { .. }) {
            interest |= EventSet::IN;
        }
        if !self.output.is_empty() {
            interest |= EventSet::OUT;
        }
        interest
    }

    /// When [`Connection::expire`] is due.
    pub(super) fn deadline(&self, deadlines: &Deadlines) -> Option<Instant> {
        match self.phase {
            Phase::Lingering { .. } => Some(self.request_begun + deadlines.linger),
            _ if !self.output.is_empty() => Some(self.last_progress + deadlines.stall),
            Phase::Reading if !self.framer.is_empty() => Some(
                (self.last_progress + deadlines.stall).min(self.request_begun + deadlines.request),
            ),
            _ => None,
        }
    }

    /// True if this connection can be closed in favour of another client.
    pub(super) fn may_be_evicted(&self, now: Instant, deadlines: &Deadlines) -> bool {
        match self.phase {
            Phase::Lingering { .. } => true,
            Phase::Reading => {
                self.framer.is_empty()
                    && self.output.is_empty()
                    && now.saturating_duration_since(self.last_progress) >= deadlines.idle_grace
            }
            Phase::Busy | Phase::Closing => false,
        }
    }

    /// The time of the connection's last activity.
    pub(super) fn last_progress(&self) -> Instant {
        self.last_progress
    }

    /// True if nothing is left to be written.
    pub(super) fn is_flushed(&self) -> bool {
        self.output.is_empty()
    }

    /// Handles what epoll reported.
    pub(super) fn on_events(&mut self, events: EventSet, now: Instant, scratch: &mut [u8]) -> Step {
        if events.contains(EventSet::OUT) && self.flush(now).is_err() {
            return Step::Close;
        }
        if events.contains(EventSet::IN) {
            return self.read(now, scratch);
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            return Step::Close;
        }
        self.advance(now)
    }

    /// Called when the deadline has passed: rejects a half-sent request, and drops the connection in any other state.
    pub(super) fn expire(&mut self, now: Instant) -> Step {
        if self.phase == Phase::Reading && self.output.is_empty() {
            return self.refuse("The request was not completed in time.", now);
        }
        Step::Close
    }

    /// Writes the response to the request in progress, and processes what was received after it.
    pub(super) fn answer(&mut self, answer: &Answer, now: Instant) -> Step {
        if self.phase != Phase::Busy {
            return Step::Wait;
        }
        self.output
            .extend_from_slice(&answer.to_bytes(self.version));
        self.phase = if self.close_after_answer {
            Phase::Closing
        } else {
            Phase::Reading
        };
        self.request_begun = now;
        self.last_progress = now;
        if self.flush(now).is_err() {
            return Step::Close;
        }
        self.advance(now)
    }

    fn read(&mut self, now: Instant, scratch: &mut [u8]) -> Step {
        let (received, files) = match receive(&self.stream, scratch) {
            Ok((0, _)) => return Step::Close,
            Ok(received) => received,
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                return Step::Wait;
            }
            Err(_) => return Step::Close,
        };
        if let Phase::Lingering { discarded_bytes } = &mut self.phase {
            *discarded_bytes += received;
            return if *discarded_bytes > LINGER_BYTES_MAX {
                Step::Close
            } else {
                Step::Wait
            };
        }
        self.last_progress = now;
        if self.framer.is_empty() {
            self.request_begun = now;
        }
        self.files.extend(files);
        if self.files.len() > FDS_MAX {
            return self.refuse("Too many file descriptors came with the request.", now);
        }
        self.framer.push(&scratch[..received]);
        self.advance(now)
    }

    fn advance(&mut self, now: Instant) -> Step {
        if self.phase != Phase::Reading || !self.output.is_empty() {
            return Step::Wait;
        }
        match self.framer.next() {
            Ok(Some(mut request)) => {
                request.files = std::mem::take(&mut self.files);
                self.version = request.http_version();
                self.close_after_answer =
                    self.version == Version::Http10 || asks_to_close(&request);
                self.phase = Phase::Busy;
                Step::Serve(Box::new(request))
            }
            Ok(None) => {
                if self.framer.take_continue_due() {
                    self.output = Answer::empty(Status::Continue).to_bytes(Version::Http11);
                    if self.flush(now).is_err() {
                        return Step::Close;
                    }
                }
                Step::Wait
            }
            Err(error) => self.refuse(&error.to_string(), now),
        }
    }

    fn refuse(&mut self, reason: &str, now: Instant) -> Step {
        let text = format!("{reason}\nAll previous unanswered requests will be dropped.");
        let answer = Answer::refusal(Status::BadRequest, &text);
        self.framer = Framer::default();
        self.files.clear();
        self.output
            .extend_from_slice(&answer.to_bytes(Version::Http11));
        self.phase = Phase::Closing;
        match self.flush(now) {
            Ok(()) => Step::Wait,
            Err(_) => Step::Close,
        }
    }

    /// Writes as much as the client accepts.
    fn flush(&mut self, now: Instant) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.output.drain(..written);
                    self.last_progress = now;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        if self.phase == Phase::Closing {
            self.stream.shutdown(Shutdown::Write)?;
            self.phase = Phase::Lingering { discarded_bytes: 0 };
            self.request_begun = now;
        }
        Ok(())
    }
}

fn asks_to_close(request: &Request) -> bool {
    request
        .headers
        .custom_entries()
        .iter()
        .any(|(name, value)| {
            name.eq_ignore_ascii_case("connection") && value.eq_ignore_ascii_case("close")
        })
}
