//! The thread `thresholds`: reads the figures of the machine once per second while there is something to evaluate,
//! and reports what has changed ([`crate::alerts`], [`crate::balloon_events`]).

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use api::ReclaimStats;

use crate::alerts::{Sources, Transition};
use crate::balloon_events::BalloonEvents;
use crate::device_ids::BALLOON_ID;
use crate::events::{Event, EventKind, EventSink};
use crate::threads::THRESHOLDS_THREAD;
use crate::thresholds::{Look, Thresholds};
use crate::view::PublishedView;
use crate::vm::MachineObserver;

/// Interval of the evaluation. Each evaluation measures residency at most once. After a measurement, the probe rests a
/// hundred times as long as the measurement took, so that alerts use at most 1 % of a core.
const INTERVAL: Duration = Duration::from_secs(1);
const STACK_BYTES: usize = 256 << 10;

/// The running thread. Dropping it ends the thread after the current evaluation.
#[derive(Debug)]
pub(crate) struct FiguresThread {
    thresholds: Arc<Thresholds>,
    thread: Option<JoinHandle<()>>,
}

impl FiguresThread {
    /// Starts the thread, which evaluates the machine in `view`; `on_start` is called first on it.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn start(
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

impl Drop for FiguresThread {
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
        for transition in self.thresholds.step(&sources) {
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
                (self.events)(&Event::of_device(kind, id));
            }
        }
    }
}

/// The statistics; residency is measured only if an alert needs it.
fn read_stats(observer: &dyn MachineObserver, look: Look) -> Option<ReclaimStats> {
    let stats = if look.alerts.residency {
        observer.reclaim_stats()
    } else if look.alerts.reclaim || look.balloon {
        observer.balloon_figures()
    } else {
        return None;
    };
    stats
        .inspect_err(|error| log::debug!("No figures: {}", api::error_line(error)))
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
