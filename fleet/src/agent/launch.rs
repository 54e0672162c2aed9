//! Starts an agent: its parts, sockets and threads, and the handle that ends it.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::acts::Acts;
use super::clock::Clock;
use super::control::{ControlLoop, Due};
use super::error::{AgentError, StopError};
use super::event::Event;
use super::host_watch::HostWatch;
use super::lessons::SavedLessons;
use super::locks::FolderLock;
use super::membership::Membership;
use super::move_thread::MoveThread;
use super::page_guard::PageGuard;
use super::promises::Promises;
use super::published::Published;
use super::publisher::Publisher;
use super::rounds::{Serve, VmRounds, with_threads};
use super::routes;
use super::signals::{self, Asked, StopFlag};
use super::standby::Standbys;
use crate::agent_config::AgentConfig;
use crate::execute::GroupFiles;
use crate::host::HostFiles;
use crate::http::{Deadlines, HttpServer, Request, Response, serve_tcp, serve_unix, server_tls};
use crate::reservations::Reservations;
use crate::standby::prepare;
use crate::store::Store;

/// Maximum number of queued events, beyond which senders wait.
const EVENTS_MAX: usize = 4096;
/// Only the owner may use the socket for orders; its group may use the read-only one.
const ORDERS_MODE: u32 = 0o600;
const READ_MODE: u32 = 0o660;
/// How long a client waits for the control loop.
const ANSWER: Duration = Duration::from_secs(5);

/// Parameters of an agent.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// The configuration.
    pub config: AgentConfig,
    /// The source of the configuration, for a reload, and whether the file is required; `None`: a reload changes
    /// nothing.
    pub file: Option<(PathBuf, bool)>,
    /// The location of the kernel's files; the group comes from the configuration.
    pub host: HostFiles,
    /// A store that replaces the configured one, for tests and simulation.
    pub store: Option<Arc<dyn Store>>,
}

/// A running agent. Dropping it ends it.
#[derive(Debug)]
pub struct Agent {
    events: SyncSender<Event>,
    stop: StopFlag,
    published: Arc<Published>,
    page: Option<SocketAddr>,
    thread: Option<JoinHandle<Result<(), StopError>>>,
}

impl Agent {
    /// Starts an agent on separate threads.
    ///
    /// # Errors
    /// A resource needed from the start is missing. Missing resources that may appear later, such as VMs, are not an
    /// error.
    pub fn start(options: AgentOptions) -> Result<Self, AgentError> {
        let (events, received) = mpsc::sync_channel(EVENTS_MAX);
        launch(options, events, received, StopFlag::default())
    }

    /// Starts an agent that receives SIGHUP, SIGTERM and SIGINT of this process. The handlers are installed before the
    /// agent becomes visible, because an earlier signal would end the process.
    ///
    /// # Errors
    /// As above, or the handlers cannot be installed.
    pub fn start_with_signals(options: AgentOptions) -> Result<Self, AgentError> {
        let (events, received) = mpsc::sync_channel(EVENTS_MAX);
        let (asking, stop) = (events.clone(), StopFlag::default());
        let stopping = stop.clone();
        signals::forward(move |asked| match asked {
            Asked::Reload => {
                // An agent that has ended needs no signal any more.
                let _ = asking.send(Event::Reload);
            }
            Asked::Stop => ask_to_stop(&stopping, &asking),
        })
        .map_err(AgentError::Thread)?;
        launch(options, events, received, stop)
    }

    /// The published data.
    pub fn published(&self) -> &Arc<Published> {
        &self.published
    }

    /// The address of the page.
    pub fn page(&self) -> Option<SocketAddr> {
        self.page
    }

    /// Reloads the configuration.
    pub fn reload(&self) {
        // An agent that has ended has nothing to reload.
        let _ = self.events.send(Event::Reload);
    }

    /// Simulates the pressure trigger, for tests and experiments.
    pub fn pressure(&self) {
        // As above.
        let _ = self.events.send(Event::Pressure);
    }

