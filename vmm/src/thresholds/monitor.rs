//! The thread that looks at figures once a second, and the book it shares with the control thread and the API.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::{ReclaimThresholds, ReclaimThresholdsChange};

use super::alert::Transition;
use super::book::Book;
use super::error::ThresholdError;
use super::figure::{Needs, Sources};
use crate::control::{MachineObserver, PublishedView};
use crate::vm::EventSink;

/// Name of the thread.
pub const THRESHOLDS_THREAD: &str = "thresholds";

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
    has_machine: bool,
    stop: bool,
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

    /// Everything as it stands. Takes microseconds.
    pub fn status(&self) -> ReclaimThresholds {
        self.lock().book.status(self.now_ms())
    }

    /// Forgets everything: the VM is no more.
    pub fn clear(&self) {
        self.lock().book.clear();
    }

    /// Tells whether there is a machine to look at.
    pub fn set_has_machine(&self, has_machine: bool) {
        self.lock().has_machine = has_machine;
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
    fn wait(&self, due: &mut Option<Instant>, interval: Duration) -> Option<Needs> {
        let mut state = self.lock();
        while !state.stop {
            if !(state.has_machine && state.book.has_alerts()) {
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
                return Some(state.book.needs());
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
                let mut due = None;
                while let Some(needs) = own.wait(&mut due, INTERVAL) {
                    look(&own, needs, &view, &events);
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

fn look(thresholds: &Thresholds, needs: Needs, view: &PublishedView, events: &EventSink) {
    // No lock is held while figures are read, which takes milliseconds.
    let sources = view
        .get()
        .machine
        .as_ref()
        .map(|machine| read(&*machine.observer, needs))
        .unwrap_or_default();
    let crossed = {
        let mut state = thresholds.lock();
        state.book.step(thresholds.now_ms(), &sources)
    };
    for transition in crossed {
        tell(events, transition);
    }
}

fn read(observer: &dyn MachineObserver, needs: Needs) -> Sources {
    let stats = match needs {
        Needs {
            residency: true, ..
        } => observer.reclaim_stats(),
        Needs { reclaim: true, .. } => observer.balloon_figures(),
        _ => return counters_alone(observer, needs),
    };
    let reclaim = match stats {
        Ok(stats) => serde_json::to_value(stats).ok(),
        Err(error) => {
            log::debug!("No figures: {}", api::error_chain(&error).join(": "));
            None
        }
    };
    Sources {
        reclaim,
        ..counters_alone(observer, needs)
    }
}

fn counters_alone(observer: &dyn MachineObserver, needs: Needs) -> Sources {
    Sources {
        reclaim: None,
        counters: needs.counters.then(|| observer.counters()),
    }
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
