//! The control loop: one thread that processes events and due times, and owns every part of the agent.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

use super::clock::Clock;
use super::error::StopError;
use super::event::Event;
use super::host_watch::HostWatch;
use super::journal::Journal;
use super::locks::FolderLock;
use super::membership::Membership;
use super::promises::{Promises, Situation, uid_of};
use super::publisher::{Parts, Publisher};
use super::request::{PinRequest, ReserveRequest, WakeAnswer, WakeRequest};
use super::rounds::{Claims, VmRounds};
use super::signals::StopFlag;
use super::standby::Standbys;
use crate::agent_config::{AgentConfig, OnStop, load_for};
use crate::cluster::{HostReport, MoveRecord, StoreView};
use crate::http::{Method, Request, Response};
use crate::moves::{Home, MoveNews};

/// Maximum number of events handled before due times are checked again.
const EVENTS_AT_ONCE: usize = 256;
/// Minimum interval between two plans, however urgent.
const PLAN_DISTANCE_MIN: Duration = Duration::from_millis(200);
/// After pressure the interval is shorter, because the kernel reports it at most once per window.
const PRESSED_PLAN_DISTANCE_MIN: Duration = Duration::from_millis(20);
/// Time between two publications.
const PUBLISH: Duration = Duration::from_secs(1);
/// How long VMs have to execute `on_stop = "restore"`.
const RESTORE: Duration = Duration::from_secs(5);

/// Everything the control loop owns.
pub(super) struct ControlLoop {
    pub(super) config: AgentConfig,
    /// The source of the configuration, and whether the file is required.
    pub(super) file: Option<(PathBuf, bool)>,
    pub(super) clock: Clock,
    pub(super) host: HostWatch,
    pub(super) rounds: VmRounds,
    pub(super) promises: Promises,
    pub(super) standby: Standbys,
    pub(super) membership: Option<Membership>,
    /// The moves from and to this host.
    pub(super) moves: Vec<MoveRecord>,
    pub(super) publisher: Publisher,
    pub(super) journal: Journal,
    /// Whether the last reload succeeded.
    pub(super) reload_ok: bool,
    pub(super) due: Due,
    pub(super) stop: StopFlag,
    /// Held as long as the agent runs.
    pub(super) _folder: FolderLock,
}

/// The next actions, and their times.
pub(super) struct Due {
    scan: Instant,
    host: Instant,
    plan: Instant,
    last_plan: Option<Instant>,
    publish: Instant,
    /// The next plan should not wait until it is due.
    plan_wanted: bool,
    /// The reason is pressure.
    pressed: bool,
}

impl Due {
    pub(super) fn new(now: Instant, config: &AgentConfig) -> Self {
        Self {
            scan: now,
            host: now,
            plan: now + config.planning.control.plan.duration(),
            last_plan: None,
            publish: now,
            plan_wanted: false,
            pressed: false,
        }
    }

    fn next(&self, now: Instant) -> Instant {
        self.scan
            .min(self.host)
            .min(self.plan(now))
            .min(self.publish)
    }

    /// When the next plan is made.
    fn plan(&self, now: Instant) -> Instant {
        if !self.plan_wanted {
            return self.plan;
        }
        let distance = if self.pressed {
            PRESSED_PLAN_DISTANCE_MIN
        } else {
            PLAN_DISTANCE_MIN
        };
        let earliest = self.last_plan.map(|last| last + distance);
        earliest.map_or(now, |earliest| earliest.min(self.plan))
    }
}

