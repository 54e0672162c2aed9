//! The thread that looks at figures once a second, and the book it shares with the control thread and the API.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::{ReclaimStats, ReclaimThresholds, ReclaimThresholdsChange, ReportingPolicy, VmState};

use super::alert::Transition;
use super::balloon::{BalloonEvent, Sight, Watch};
use super::book::Book;
use super::error::ThresholdError;
use super::figure::{Needs, Sources};
use super::policy::PolicySight;
use super::reporting::{ReportingEvent, ReportingSight, ReportingWatch};
use crate::control::{MachineView, PublishedView};
use crate::device_ids::BALLOON_ID;
use crate::events::EventSink;
use crate::threads::THRESHOLDS_THREAD;
use crate::vm::MachineObserver;

/// Time between two looks. Residency is measured at most once in it, and the probe itself rests a hundred times as long
/// as a measurement took, so that alerts never cost more than a hundredth of a core.
const INTERVAL: Duration = Duration::from_secs(1);
const STACK_BYTES: usize = 256 << 10;

/// The thresholds of a VM, for the control thread, the API and the thread that looks at figures.
#[derive(Debug)]
pub struct Thresholds {
    start: Instant,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    book: Book,
    subjects: Subjects,
    stop: bool,
}

/// What there is to look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subjects {
    /// A machine, for alerts.
    pub machine: bool,
    /// A machine with a balloon, and somebody who reads what is told of it.
    pub balloon: bool,
}

/// What has to be read for one look.
#[derive(Clone, Copy, Debug)]
struct Look {
    alerts: Needs,
    balloon: bool,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            state: Mutex::default(),
            wake: Condvar::new(),
        }
    }
}

impl Thresholds {
    /// Makes all of `change`, or nothing. Takes microseconds.
    ///
    /// # Errors
    /// The change makes no sense.
    pub fn change(&self, change: &ReclaimThresholdsChange) -> Result<(), ThresholdError> {
        self.lock().book.change(change, self.now_ms())?;
        self.wake.notify_all();
        Ok(())
    }

    /// Everything as it stands, for the guest in sight. Takes microseconds.
    pub fn status(&self, sight: PolicySight) -> ReclaimThresholds {
        self.lock().book.status(self.now_ms(), sight)
    }

    /// The reporting policy, if one was set.
    pub fn policy(&self) -> Option<ReportingPolicy> {
        self.lock().book.policy()
    }

    /// Forgets everything: the VM is no more.
    pub fn clear(&self) {
        self.lock().book.clear();
    }

    /// Tells what there is to look at.
    pub fn set_subjects(&self, subjects: Subjects) {
        self.lock().subjects = subjects;
        self.wake.notify_all();
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The book is whole after every change, so a thread that died with the lock has left nothing half done.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        self.lock().stop = true;
        self.wake.notify_all();
    }

    /// Waits until it is time to look at something; `None` when the end has come. While there is nothing to look at
    /// the thread sleeps.
    fn wait(&self, due: &mut Option<Instant>, interval: Duration) -> Option<Look> {
        let mut state = self.lock();
        while !state.stop {
            let Subjects { machine, balloon } = state.subjects;
            if !(balloon || (machine && state.book.has_alerts())) {
                *due = None;
                state = self
                    .wake
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let now = Instant::now();
            let at = *due.get_or_insert(now + interval);
            if now >= at {
                *due = Some(now + interval);
                let alerts = state.book.needs();
                return Some(Look { alerts, balloon });
            }
            let waited = self.wake.wait_timeout(state, at - now);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        None
    }
}

/// The running thread. Dropping it ends the thread, after the look that is under way.
#[derive(Debug)]
pub struct Monitor {
    thresholds: Arc<Thresholds>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Starts the thread, which looks at the machine in `view`; `on_start` is called first on it.
    ///
    /// # Errors
    /// No thread.
    pub fn start(
        thresholds: Arc<Thresholds>,
        view: Arc<PublishedView>,
        events: EventSink,
        on_start: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let own = Arc::clone(&thresholds);
        let thread = std::thread::Builder::new()
            .name(THRESHOLDS_THREAD.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                on_start();
                let mut looker = Looker {
                    thresholds: own,
                    view,
                    events,
                    watch: None,
                    reporting: ReportingWatch::default(),
                };
                let mut due = None;
                while let Some(look) = looker.thresholds.wait(&mut due, INTERVAL) {
                    looker.look(look);
                }
            })?;
        Ok(Self {
            thresholds,
            thread: Some(thread),
        })
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.thresholds.stop();
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            log::error!("The thread {THRESHOLDS_THREAD} panicked");
        }
    }
}

