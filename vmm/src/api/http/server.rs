//! The `http-server` thread: accepts clients, limits their number and time, and forwards responses.
//!
//! It blocks only in epoll. Requests go to the [`Handler`], which must not block either.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use micro_http::{Request, Version};
use virtio_devices::listening_socket::{ACCEPT_PAUSE, accept};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Deadlines, Step};
use super::reply::{Answer, Mailbox, Reply, Status};
use crate::threads::HTTP_THREAD;

/// Maximum number of concurrent clients, the same as upstream's.
pub const CONNECTIONS_MAX: usize = 10;

/// Maximum wait for pending responses when the server stops.
const FLUSH_WAIT: Duration = Duration::from_secs(1);
const READ_BYTES: usize = 16 << 10;
const STACK_BYTES: usize = 256 << 10;

const TOKEN_LISTENER: u64 = 0;
const TOKEN_WAKE: u64 = 1;
const TOKEN_FIRST_CLIENT: u64 = 2;

/// Serves requests. Called on the HTTP thread; slow work moves to another thread together with the [`Reply`].
pub trait Handler: Send + 'static {
    /// Responds to `request`, now or later.
    fn handle(&self, request: Request, reply: Reply);
}

/// Errors of starting the server.
#[derive(Debug, thiserror::Error)]
pub enum HttpServerError {
    /// No epoll, no eventfd, or the socket cannot be made non-blocking.
    #[error("Cannot set up the event loop of the HTTP server")]
    Setup(#[source] io::Error),
    /// The thread cannot be started.
    #[error("Cannot start the thread {HTTP_THREAD}")]
    Spawn(#[source] io::Error),
}

/// A running server; dropping it stops it after the pending responses have been sent.
#[derive(Debug)]
pub struct HttpServer {
    stop: Arc<AtomicBool>,
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

impl HttpServer {
    /// Serves `listener` on a separate thread, which calls `on_start` first.
    ///
    /// # Errors
    /// The host lacks descriptors or threads.
    pub fn start<H: Handler>(
        listener: UnixListener,
        handler: H,
        deadlines: Deadlines,
        on_start: impl FnOnce() + Send + 'static,
    ) -> Result<Self, HttpServerError> {
        let mailbox = Arc::new(Mailbox::new().map_err(HttpServerError::Setup)?);
        let stop = Arc::new(AtomicBool::new(false));
        let mut server = Loop::new(listener, handler, deadlines, Arc::clone(&mailbox))
            .map_err(HttpServerError::Setup)?;
        let stop_seen = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name(HTTP_THREAD.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                on_start();
                server.run(&stop_seen);
            })
            .map_err(HttpServerError::Spawn)?;
        Ok(Self {
            stop,
            mailbox,
            thread: Some(thread),
        })
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.mailbox.wake_up();
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            log::error!("The thread {HTTP_THREAD} panicked");
        }
    }
}

struct Loop<H> {
    listener: UnixListener,
    handler: H,
    deadlines: Deadlines,
    mailbox: Arc<Mailbox>,
    epoll: Epoll,
    clients: BTreeMap<u64, Client>,
    next_token: u64,
    accept_again_at: Option<Instant>,
    scratch: Vec<u8>,
}

struct Client {
    connection: Connection,
    interest: EventSet,
}

impl<H: Handler> Loop<H> {
    fn new(
        listener: UnixListener,
        handler: H,
        deadlines: Deadlines,
        mailbox: Arc<Mailbox>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        for (fd, token) in [
            (listener.as_raw_fd(), TOKEN_LISTENER),
            (mailbox.wake_fd().as_raw_fd(), TOKEN_WAKE),
        ] {
            epoll.ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(EventSet::IN, token),
            )?;
        }
        Ok(Self {
            listener,
            handler,
            deadlines,
            mailbox,
            epoll,
            clients: BTreeMap::new(),
            next_token: TOKEN_FIRST_CLIENT,
            accept_again_at: None,
            scratch: vec![0; READ_BYTES],
        })
    }

    fn run(&mut self, stop: &AtomicBool) {
        let mut stop_by: Option<Instant> = None;
        loop {
            if stop_by.is_none() && stop.load(Ordering::Acquire) {
                stop_by = Some(Instant::now() + FLUSH_WAIT);
                self.deliver_answers();
            }
            if let Some(by) = stop_by {
                let flushed = self
                    .clients
                    .values()
                    .all(|client| client.connection.is_flushed());
                if flushed || Instant::now() >= by {
                    return;
                }
            }
            if let Err(error) = self.turn(stop_by) {
                log::error!("The HTTP server stops: {error}");
                return;
            }
        }
    }

