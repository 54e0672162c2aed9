//! The control thread: one loop over events and due times.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use sd_notify::NotifyState;
use thiserror::Error;

use super::journal::Journal;
use super::publish::{Published, Shown};
use super::remote::FleetHealth;
use super::signals::{self, Asked};
use super::vms::Vms;
use super::{AdmissionCounts, DecisionCounts, routes};
use crate::cluster::{Account, NameError, Sight};
use crate::execute::Executor;
use crate::host::{
    HostError, HostFiles, HostReader, PressureTrigger, TriggerLevel, watch_pressure,
};
use crate::http::{HttpServer, Request, Response, serve_tcp, serve_unix};
use crate::model::HostFacts;
use crate::planner::{Plan, PlannerMemory};
use crate::reservations::{BookError, ReservationBook};
use crate::sample::{Discovery, PatternError, VmEvent};
use crate::settings::{LoadError, Settings, StoreFault, load_for};
use crate::store::Store;

/// Events that wait before those who bring them wait too.
const EVENTS_MAX: usize = 4096;
/// Events handled before due times are looked at again.
const EVENTS_AT_ONCE: usize = 256;
/// Two plans are never closer together, however urgent.
const PLAN_DISTANCE_MIN: Duration = Duration::from_millis(200);
/// But pressure, which the kernel tells once a window at most, need not wait so long.
const PRESSED_PLAN_DISTANCE_MIN: Duration = Duration::from_millis(20);
/// Time between two publications.
const PUBLISH: Duration = Duration::from_secs(1);
/// How long VMs have to take `on_stop = "restore"`.
const RESTORE: Duration = Duration::from_secs(5);
/// How long a client waits for the control thread.
const ANSWER: Duration = Duration::from_secs(5);