    /// Waits until the agent has ended.
    ///
    /// # Errors
    /// It did not end cleanly.
    pub fn wait(mut self) -> Result<(), StopError> {
        match self.thread.take() {
            Some(thread) => thread.join().unwrap_or(Err(StopError::Panicked)),
            None => Ok(()),
        }
    }

    /// Ends the agent.
    ///
    /// # Errors
    /// It did not end cleanly.
    pub fn stop(self) -> Result<(), StopError> {
        ask_to_stop(&self.stop, &self.events);
        self.wait()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // It has ended, or ends now. Callers that need the result call `stop`.
            ask_to_stop(&self.stop, &self.events);
            let _ = thread.join();
        }
    }
}

/// Makes the agent end after the current event.
fn ask_to_stop(stop: &StopFlag, events: &SyncSender<Event>) {
    stop.ask();
    // Only wakes the loop. If the queue is full, the loop is awake; if the agent has ended, it needs no event.
    let _ = events.try_send(Event::Stop);
}

fn launch(
    options: AgentOptions,
    events: SyncSender<Event>,
    received: Receiver<Event>,
    stop: StopFlag,
) -> Result<Agent, AgentError> {
    let AgentOptions {
        config,
        file,
        host,
        store,
    } = options;
    let published: Arc<Published> = Arc::default();
    let clock = Clock::start();
    let groups = GroupFiles {
        proc: host.proc.clone(),
        cgroup_root: host.cgroup_root.clone(),
    };
    let (reports, pressed) = (events.clone(), events.clone());
    let serve = with_threads(
        groups,
        clock,
        Arc::clone(&published.requests),
        move |event| reports.send(Event::Vm(event)).is_ok(),
    );
    let surroundings = Surroundings {
        files: &host,
        clock,
        serve,
        pressed: Box::new(move || {
            // A full queue is already being processed.
            let _ = pressed.try_send(Event::Pressure);
        }),
    };
    let mut control = assemble(config, file, &published, surroundings)?;
    control.stop = stop.clone();
    let local = serve_local(&control.config, &published, &events)?;
    let page = serve_page(&control.config, control.host.name(), &published)?;
    let joined = Membership::join(&control.config, control.host.name(), store, events.clone())?;
    let (membership, link) = joined.unzip();
    let moves = match &membership {
        Some(membership) => MoveThread::start(
            &control.config,
            host.proc.clone(),
            membership,
            events.clone(),
        )?,
        None => None,
    };
    control.membership = membership;
    let mut agent = Agent {
        events,
        stop,
        published,
        page: page.as_ref().and_then(HttpServer::address),
        thread: None,
    };
    let thread = thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || {
            let ended = control.run(&received);
            // First no new requests are accepted, then no request is served.
            drop((local, page));
            // The store's thread is notified of the end before it is joined.
            drop(received);
            drop((moves, link));
            ended
        })
        .map_err(AgentError::Thread)?;
    agent.thread = Some(thread);
    Ok(agent)
}

/// The control loop's environment except its sockets: the real host's, or a test's.
pub(super) struct Surroundings<'a> {
    pub(super) files: &'a HostFiles,
    pub(super) clock: Clock,
    pub(super) serve: Serve,
    /// Called when the kernel reports memory pressure.
    pub(super) pressed: Box<dyn Fn() + Send>,
}

