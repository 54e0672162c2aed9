//! The link, a handler without queues: connects to the back end, and passes the rings to it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_MQ;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::counters::Shared;
use super::gate::{Gate, Reason, Step};
use super::identity::{Identity, Learned};
use super::profile::Profile;
use super::session::{Session, SessionError};
use crate::device::{Activation, HandlerState, QueueHandler, WorkerError};
use crate::listening_socket::ListeningSocket;
use crate::unix_connect::connect;
use crate::worker::{EventSources, Turn};

/// Delay before the first attempt after a failure; doubled for each further failure.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// Kernel limit of a thread name, without the final zero.
const NAME_BYTES_MAX: usize = 15;

// Data in the epoll set.
const WAKE: u64 = 0;
const RETRY: u64 = 1;
const SOCKET: u64 = 2;
const LISTENER: u64 = 3;

/// How the connection to the back end is established.
#[derive(Debug)]
pub enum Endpoint {
    /// The back end listens on this path.
    Connect(PathBuf),
    /// The VMM listens.
    Listen(ListeningSocket),
}

impl Endpoint {
    fn path(&self) -> &Path {
        match self {
            Self::Connect(path) => path,
            Self::Listen(socket) => socket.path(),
        }
    }

    /// A connection; none if the back end has not connected yet.
    fn meet(&self) -> io::Result<Option<UnixStream>> {
        let stream = match self {
            Self::Connect(path) => connect(path)?,
            Self::Listen(socket) => match socket.accept()? {
                Some(stream) => stream,
                None => return Ok(None),
            },
        };
        stream.set_nonblocking(false)?;
        Ok(Some(stream))
    }
}

/// Receives the properties of the device that the back end reports.
struct Lesson {
    profile: Profile,
    queue_sizes: Vec<u16>,
    learned: Arc<Learned>,
}

/// The handler without queues.
pub(crate) struct Link {
    name: String,
    endpoint: Endpoint,
    queues: usize,
    gate: Arc<Gate>,
    shared: Arc<Shared>,
    epoll: Epoll,
    retry: TimerFd,
    /// Delay before the next attempt.
    pause: Duration,
    /// The timer is running.
    waiting: bool,
    session: Option<Session>,
    /// The failure that was logged last.
    failure: Option<String>,
    lesson: Option<Lesson>,
}