    /// Waits for events and handles them.
    fn turn(&mut self, stop_by: Option<Instant>) -> io::Result<()> {
        let mut events = [EpollEvent::default(); CONNECTIONS_MAX + 2];
        let timeout_ms = self.timeout_ms(stop_by);
        let count = match self.epoll.wait(timeout_ms, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let mut somebody_connects = false;
        for event in &events[..count] {
            match event.data() {
                TOKEN_LISTENER => somebody_connects = true,
                TOKEN_WAKE => self.deliver_answers(),
                token => self.on_client_events(token, event.event_set()),
            }
        }
        // Last, after clients that have hung up have freed their slots.
        if somebody_connects {
            self.accept();
        }
        self.expire();
        Ok(())
    }

    fn timeout_ms(&self, stop_by: Option<Instant>) -> i32 {
        let now = Instant::now();
        self.clients
            .values()
            .filter_map(|client| client.connection.deadline(&self.deadlines))
            .chain(self.accept_again_at)
            .chain(stop_by)
            .min()
            .map_or(-1, |due| {
                // Rounded up: waking too early would busy-wait until the deadline.
                let wait_ms = due.saturating_duration_since(now).as_millis() + 1;
                i32::try_from(wait_ms).unwrap_or(i32::MAX)
            })
    }

    fn on_client_events(&mut self, token: u64, events: EventSet) {
        let now = Instant::now();
        if let Some(client) = self.clients.get_mut(&token) {
            let step = client.connection.on_events(events, now, &mut self.scratch);
            self.take_step(token, step);
        }
    }

    fn deliver_answers(&mut self) {
        let now = Instant::now();
        for (token, answer) in self.mailbox.take() {
            // If the client has disconnected meanwhile, the response is dropped.
            if let Some(client) = self.clients.get_mut(&token) {
                let step = client.connection.answer(&answer, now);
                self.take_step(token, step);
            }
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        if self.accept_again_at.is_some_and(|at| now >= at) {
            self.accept_again_at = None;
            self.watch_listener(EventSet::IN);
        }
        let expired: Vec<u64> = self
            .clients
            .iter()
            .filter(|(_, client)| {
                client
                    .connection
                    .deadline(&self.deadlines)
                    .is_some_and(|due| now >= due)
            })
            .map(|(token, _)| *token)
            .collect();
        for token in expired {
            if let Some(client) = self.clients.get_mut(&token) {
                let step = client.connection.expire(now);
                self.take_step(token, step);
            }
        }
    }

    fn take_step(&mut self, token: u64, step: Step) {
        match step {
            Step::Wait => {}
            Step::Serve(request) => {
                let reply = Reply::new(token, Arc::clone(&self.mailbox));
                self.handler.handle(*request, reply);
            }
            Step::Close => {
                // Closing the descriptor removes it from the epoll set, too.
                self.clients.remove(&token);
                return;
            }
        }
        let Some(client) = self.clients.get_mut(&token) else {
            return;
        };
        let interest = client.connection.interest();
        if interest == client.interest {
            return;
        }
        client.interest = interest;
        let changed = self.epoll.ctl(
            ControlOperation::Modify,
            client.connection.as_raw_fd(),
            EpollEvent::new(interest, token),
        );
        if let Err(error) = changed {
            log::warn!("A client of the API is dropped: {error}");
            self.clients.remove(&token);
        }
    }

    /// Accepts as many clients as there is room for, but at least one, which may be rejected: another client may hang
    /// up before the next attempt. This keeps many connection attempts from starving connected clients.
    fn accept(&mut self) {
        let room = CONNECTIONS_MAX.saturating_sub(self.clients.len());
        for _ in 0..room.max(1) {
            match accept(&self.listener) {
                Ok(Some(stream)) => self.admit(stream),
                Ok(None) => return,
                Err(error) => {
                    log::warn!("The API temporarily accepts no connections: {error}");
                    self.accept_again_at = Some(Instant::now() + ACCEPT_PAUSE);
                    self.watch_listener(EventSet::empty());
                    return;
                }
            }
        }
    }

    fn watch_listener(&self, interest: EventSet) {
        let changed = self.epoll.ctl(
            ControlOperation::Modify,
            self.listener.as_raw_fd(),
            EpollEvent::new(interest, TOKEN_LISTENER),
        );
        if let Err(error) = changed {
            log::error!("The API socket cannot be watched: {error}");
        }
    }

    fn admit(&mut self, stream: UnixStream) {
        let now = Instant::now();
        if self.clients.len() >= CONNECTIONS_MAX && !self.evict(now) {
            refuse_full(stream);
            return;
        }
        let token = self.next_token;
        self.next_token += 1;
        let connection = Connection::new(stream, now);
        let interest = connection.interest();
        let added = self.epoll.ctl(
            ControlOperation::Add,
            connection.as_raw_fd(),
            EpollEvent::new(interest, token),
        );
        if let Err(error) = added {
            log::warn!("A client of the API is dropped: {error}");
            return;
        }
        self.clients.insert(
            token,
            Client {
                connection,
                interest,
            },
        );
    }

    /// Makes room by dropping the connection that has been idle longest, if it has been idle long enough.
    fn evict(&mut self, now: Instant) -> bool {
        let longest_idle = self
            .clients
            .iter()
            .filter(|(_, client)| client.connection.may_be_evicted(now, &self.deadlines))
            .min_by_key(|(_, client)| client.connection.last_progress())
            .map(|(token, _)| *token);
        match longest_idle {
            Some(token) => self.clients.remove(&token).is_some(),
            None => false,
        }
    }
}

/// Rejects a client because there is no room. The response fits any socket buffer, so one non-blocking attempt is
/// enough.
fn refuse_full(mut stream: UnixStream) {
    let answer = Answer::refusal(Status::ServiceUnavailable, "Too many open connections");
    if let Err(error) = stream.write_all(&answer.to_bytes(Version::Http11)) {
        log::debug!("A client was refused and did not learn why: {error}");
    }
}
