//! The thread that evaluates figures once per second, and the settings it shares with the control thread and the API.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::{ReclaimStats, ReclaimThresholds, ReclaimThresholdsChange, ReportingPolicy};

use super::ThresholdError;
use super::settings::ThresholdSettings;
use crate::alerts::{Needs, Sources, Transition};
use crate::balloon_events::BalloonEvents;
use crate::control::PublishedView;
use crate::device_ids::BALLOON_ID;
use crate::events::{Event, EventKind, EventSink};
use crate::reporting_policy::GuestPolicy;
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
    settings: ThresholdSettings,
    subjects: Subjects,
    stop: bool,
}

/// What there is to evaluate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subjects {
    /// A machine, for alerts.
    pub machine: bool,
    /// A machine with a balloon, and a reader of its events.
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
        self.lock().settings.change(change, self.now_ms())?;
        self.wake.notify_all();
        Ok(())
    }

    /// Everything as it stands, for the guest that runs now. Takes microseconds.
    pub fn status(&self, guest: GuestPolicy) -> ReclaimThresholds {
        self.lock().settings.status(self.now_ms(), guest)
    }

    /// The reporting policy, if one was set.
    pub fn policy(&self) -> Option<ReportingPolicy> {
        self.lock().settings.policy()
    }

    /// Forgets everything: the VM is no more.
    pub fn clear(&self) {
        self.lock().settings.clear();
    }

    /// Sets what there is to evaluate.
    pub fn set_subjects(&self, subjects: Subjects) {
        self.lock().subjects = subjects;
        self.wake.notify_all();
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The settings are whole after every change, so a thread that died with the lock has left nothing half done.
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
            if !(balloon || (machine && state.settings.has_alerts())) {
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
                let alerts = state.settings.needs();
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
                let mut evaluator = Evaluator {
                    thresholds: own,
                    view,
                    events,
                    balloon: BalloonEvents::default(),
                };
                let mut due = None;
                while let Some(look) = evaluator.thresholds.wait(&mut due, INTERVAL) {
                    evaluator.look(look);
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
struct Evaluator {
    thresholds: Arc<Thresholds>,
    view: Arc<PublishedView>,
    events: EventSink,
    balloon: BalloonEvents,
}

impl Evaluator {
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
            state.settings.step(self.thresholds.now_ms(), &sources)
        };
        for transition in crossed {
            (self.events)(&event_of(transition).into());
        }
        if let (true, Some(machine), Some(stats)) = (look.balloon, &view.machine, &stats) {
            let configured = view
                .config
                .as_ref()
                .and_then(|config| config.balloon.as_ref());
            let id = configured.and_then(|balloon| balloon.id.as_deref());
            let id = id.unwrap_or(BALLOON_ID);
            let now_ms = self.thresholds.now_ms();
            for kind in self.balloon.step(now_ms, machine, stats) {
                let device = Some(id);
                (self.events)(&Event { kind, device });
            }
        }
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

fn event_of(transition: Transition) -> EventKind {
    let Transition {
        entered,
        name,
        figure,
        value,
        threshold,
    } = transition;
    if entered {
        EventKind::AlertEntered {
            name,
            figure,
            value,
            threshold,
        }
    } else {
        EventKind::AlertLeft {
            name,
            figure,
            value,
            threshold,
        }
    }
}