impl Link {
    pub(crate) fn new(
        id: &str,
        endpoint: Endpoint,
        queues: usize,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let gate = Arc::new(Gate::new()?);
        let epoll = Epoll::new()?;
        let retry = TimerFd::new()?;
        if let Endpoint::Listen(socket) = &endpoint {
            // While one client is connected, another waits in the backlog.
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER);
            epoll.ctl(ControlOperation::Add, socket.as_raw_fd(), event)?;
        }
        for (fd, datum) in [(gate.wake_fd(), WAKE), (retry.as_raw_fd(), RETRY)] {
            let event = EpollEvent::new(EventSet::IN, datum);
            epoll.ctl(ControlOperation::Add, fd, event)?;
        }
        let mut name: String = id.chars().filter(char::is_ascii).collect();
        name.truncate(NAME_BYTES_MAX - "_link".len());
        Ok(Self {
            name: name + "_link",
            endpoint,
            queues,
            gate,
            shared,
            epoll,
            retry,
            pause: RETRY_MIN,
            waiting: false,
            session: None,
            failure: None,
            lesson: None,
        })
    }

    /// A link that reads features and configuration space from each back end.
    pub(super) fn learning(
        mut self,
        profile: Profile,
        queue_sizes: Vec<u16>,
        learned: Arc<Learned>,
    ) -> Self {
        self.lesson = Some(Lesson {
            profile,
            queue_sizes,
            learned,
        });
        self
    }

    pub(super) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Handles events, then does all work that is possible now.
    fn work(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 4];
        let count = self.epoll.wait(0, &mut events)?;
        for event in &events[..count] {
            match event.data() {
                WAKE => self.gate.drain(),
                LISTENER => {}
                RETRY => {
                    self.retry.wait()?;
                    self.waiting = false;
                }
                // The back end sends nothing between calls, so any event means that the connection is broken.
                _ if self.session.is_some() => {
                    if !event.event_set().contains(EventSet::READ_HANG_UP) {
                        self.shared.protocol_errors.count();
                    }
                    self.lose("the back end has closed the connection")?;
                }
                _ => {}
            }
        }
        self.advance()
    }

    fn advance(&mut self) -> io::Result<()> {
        loop {
            match self.gate.next(self.session.is_some()) {
                Step::Connect if self.waiting => return Ok(()),
                Step::Connect => {
                    if !self.connect()? {
                        return Ok(());
                    }
                }
                Step::Start(rings, pairs) => {
                    let own = self.lesson.as_ref();
                    let own = own.map_or(0, |lesson| lesson.profile.own_features);
                    let started = self
                        .session
                        .as_mut()
                        .map(|session| session.start(&rings, own, pairs));
                    match started {
                        Some(Ok(())) => {
                            self.shared.serving.set(1);
                            self.recovered();
                            // Interrupts for chains that the previous back end completed may be lost.
                            for ring in &rings.rings {
                                rings.interrupt.signal_queue(ring.index);
                            }
                            self.gate.end_talk(true);
                        }
                        failed => self.refused(failed.and_then(Result::err))?,
                    }
                }
                Step::SetPairs(rings, pairs, before) => {
                    let session = self.session.as_mut();
                    match session.map(|session| session.set_pairs(&rings, pairs, before)) {
                        Some(Ok(())) => self.gate.end_talk(true),
                        failed => self.refused(failed.and_then(Result::err))?,
                    }
                }
                Step::Stop(rings) => {
                    let stopped = self.session.as_mut().map(|session| session.stop(&rings));
                    match stopped {
                        Some(Ok(wrong)) => {
                            self.shared.protocol_errors.add(wrong);
                            self.shared.serving.set(0);
                            self.gate.end_talk(false);
                        }
                        failed => self.refused(failed.and_then(Result::err))?,
                    }
                }
                Step::Rest => return Ok(()),
            }
        }
    }

    /// Connects. Returns whether a session exists.
    fn connect(&mut self) -> io::Result<bool> {
        let met = self.endpoint.meet().and_then(|met| match met {
            Some(stream) => Ok(Some((stream.try_clone()?, stream))),
            None => Ok(None),
        });
        let (other, stream) = match met {
            Ok(Some(connected)) => connected,
            Ok(None) => return Ok(false),
            Err(error) => {
                self.report(format!("cannot connect to the back end: {error}"));
                self.wait_for_next()?;
                return Ok(false);
            }
        };
        if !self.gate.greet(other) {
            return Ok(false);
        }
        match self.greet(stream) {
            Ok(session) => {
                let event = EpollEvent::new(EventSet::IN | EventSet::READ_HANG_UP, SOCKET);
                self.epoll.ctl(ControlOperation::Add, session.fd(), event)?;
                self.session = Some(session);
                self.shared.connections.count();
                self.shared.connected.set(1);
                self.gate.end_talk(false);
                Ok(true)
            }
            Err(error) => {
                self.refused(Some(error))?;
                Ok(false)
            }
        }
    }

    fn greet(&self, stream: UnixStream) -> Result<Session, SessionError> {
        let session = Session::open(stream, self.queues)?;
        if let Some(lesson) = &self.lesson {
            let features = session.features();
            let missing = 1 << VIRTIO_F_VERSION_1 & !features;
            if missing != 0 {
                return Err(SessionError::Features { missing });
            }
            if lesson.profile.has_several_pairs() && features & 1 << VIRTIO_NET_F_MQ == 0 {
                let wanted = self.queues;
                return Err(SessionError::OnePair { wanted });
            }
            let config = session.config(lesson.profile.config_size())?;
            let config = lesson.profile.complete(config, &lesson.queue_sizes);
            lesson.learned.learn(Identity { features, config });
        }
        Ok(session)
    }

    /// Handles a failed handshake or message exchange.
    fn refused(&mut self, error: Option<SessionError>) -> io::Result<()> {
        self.shared.protocol_errors.count();
        let text = error.map_or_else(|| "no connection".to_owned(), |error| chain(&error));
        self.lose(&text)
    }

    fn lose(&mut self, reason: &str) -> io::Result<()> {
        if let Some(session) = self.session.take() {
            self.epoll.ctl(
                ControlOperation::Delete,
                session.fd(),
                EpollEvent::default(),
            )?;
            self.shared.connections_lost.count();
        }
        self.shared.connected.set(0);
        self.shared.serving.set(0);
        self.report(reason.to_owned());
        if let Some(rings) = self.gate.lose() {
            let uncertain = rings.continue_after_loss();
            self.shared.uncertain_requests.add(uncertain);
        }
        self.gate.end_talk(false);
        self.wait_for_next()
    }

    fn wait_for_next(&mut self) -> io::Result<()> {
        self.retry.reset(self.pause, None)?;
        self.waiting = true;
        self.pause = (self.pause * 2).min(RETRY_MAX);
        Ok(())
    }

    /// Takes the rings back; the queues' thread waits for that.
    fn finish(&mut self, reason: Reason) {
        self.gate.link_saw(reason);
        if let Err(error) = self.advance() {
            log::error!("{}: {error}", self.name);
        }
    }

    fn recovered(&mut self) {
        self.pause = RETRY_MIN;
        if self.failure.take().is_some() {
            log::info!(
                "{}: {} serves the device",
                self.name,
                self.endpoint.path().display()
            );
        }
    }

    /// Logs a failure unless it is the same as for the last attempt.
    fn report(&mut self, failure: String) {
        if self.failure.as_ref() != Some(&failure) {
            log::warn!(
                "{}: {}: {failure}",
                self.name,
                self.endpoint.path().display()
            );
            self.failure = Some(failure);
        }
    }
}

fn chain(error: &SessionError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn in_host(source: io::Error) -> WorkerError {
    WorkerError::Host {
        what: "waiting for the back end",
        source,
    }
}

impl QueueHandler for Link {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn activate(
        &mut self,
        _activation: Activation,
        _sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        Ok(())
    }

    fn queue_ready(&mut self, _queue_index: u16, _turn: &mut Turn) -> Result<(), WorkerError> {
        Ok(())
    }

    fn idle_sources(&self) -> Vec<(RawFd, u32)> {
        vec![(self.epoll.as_raw_fd(), 0)]
    }

    fn source_ready(
        &mut self,
        _token: u32,
        _sources: &mut EventSources,
        _turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        self.work().map_err(in_host)
    }

    fn reset(&mut self) {
        self.finish(Reason::Reset);
    }

    fn state(&self) -> HandlerState {
        HandlerState::default()
    }

    fn pause(&mut self) {
        self.finish(Reason::Pause);
    }
}