pub(super) fn assemble(
    config: AgentConfig,
    file: Option<(PathBuf, bool)>,
    published: &Arc<Published>,
    surroundings: Surroundings<'_>,
) -> Result<ControlLoop, AgentError> {
    let Surroundings {
        files,
        clock,
        serve,
        pressed,
    } = surroundings;
    let folder = &config.agent.state_dir;
    std::fs::create_dir_all(folder).map_err(|source| AgentError::Folder {
        path: folder.clone(),
        source,
    })?;
    let lock = FolderLock::take(folder).map_err(taken(folder))?;
    let host =
        HostWatch::start(&config, files, clock.now_ms(), pressed).map_err(AgentError::Host)?;
    let book = Reservations::open(folder, clock.moment()).map_err(AgentError::Book)?;
    let acts = Acts::open(folder, &files.proc).map_err(AgentError::Acts)?;
    let standby = open_standby(&config, files, clock)?;
    let saved = (acts, SavedLessons::open(folder));
    let rounds = VmRounds::new(&config, files.proc.clone(), (clock, serve), saved)
        .map_err(AgentError::Pattern)?;
    Ok(ControlLoop {
        file,
        clock,
        host,
        rounds,
        promises: Promises::new(book, clock),
        standby,
        membership: None,
        moves: Vec::new(),
        publisher: Publisher::new(Arc::clone(published), clock),
        journal: published.journal.clone(),
        reload_ok: true,
        due: Due::new(clock.now(), &config),
        stop: StopFlag::default(),
        _folder: lock,
        config,
    })
}

fn open_standby(
    config: &AgentConfig,
    files: &HostFiles,
    clock: Clock,
) -> Result<Standbys, AgentError> {
    let lock = match &config.agent.standby_dir {
        Some(dir) => {
            prepare(dir).map_err(AgentError::Standby)?;
            Some(FolderLock::take_standby(dir).map_err(taken(dir))?)
        }
        None => None,
    };
    Standbys::open(config, files.proc.clone(), clock, lock).map_err(AgentError::Standby)
}

/// Converts the error of a folder's lock.
fn taken(folder: &Path) -> impl FnOnce(io::Error) -> AgentError {
    let path = folder.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::WouldBlock => AgentError::Taken { path },
        _ => AgentError::Folder { path, source },
    }
}

/// The sockets of this host: the one for orders, and the read-only one.
fn serve_local(
    config: &AgentConfig,
    published: &Arc<Published>,
    events: &SyncSender<Event>,
) -> Result<[HttpServer; 2], AgentError> {
    let path = &config.agent.socket;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| AgentError::Socket { path, source }
    };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed(path))?;
    }
    let (shown, events) = (Arc::clone(published), events.clone());
    let orders = serve_unix(path, ORDERS_MODE, move |request| {
        routes::handle_local(request, &shown, |request| ask(&events, request))
    })
    .map_err(failed(path))?;
    let path = config.agent.read_socket();
    let shown = Arc::clone(published);
    let reading = serve_unix(&path, READ_MODE, move |request| {
        routes::handle_read(request, &shown)
    })
    .map_err(failed(&path))?;
    Ok([orders, reading])
}

fn serve_page(
    config: &AgentConfig,
    machine: &str,
    published: &Arc<Published>,
) -> Result<Option<HttpServer>, AgentError> {
    let agent = &config.agent;
    let Some(address) = agent.listen else {
        return Ok(None);
    };
    let guard = PageGuard::new(agent, machine)?;
    let tls = match (&agent.tls_certificate, &agent.tls_key) {
        (Some(certificate), Some(key)) => {
            Some(server_tls(certificate, key).map_err(AgentError::Tls)?)
        }
        _ => None,
    };
    let published = Arc::clone(published);
    serve_tcp(
        address,
        tls,
        Deadlines::default(),
        move |request| match guard.check(request) {
            Ok(()) => routes::handle_page(request, &published),
            Err(refusal) => refusal,
        },
    )
    .map(Some)
    .map_err(|source| AgentError::Page { address, source })
}

/// Passes a request to the control loop.
fn ask(events: &SyncSender<Event>, request: &Request) -> Response {
    let late = || Response::error(503, &["The agent is too busy to answer".to_owned()]);
    let (answer, answered) = mpsc::sync_channel(1);
    let event = Event::Client(Box::new(request.clone()), answer);
    if events.try_send(event).is_err() {
        return late();
    }
    answered.recv_timeout(ANSWER).unwrap_or_else(|_| late())
}