/// The thread's side.
struct Looker {
    thresholds: Arc<Thresholds>,
    view: Arc<PublishedView>,
    events: EventSink,
    watch: Option<Watch>,
    reporting: ReportingWatch,
}

impl Looker {
    fn look(&mut self, look: Look) {
        let view = self.view.get();
        // No lock is held while figures are read, which takes milliseconds.
        let stats = view
            .machine
            .as_ref()
            .and_then(|machine| read_stats(&*machine.observer, look));
        let sources = Sources {
            counters: view
                .machine
                .as_ref()
                .filter(|_| look.alerts.counters)
                .map(|machine| machine.observer.counters()),
            reclaim: stats
                .as_ref()
                .filter(|_| look.alerts.reclaim)
                .and_then(|stats| serde_json::to_value(stats).ok()),
        };
        let crossed = {
            let mut state = self.thresholds.lock();
            state.book.step(self.thresholds.now_ms(), &sources)
        };
        for transition in crossed {
            tell(&self.events, transition);
        }
        if let (true, Some(machine), Some(stats)) = (look.balloon, &view.machine, &stats) {
            let configured = view
                .config
                .as_ref()
                .and_then(|config| config.balloon.as_ref());
            let id = configured.and_then(|balloon| balloon.id.as_deref());
            let id = id.unwrap_or(BALLOON_ID);
            self.watch_balloon(id, sight(machine, stats));
            for event in self.reporting.step(reporting_sight(machine, stats)) {
                tell_of_reporting(&self.events, id, &event);
            }
        }
    }

    fn watch_balloon(&mut self, id: &str, sight: Sight) {
        let now_ms = self.thresholds.now_ms();
        let watch = self.watch.get_or_insert_with(|| Watch::new(now_ms, sight));
        for event in watch.step(now_ms, sight) {
            tell_of_balloon(&self.events, id, event);
        }
    }
}

fn sight(machine: &MachineView, stats: &ReclaimStats) -> Sight {
    Sight {
        machine: machine.generation,
        running: machine.state == VmState::Running,
        target_bytes: stats.balloon_target_bytes,
        actual_bytes: stats.ballooned_bytes,
        failed_bytes: [&stats.report, &stats.inflate, &stats.hint]
            .into_iter()
            .fold(0, |sum, path| sum.saturating_add(path.failed_bytes)),
    }
}

fn reporting_sight(machine: &MachineView, stats: &ReclaimStats) -> ReportingSight {
    let wish = stats.reporting.report_now;
    ReportingSight {
        machine: machine.generation,
        paused_by: stats.reporting.paused_by.clone(),
        // Only of the latest wish: to an older one the guest may come back as often as it likes.
        report_now_done: if wish.done_id == wish.id { wish.id } else { 0 },
        acknowledged: match machine.observer.reporting_policy() {
            PolicySight::Balloon(status) => status.acknowledged,
            PolicySight::NoMachine | PolicySight::NoBalloon => 0,
        },
    }
}

/// The statistics, measured only if an alert is about what is measured.
fn read_stats(observer: &dyn MachineObserver, look: Look) -> Option<ReclaimStats> {
    let stats = if look.alerts.residency {
        observer.reclaim_stats()
    } else if look.alerts.reclaim || look.balloon {
        observer.balloon_figures()
    } else {
        return None;
    };
    stats
        .inspect_err(|error| log::debug!("No figures: {}", api::error_chain(error).join(": ")))
        .ok()
}

fn tell_of_balloon(events: &EventSink, id: &str, event: BalloonEvent) {
    let figures = event.properties().into_iter();
    let properties: Vec<_> = std::iter::once(("id", id.to_owned()))
        .chain(figures.map(|(name, value)| (name, value.to_string())))
        .collect();
    events("virtio-device", event.name(), &properties);
}

fn tell_of_reporting(events: &EventSink, id: &str, event: &ReportingEvent) {
    let properties: Vec<_> = std::iter::once(("id", id.to_owned()))
        .chain(event.property())
        .collect();
    events("virtio-device", event.name(), &properties);
}

fn tell(events: &EventSink, transition: Transition) {
    let event = match transition.entered {
        true => "reclaim-threshold-entered",
        false => "reclaim-threshold-left",
    };
    let properties = [
        ("name", transition.name),
        ("figure", transition.figure),
        ("value", transition.value.to_string()),
        ("threshold", transition.threshold.to_string()),
    ];
    events("virtio-device", event, &properties);
}