/// Why the agent does not run.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The settings.
    #[error("The settings cannot be used")]
    Settings(#[source] LoadError),
    /// A socket pattern.
    #[error("The sockets cannot be looked for")]
    Pattern(#[source] PatternError),
    /// The host.
    #[error("The host cannot be read")]
    Host(#[source] HostError),
    /// The reservations.
    #[error("The reservations cannot be opened")]
    Book(#[source] BookError),
    /// A folder.
    #[error("Cannot make {}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The local socket.
    #[error("Cannot listen at {}", path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The page.
    #[error("Cannot serve the page and the metrics at {address}")]
    Page {
        /// Where.
        address: std::net::SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The name in the fleet.
    #[error("The host cannot join the fleet under this name: set store.host")]
    Name(#[source] NameError),
    /// The store.
    #[error("The store cannot be used")]
    Store(#[source] StoreFault),
    /// A thread or a signal handler.
    #[error("Cannot start the agent's threads")]
    Thread(#[source] io::Error),
}

/// How to run.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// The settings.
    pub settings: Settings,
    /// Where they are from, for a reload, and whether the file must be there; `None`: a reload changes nothing.
    pub file: Option<(PathBuf, bool)>,
    /// Where the kernel's files are; the group is filled in from the settings.
    pub host: HostFiles,
    /// Another store than that of the settings, for tests and simulation.
    pub store: Option<Arc<dyn Store>>,
}

/// An event for the control thread.
pub(super) enum Event {
    Vm(VmEvent),
    /// The kernel says that tasks wait for memory.
    Pressure,
    /// A client asks; the answer goes back over the sender.
    Client(Box<Request>, SyncSender<Response>),
    /// The store's thread tells what was asked from afar; the answer goes back over the sender.
    Store(Box<Sight>, SyncSender<Account>),
    Reload,
    Stop,
}

/// A running agent. Dropping the handle ends it.
#[derive(Debug)]
pub struct AgentHandle {
    events: SyncSender<Event>,
    published: Arc<Published>,
    page: Option<std::net::SocketAddr>,
    thread: Option<JoinHandle<()>>,
}

impl AgentHandle {
    /// What is shown.
    pub fn published(&self) -> &Arc<Published> {
        &self.published
    }

    /// Where the page is.
    pub fn page(&self) -> Option<std::net::SocketAddr> {
        self.page
    }

    /// Reads the settings anew.
    pub fn reload(&self) {
        // An agent that has ended has nothing to reload.
        let _ = self.events.send(Event::Reload);
    }

    /// Has the pressure trigger's effect, for tests and for the curious.
    pub fn pressure(&self) {
        // As above.
        let _ = self.events.send(Event::Pressure);
    }

    /// Waits until the agent has ended.
    pub fn wait(mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic there was printed already.
            let _ = thread.join();
        }
    }
}

impl Drop for AgentHandle {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Ended by itself, or ended now.
            let _ = self.events.send(Event::Stop);
            let _ = thread.join();
        }
    }
}

/// The control thread's state.
pub struct Agent {
    pub(super) settings: Settings,
    file: Option<(PathBuf, bool)>,
    discovery: Discovery,
    pub(super) host_files: HostFiles,
    reader: HostReader,
    pub(super) facts: HostFacts,
    trigger: Option<PressureTrigger>,
    pub(super) vms: Vms,
    pub(super) memory: PlannerMemory,
    pub(super) plan: Arc<Plan>,
    pub(super) executor: Executor,
    pub(super) book: ReservationBook,
    pub(super) journal: Journal,
    pub(super) decisions: DecisionCounts,
    pub(super) admissions: AdmissionCounts,
    pub(super) reload_ok: bool,
    pub(super) published: Arc<Published>,
    events: SyncSender<Event>,
    clock: Instant,
    pub(super) started_unix_ms: u64,
    pub(super) host_name: String,
    /// This host's name in the fleet, and what is known of the store; absent without one.
    pub(super) fleet: Option<FleetHealth>,
    pub(super) plan_wanted: bool,
    /// Whether it is wanted because of pressure.
    pressed: bool,
    due: Due,
}

/// When what is to be done next.
struct Due {
    scan: Instant,
    host: Instant,
    plan: Instant,
    last_plan: Option<Instant>,
    publish: Instant,
}

impl Agent {
    /// Starts an agent on threads of its own.
    ///
    /// # Errors
    /// What it needs from the start is not there. What may come and go later, VMs above all, is no reason.
    pub fn start(options: AgentOptions) -> Result<AgentHandle, AgentError> {
        let (events, received) = mpsc::sync_channel(EVENTS_MAX);
        Self::launch(options, events, received)
    }

    /// The same, and SIGHUP, SIGTERM and SIGINT of this process reach the agent: from before anybody can see that it is there,
    /// because a signal that came earlier would end the process.
    ///
    /// # Errors
    /// As above, or the handlers cannot be installed.
    pub fn start_with_signals(options: AgentOptions) -> Result<AgentHandle, AgentError> {
        let (events, received) = mpsc::sync_channel(EVENTS_MAX);
        let asking = events.clone();
        signals::forward(move |asked| {
            // An agent that has ended needs no signal any more.
            let _ = asking.send(match asked {
                Asked::Reload => Event::Reload,
                Asked::Stop => Event::Stop,
            });
        })
        .map_err(AgentError::Thread)?;
        Self::launch(options, events, received)
    }

    fn launch(
        options: AgentOptions,
        events: SyncSender<Event>,
        received: Receiver<Event>,
    ) -> Result<AgentHandle, AgentError> {
        let store = options.store.clone();
        let mut agent = Self::new(options, events.clone())?;
        let local = agent.serve_local()?;
        let page = agent.serve_page()?;
        let link = agent.join_fleet(store)?;
        let mut handle = AgentHandle {
            events,
            published: Arc::clone(&agent.published),
            page: page.as_ref().and_then(HttpServer::address),
            thread: None,
        };
        let thread = thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || {
                agent.run(&received);
                // First nobody may ask any more, then nobody answers.
                drop((local, page));
                // The store's thread learns that nobody answers any more before it is waited for.
                drop(received);
                drop(link);
            })
            .map_err(AgentError::Thread)?;
        handle.thread = Some(thread);
        Ok(handle)
    }

    fn new(options: AgentOptions, events: SyncSender<Event>) -> Result<Self, AgentError> {
        let AgentOptions {
            settings,
            file,
            mut host,
            store: _,
        } = options;
        let folder = &settings.agent.state_dir;
        std::fs::create_dir_all(folder).map_err(|source| AgentError::Folder {
            path: folder.clone(),
            source,
        })?;
        host.cgroup = settings
            .config
            .host
            .cgroup
            .as_ref()
            .map(|group| host.cgroup_root.join(group.trim_start_matches('/')));
        let clock = Instant::now();
        let mut reader = HostReader::new(host.clone());
        let facts = reader.read(0).map_err(AgentError::Host)?;
        let started_unix_ms = unix_ms();
        let book = ReservationBook::open(folder, started_unix_ms).map_err(AgentError::Book)?;
        let discovery = Discovery::new(&settings.discovery.sockets).map_err(AgentError::Pattern)?;
        let trigger = arm_trigger(&settings, &host, &events);
        let host_name = std::fs::read_to_string(host.proc.join("sys/kernel/hostname"))
            .map_or_else(|_| "localhost".to_owned(), |name| name.trim().to_owned());
        Ok(Self {
            discovery,
            file,
            reader,
            facts,
            trigger,
            host_files: host,
            vms: Vms::default(),
            memory: PlannerMemory::default(),
            plan: Arc::default(),
            executor: Executor::default(),
            book,
            journal: Journal::default(),
            decisions: DecisionCounts::default(),
            admissions: AdmissionCounts::default(),
            reload_ok: true,
            published: Arc::default(),
            events,
            clock,
            started_unix_ms,
            host_name,
            fleet: None,
            plan_wanted: false,
            pressed: false,
            due: Due {
                scan: clock,
                host: clock,
                plan: clock + settings.config.control.plan.duration(),
                last_plan: None,
                publish: clock,
            },
            settings,
        })
    }

    fn serve_local(&self) -> Result<HttpServer, AgentError> {
        let path = self.settings.agent.socket.clone();
        let failed = |source| AgentError::Socket {
            path: path.clone(),
            source,
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let published = Arc::clone(&self.published);
        let events = self.events.clone();
        serve_unix(&path, move |request| {
            routes::handle_local(request, &published, |request| ask(&events, request))
        })
        .map_err(failed)
    }

    fn serve_page(&self) -> Result<Option<HttpServer>, AgentError> {
        let Some(address) = self.settings.agent.listen else {
            return Ok(None);
        };
        let published = Arc::clone(&self.published);
        let events = self.events.clone();
        serve_tcp(address, move |request| {
            routes::handle_page(request, &published, |request| ask(&events, request))
        })
        .map(Some)
        .map_err(|source| AgentError::Page { address, source })
    }

    fn run(&mut self, events: &Receiver<Event>) {
        self.tell_agent("started");
        self.publish();
        notify(&[NotifyState::Ready]);
        loop {
            let next = self.next_due();
            let event = match events.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(event) => Some(event),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let more = std::iter::from_fn(|| events.try_recv().ok()).take(EVENTS_AT_ONCE);
            for event in event.into_iter().chain(more) {
                if !self.handle(event) {
                    self.stop(events);
                    return;
                }
            }
            self.do_due();
            // Fed by the loop itself: a loop that hangs is what the watchdog is for.
            notify(&[NotifyState::Watchdog]);
        }
    }

    fn next_due(&self) -> Instant {
        let plan = if self.plan_wanted {
            self.earliest_plan()
        } else {
            self.due.plan
        };
        self.due
            .scan
            .min(self.due.host)
            .min(plan)
            .min(self.due.publish)
    }

    fn earliest_plan(&self) -> Instant {
        let distance = if self.pressed {
            PRESSED_PLAN_DISTANCE_MIN
        } else {
            PLAN_DISTANCE_MIN
        };
        self.due
            .last_plan
            .map_or(self.clock, |last| last + distance)
    }

    fn do_due(&mut self) {
        let now = Instant::now();
        if now >= self.due.scan {
            self.scan();
            self.due.scan = now + self.settings.agent.scan.duration();
        }
        if now >= self.due.host {
            self.read_host();
            self.follow_reservations();
            self.execute();
            self.due.host = now + self.settings.agent.host.duration();
        }
        if now >= self.due.plan || (self.plan_wanted && now >= self.earliest_plan()) {
            self.make_plan();
            self.plan_wanted = false;
            self.pressed = false;
            self.due.last_plan = Some(now);
            self.due.plan = now + self.settings.config.control.plan.duration();
        }
        if now >= self.due.publish {
            self.publish();
            self.due.publish = now + PUBLISH;
        }
    }

    /// False ends the agent.
    fn handle(&mut self, event: Event) -> bool {
        match event {
            Event::Vm(event) => self.vm_event(event),
            Event::Pressure => {
                self.read_host();
                self.plan_wanted = true;
                self.pressed = true;
            }
            Event::Client(request, answer) => {
                let response = self.answer(&request);
                // A client that gave up gets no answer; its reservation, if any, ends with its deadline.
                let _ = answer.send(response);
            }
            Event::Store(sight, answer) => {
                let account = self.account(&sight);
                // A thread that gave up asks again.
                let _ = answer.send(account);
            }
            Event::Reload => self.reload(),
            Event::Stop => return false,
        }
        true
    }

    pub(super) fn read_host(&mut self) {
        match self.reader.read(self.now_ms()) {
            Ok(facts) => self.facts = facts,
            // The facts grow old, and everything that depends on fresh ones stops by itself.
            Err(error) => log::error!("{}", api::chain_report("the host cannot be read", &error)),
        }
    }

    fn scan(&mut self) {
        let found = self.discovery.scan();
        self.follow_sockets(found);
    }

    pub(super) fn reload(&mut self) {
        let Some((file, required)) = self.file.clone() else {
            return;
        };
        notify(&[NotifyState::Reloading, monotonic()]);
        match load_for(&file, required, &self.host_files) {
            Ok(loaded) => {
                let agent = self.settings.agent.clone();
                let store = self.settings.store.clone();
                if loaded.settings.agent != agent || loaded.settings.store != store {
                    log::warn!("[agent] and [store] change with a restart only");
                }
                if let Ok(discovery) = Discovery::new(&loaded.settings.discovery.sockets) {
                    self.discovery = discovery;
                }
                let restart_samples = loaded.settings.config.control.sample
                    != self.settings.config.control.sample
                    || loaded.settings.config.control.sample_deadline
                        != self.settings.config.control.sample_deadline;
                self.settings = Settings {
                    agent,
                    store,
                    ..loaded.settings
                };
                if restart_samples {
                    self.restart_workers();
                }
                self.reload_ok = true;
                self.due.scan = Instant::now();
                self.tell_agent("settings reloaded");
            }
            Err(error) => {
                self.reload_ok = false;
                let chain = api::error_chain(&error).join(": ");
                self.tell_agent(&format!("settings kept, the new ones are refused: {chain}"));
            }
        }
        self.publish();
        notify(&[NotifyState::Ready]);
    }

    fn stop(&mut self, events: &Receiver<Event>) {
        notify(&[NotifyState::Stopping]);
        self.tell_agent("stopping");
        if self.settings.agent.on_stop == crate::settings::OnStop::Restore {
            let mut left = self.order_restore();
            let until = Instant::now() + RESTORE;
            while left > 0 {
                let rest = until.saturating_duration_since(Instant::now());
                match events.recv_timeout(rest) {
                    Ok(Event::Vm(event)) if event.kind.is_done() => left -= 1,
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
        }
        self.publish();
    }

    pub(super) fn publish(&mut self) {
        let shown = Shown {
            status: self.status(),
            plan: Arc::clone(&self.plan),
            decisions: self.decisions.clone(),
            admissions: self.admissions.clone(),
        };
        self.published.set(shown);
    }

    pub(super) fn tell_agent(&mut self, text: &str) {
        self.journal.enter(unix_ms(), "agent", "", text.to_owned());
    }

    /// The planner's clock.
    pub(super) fn now_ms(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The name that discovery will give the VM of this socket.
    pub(super) fn discovery_name(&self, socket: &str) -> Option<String> {
        self.discovery.name(socket.as_ref())
    }

    pub(super) fn clock(&self) -> Instant {
        self.clock
    }

    pub(super) fn events(&self) -> SyncSender<Event> {
        self.events.clone()
    }

    pub(super) fn has_trigger(&self) -> bool {
        self.trigger.is_some()
    }

    /// A way for a VM's thread to tell; false ends it.
    pub(super) fn teller(&self) -> impl Fn(VmEvent) -> bool + Clone + Send + use<> {
        let events = self.events.clone();
        move |event| events.send(Event::Vm(event)).is_ok()
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("vms", &self.vms.len())
            .finish_non_exhaustive()
    }
}

/// Has the control thread answer a request.
fn ask(events: &SyncSender<Event>, request: &Request) -> Response {
    let late = || Response::error(503, &["The agent is too busy to answer".to_owned()]);
    let (answer, answered) = mpsc::sync_channel(1);
    let event = Event::Client(Box::new(request.clone()), answer);
    if events.try_send(event).is_err() {
        return late();
    }
    answered.recv_timeout(ANSWER).unwrap_or_else(|_| late())
}

fn arm_trigger(
    settings: &Settings,
    host: &HostFiles,
    events: &SyncSender<Event>,
) -> Option<PressureTrigger> {
    let level = TriggerLevel {
        stall_us: settings.agent.trigger_stall.0.saturating_mul(1000),
        window_us: settings.agent.trigger_window.0.saturating_mul(1000),
    };
    let events = events.clone();
    let armed = watch_pressure(&host.pressure_file(), level, move || {
        // A full queue is being worked off already.
        let _ = events.try_send(Event::Pressure);
    });
    match armed {
        Ok(trigger) => Some(trigger),
        Err(error) => {
            let chain = api::error_chain(&error).join(": ");
            log::warn!("no pressure trigger, the host is read every second only: {chain}");
            None
        }
    }
}

/// Tells the service manager, if one started us.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::debug!("the service manager was not told: {error}");
    }
}

fn monotonic() -> NotifyState<'static> {
    NotifyState::monotonic_usec_now().unwrap_or(NotifyState::MonotonicUsec(0))
}

pub(super) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}
