//! The threads that access the store. The control loop never waits for them.
//!
//! ```text
//!   watch thread ──something changed──► store thread ─────requests─────► control thread
//!                                         │    ▲───────responses────────────┘
//!                                         ▼
//!                                       the store
//! ```
//!
//! A store that does not respond only delays these threads. When it is available again, the next round reads its
//! contents and writes the current state.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::cluster::{HostReport, Member, MemberCounts, MemberError, Round, StoreView};
use crate::store::{Measured, Revision, Store, StoreCounters};

/// How often the thread checks whether the host has something to report.
const TICK: Duration = Duration::from_secs(1);
/// Maximum duration of one wait for a change.
const WATCH: Duration = Duration::from_secs(10);
/// Interval between two such waits, so that useless hints cost little.
const WATCH_PAUSE: Duration = Duration::from_millis(50);
/// The interval if waiting is not possible.
const WATCH_RETRY: Duration = Duration::from_secs(1);

/// The status of the store.
#[derive(Clone, Debug, Default)]
pub(super) struct StoreHealth {
    /// The result of the last round.
    pub(super) round: Round,
    /// When the last successful one ended.
    pub(super) good: Option<Instant>,
    /// The reason why the last one failed.
    pub(super) error: Option<String>,
    /// Whether the store itself responded.
    pub(super) up: bool,
    pub(super) counts: MemberCounts,
    pub(super) calls: StoreCounters,
}

enum Nudge {
    Changed,
    Stop,
}

/// The running threads. Dropping the link leaves the fleet and ends them.
pub(super) struct StoreLink {
    nudges: SyncSender<Nudge>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    health: Arc<Mutex<StoreHealth>>,
}

impl StoreLink {
    /// Starts them. `ask` makes the control thread respond.
    pub(super) fn start(
        member: Member,
        store: Arc<dyn Store>,
        ask: impl Fn(StoreView) -> Option<HostReport> + Send + 'static,
    ) -> io::Result<Self> {
        let (nudges, nudged) = mpsc::sync_channel(1);
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(AtomicU64::new(0));
        let health: Arc<Mutex<StoreHealth>> = Arc::default();
        let watch = Watch {
            prefix: member.watched(),
            store: Arc::clone(&store),
            seen: Arc::clone(&seen),
            stop: Arc::clone(&stop),
            nudges: nudges.clone(),
        };
        // It may be waiting when the agent ends, and is not joined.
        thread::Builder::new()
            .name("store-watch".to_owned())
            .spawn(move || watch.run())?;
        let mut worker = Worker {
            member,
            store: Measured::new(store),
            ask: Box::new(ask),
            seen,
            health: Arc::clone(&health),
        };
        let thread = thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || worker.run(&nudged))?;
        Ok(Self {
            nudges,
            stop,
            thread: Some(thread),
            health,
        })
    }

    /// The current status of the store, shared with its thread.
    pub(super) fn health(&self) -> Arc<Mutex<StoreHealth>> {
        Arc::clone(&self.health)
    }
}

impl Drop for StoreLink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A thread that has ended needs no notification.
        let _ = self.nudges.send(Nudge::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic there was printed already.
            let _ = thread.join();
        }
    }
}

struct Worker {
    member: Member,
    store: Measured,
    ask: Box<dyn Fn(StoreView) -> Option<HostReport> + Send>,
    seen: Arc<AtomicU64>,
    health: Arc<Mutex<StoreHealth>>,
}

impl Worker {
    fn run(&mut self, nudged: &Receiver<Nudge>) {
        loop {
            let now = Instant::now();
            // The check costs no call to the store, so it is done every time.
            let news = (self.ask)(StoreView::default())
                .is_some_and(|account| self.member.has_news(&account, now));
            if news || self.member.is_due(now) {
                self.round();
            }
            loop {
                match nudged.recv_timeout(TICK) {
                    Ok(Nudge::Changed) => self.round(),
                    Err(RecvTimeoutError::Timeout) => break,
                    Ok(Nudge::Stop) | Err(RecvTimeoutError::Disconnected) => {
                        if let Err(error) = self.member.leave(&self.store) {
                            log::warn!("{}", api::chain_report("cannot end the lease", &error));
                        }
                        return;
                    }
                }
                if self.member.is_due(Instant::now()) {
                    break;
                }
            }
        }
    }

    fn round(&mut self) {
        let ask = &self.ask;
        let result = self.member.round(&self.store, &mut |view| ask(view));
        let mut health = self.health.lock();
        health.counts = self.member.counts();
        health.calls = self.store.counters();
        match result {
            Ok(round) => {
                self.seen.store(round.revision.0, Ordering::Relaxed);
                if health.error.take().is_some() {
                    log::info!("the store serves this host again");
                }
                health.round = round;
                health.good = Some(Instant::now());
                health.up = true;
            }
            Err(error) => {
                let text = api::error_line(&error);
                // Logged once, not with every try.
                if health.error.is_none() {
                    log::warn!("store: {text}");
                }
                health.error = Some(text);
                health.up = !matches!(error, MemberError::Store(_));
                health.round.registered = false;
            }
        }
    }
}

/// Waits for changes.
struct Watch {
    prefix: String,
    store: Arc<dyn Store>,
    seen: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    nudges: SyncSender<Nudge>,
}

impl Watch {
    fn run(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let seen = self.seen.load(Ordering::Relaxed);
            if seen == 0 {
                // Nothing has been read yet; the first round needs no hint.
                thread::sleep(WATCH_RETRY);
                continue;
            }
            let until = Instant::now() + WATCH;
            match self.store.await_change(&self.prefix, Revision(seen), until) {
                Ok(true) => {
                    // A round that is about to start anyway will see it.
                    let _ = self.nudges.try_send(Nudge::Changed);
                    thread::sleep(WATCH_PAUSE);
                }
                Ok(false) => {}
                Err(_) => thread::sleep(WATCH_RETRY),
            }
        }
    }
}