impl ControlLoop {
    pub(super) fn run(&mut self, events: &Receiver<Event>) -> Result<(), StopError> {
        self.note("started");
        // The first request must find published data.
        self.do_due();
        self.publish();
        notify(&[NotifyState::Ready]);
        loop {
            let now = self.clock.now();
            let rest = self.due.next(now).saturating_duration_since(now);
            let event = match events.recv_timeout(rest) {
                Ok(event) => Some(event),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            let more = std::iter::from_fn(|| events.try_recv().ok()).take(EVENTS_AT_ONCE);
            for event in event.into_iter().chain(more) {
                // Checked before each event, because many requests may have arrived in the meantime. The end of an
                // order counts even then: the stop waits for it.
                let ends = self.stop.is_asked();
                let counts = !ends || matches!(event, Event::Vm(_));
                if (counts && !self.handle(event)) || ends {
                    return self.stop(events);
                }
            }
            self.do_due();
            // Sent by the loop itself, so that the watchdog detects a hanging loop.
            notify(&[NotifyState::Watchdog]);
        }
    }

    pub(super) fn do_due(&mut self) {
        let now = self.clock.now();
        if now >= self.due.scan {
            self.rounds.scan(&self.config, &mut self.journal);
            self.due.scan = now + self.config.agent.scan.duration();
        }
        if now >= self.due.host {
            self.read_host();
            self.promises.follow(&self.rounds, &mut self.journal);
            self.follow_standby();
            self.rounds.act(self.host.facts(), &mut self.journal);
            self.due.host = now + self.config.agent.host.duration();
        }
        // The first plan is made as soon as all VMs are known: until then nothing is reserved.
        let first = self.due.last_plan.is_none() && !self.rounds.has_unheard();
        if first || now >= self.due.plan(now) {
            let claims = Claims {
                promised: self.promises.outstanding(&self.config, &self.rounds),
                wanted: self.promises.wanted(&self.config, &self.rounds),
            };
            self.rounds
                .plan_and_act(&self.config, self.host.facts(), claims, &mut self.journal);
            self.due.plan_wanted = false;
            self.due.pressed = false;
            self.due.last_plan = Some(now);
            self.due.plan = now + self.config.planning.control.plan.duration();
        }
        if now >= self.due.publish {
            self.publish();
            self.due.publish = now + PUBLISH;
        }
    }

    /// Returns false to end the agent.
    pub(super) fn handle(&mut self, event: Event) -> bool {
        match event {
            Event::Vm(event) => {
                let is_noted = self.standby.note(&event);
                let sampled = event.is_sample().then(|| event.id.clone());
                self.due.plan_wanted |= self.rounds.event(event, &self.config, &mut self.journal);
                if let Some(vm) = sampled {
                    let (config, journal) = (&self.config, &mut self.journal);
                    self.standby
                        .watch(vm.as_str(), config, &mut self.rounds, journal);
                }
                if is_noted {
                    self.follow_standby();
                    self.publish();
                }
            }
            Event::Pressure => {
                self.read_host();
                self.due.plan_wanted = true;
                self.due.pressed = true;
            }
            Event::Client(request, answer) => {
                let response = self.answer(&request).unwrap_or_else(|response| response);
                // A client that gave up gets no response; its reservation, if any, ends with its deadline.
                let _ = answer.send(response);
            }
            Event::Store(view, answer) => {
                let report = self.report(&view);
                // A thread that gave up sends the request again.
                let _ = answer.send(report);
            }
            Event::Moves(news, answer) => {
                // As above.
                let _ = answer.send(self.follow_moves(*news));
            }
            Event::Reload => self.reload(),
            Event::Stop => return false,
        }
        true
    }

    /// Handles requests that the published data cannot answer.
    fn answer(&mut self, request: &Request) -> Result<Response, Response> {
        let name = request.path.rsplit('/').next().unwrap_or_default();
        match (request.method, name) {
            (Method::Put, "fleet.reserve") => {
                self.read_host();
                let situation = Situation {
                    config: &self.config,
                    facts: self.host.facts(),
                    rounds: &self.rounds,
                    standby: &self.standby,
                };
                let answer = self
                    .promises
                    .reserve(request, situation, &mut self.journal)?;
                self.publish();
                Ok(answer)
            }
            (Method::Put, "fleet.confirm") => self.promises.confirm(request, &self.config),
            (Method::Put, "fleet.release") => {
                let answer = self.promises.release(request, &mut self.journal)?;
                self.publish();
                Ok(answer)
            }
            (Method::Put, "fleet.pin") => self.pin(request),
            (Method::Put, "fleet.reload") => {
                self.reload();
                self.reload_answer()
            }
            (Method::Put, "fleet.standby") => {
                let (config, journal) = (&self.config, &mut self.journal);
                let answer = self
                    .standby
                    .begin(request, config, &mut self.rounds, journal)?;
                self.publish();
                Ok(answer)
            }
            (Method::Put, "fleet.wake") => self.wake(request),
            (Method::Put, "fleet.woken") => self.standby.woken(request, &mut self.journal),
            (Method::Put, "fleet.discard") => {
                let (config, journal) = (&self.config, &mut self.journal);
                let answer = self
                    .standby
                    .discard(request, config, &mut self.rounds, journal)?;
                self.publish();
                Ok(answer)
            }
            (Method::Get, "fleet.config") => {
                Ok(Response::text("application/toml", self.config.to_toml()))
            }
            _ => Err(Response::error(404, &["Not Found".to_owned()])),
        }
    }

    fn pin(&mut self, request: &Request) -> Result<Response, Response> {
        let asked: PinRequest = request.json()?;
        let known = self
            .rounds
            .pin(&asked.vm, asked.pinned, &mut self.journal)
            .map_err(|error| {
                let text = format!("Cannot save that {:?} is pinned or not", asked.vm);
                Response::error(500, &[text, error.to_string()])
            })?;
        if !known {
            let text = format!("There is no VM {:?}", asked.vm);
            return Err(Response::error(404, &[text]));
        }
        self.due.plan_wanted = true;
        Ok(Response::done())
    }

    /// Reserves the memory of a VM in standby, for a client that is going to start its VMM.
    fn wake(&mut self, request: &Request) -> Result<Response, Response> {
        let WakeRequest { vm, min, force } = request.json()?;
        let record = self
            .standby
            .to_wake((&vm, force), &self.config, &self.rounds)?;
        self.read_host();
        let situation = Situation {
            config: &self.config,
            facts: self.host.facts(),
            rounds: &self.rounds,
            standby: &self.standby,
        };
        let asked = ReserveRequest {
            vm: vm.clone(),
            memory: record.memory,
            min,
            huge_pages: record.huge_pages,
            dry_run: false,
        };
        let (uid, journal) = (uid_of(request), &mut self.journal);
        let reserved = self
            .promises
            .reserve_for(&vm, &asked, uid, situation, journal)?;
        let snapshot = match (self.standby.wake(&vm, journal), reserved.reservation) {
            (Ok(snapshot), Some(reservation)) => (snapshot, reservation),
            (Err(refusal), _) => {
                self.promises.forget(&vm);
                return Err(refusal);
            }
            (Ok(_), None) => {
                let text = "The reservation was not made".to_owned();
                return Err(Response::error(500, &[text]));
            }
        };
        self.publish();
        let (snapshot, reservation) = snapshot;
        Ok(Response::json(&WakeAnswer {
            reservation,
            snapshot,
            socket: record.socket,
            uid: record.uid,
            command: self.config.agent.wake_command.clone(),
        }))
    }

    fn follow_standby(&mut self) {
        let (config, journal) = (&self.config, &mut self.journal);
        for vm in self.standby.follow(config, &mut self.rounds, journal) {
            self.promises.forget(&vm);
        }
    }

    /// Decides on requests from the store, and reports the host's state.
    fn report(&mut self, view: &StoreView) -> HostReport {
        if !view.asked.is_empty() {
            self.read_host();
        }
        let situation = Situation {
            config: &self.config,
            facts: self.host.facts(),
            rounds: &self.rounds,
            standby: &self.standby,
        };
        let refused = self
            .promises
            .answer_lines(view, situation, &mut self.journal);
        let report = HostReport {
            ready: self.rounds.learns_for().is_none(),
            facts_age_ms: self.clock.now_ms().saturating_sub(situation.facts.at_ms),
            headroom: self.promises.headroom(situation),
            vms: self.rounds.movable(&self.config),
            held: self.promises.held_for_others(),
            refused,
            receives: self.config.receives_moves(),
        };
        if !view.asked.is_empty() {
            self.publish();
        }
        report
    }

    /// Takes note of the moves from and to this host.
    fn follow_moves(&mut self, news: MoveNews) -> Home {
        self.rounds.hold_moves(&news.held);
        self.promises.keep(&news.kept, &self.config);
        for id in &news.released {
            self.promises.forget(id);
        }
        for (vm, text) in news.events {
            self.journal.enter("move", &vm, text);
        }
        if self.moves != news.moves {
            self.moves = news.moves;
            self.publish();
        }
        Home {
            now_ms: self.clock.now_ms(),
            vms: self.rounds.home_vms(&self.config),
            standby: self.standby.names(),
            reserved: self.promises.remote_ids(),
        }
    }

    fn reload(&mut self) {
        let Some((file, required)) = &self.file else {
            return;
        };
        notify(&[NotifyState::Reloading, monotonic()]);
        match load_for(file, *required, self.host.files()) {
            Ok(loaded) => {
                let (agent, store) = (self.config.agent.clone(), self.config.store.clone());
                if loaded.config.agent != agent || loaded.config.store != store {
                    log::warn!("[agent] and [store] change only with a restart");
                }
                let config = AgentConfig {
                    agent,
                    store,
                    ..loaded.config
                };
                self.rounds.reload(&self.config, &config);
                self.config = config;
                self.reload_ok = true;
                self.due.scan = self.clock.now();
                self.note("settings reloaded");
            }
            Err(error) => {
                self.reload_ok = false;
                let chain = api::error_line(&error);
                self.note(&format!("settings kept, the new ones are refused: {chain}"));
            }
        }
        self.publish();
        notify(&[NotifyState::Ready]);
    }

    fn reload_answer(&self) -> Result<Response, Response> {
        if self.reload_ok {
            return Ok(Response::done());
        }
        let why = self.journal.last_of("agent").unwrap_or_default();
        Err(Response::error(
            400,
            &["The new settings are refused".to_owned(), why],
        ))
    }

    fn stop(&mut self, events: &Receiver<Event>) -> Result<(), StopError> {
        notify(&[NotifyState::Stopping]);
        self.note("stopping");
        let vms = if self.config.agent.on_stop == OnStop::Restore {
            self.restore(events)
        } else {
            Vec::new()
        };
        self.publish();
        if vms.is_empty() {
            Ok(())
        } else {
            self.note(&format!("not restored: {}", vms.join(", ")));
            Err(StopError::NotRestored { vms })
        }
    }

    /// Returns all memory taken from VMs; returns the VMs for which this is not confirmed.
    fn restore(&mut self, events: &Receiver<Event>) -> Vec<String> {
        self.rounds.restore(&self.config);
        let until = Instant::now() + RESTORE;
        while self.rounds.has_orders() {
            let rest = until.saturating_duration_since(Instant::now());
            match events.recv_timeout(rest) {
                Ok(Event::Vm(event)) => {
                    self.rounds.event(event, &self.config, &mut self.journal);
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        self.rounds.unrestored(&self.config)
    }

    fn read_host(&mut self) {
        self.host.read(self.clock.now_ms(), self.rounds.pids());
    }

    fn publish(&self) {
        self.publisher.publish(&Parts {
            config: &self.config,
            reload_ok: self.reload_ok,
            host: &self.host,
            rounds: &self.rounds,
            promises: &self.promises,
            standby: &self.standby,
            membership: self.membership.as_ref(),
            moves: &self.moves,
        });
    }

    fn note(&mut self, text: &str) {
        self.journal.enter("agent", "", text.to_owned());
    }
}

/// Notifies the service manager, if it started this process.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::debug!("the service manager was not notified: {error}");
    }
}

fn monotonic() -> NotifyState<'static> {
    NotifyState::monotonic_usec_now().unwrap_or(NotifyState::MonotonicUsec(0))
}
