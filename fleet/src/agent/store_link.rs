//! The threads that speak to the store. The control loop never waits for them.
//!
//! ```text
//!   watch thread ──something changed──► store thread ──what was asked──► control thread
//!                                         │    ▲──────what it says──────────┘
//!                                         ▼
//!                                       the store
//! ```
//!
//! A store that does not answer costs these threads their time and nobody else anything. When it is back the next round
//! reads what stands there and writes what is true.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::cluster::{HostReport, Member, MemberCounts, MemberError, Round, StoreView};
use crate::store::{Measured, Revision, Store, StoreCounters};

/// How often it is looked whether the host has something to tell.
const TICK: Duration = Duration::from_secs(1);
/// How long is waited for a change at a time.
const WATCH: Duration = Duration::from_secs(10);
/// Between two such waits, so that hints that lead to nothing cost little.
const WATCH_PAUSE: Duration = Duration::from_millis(50);
/// And when it cannot be waited.
const WATCH_RETRY: Duration = Duration::from_secs(1);

/// What is known of the store.
#[derive(Clone, Debug, Default)]
pub(super) struct StoreHealth {
    /// How the last round ended.
    pub(super) round: Round,
    /// When the last good one ended.
    pub(super) good: Option<Instant>,
    /// Why the last one was none.
    pub(super) error: Option<String>,
    /// Whether the store itself answered it.
    pub(super) up: bool,
    pub(super) counts: MemberCounts,
    pub(super) calls: StoreCounters,
}

enum Nudge {
    Changed,
    Stop,
}

/// The running threads; dropped, they leave the fleet and end.
pub(super) struct StoreLink {
    nudges: SyncSender<Nudge>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    health: Arc<Mutex<StoreHealth>>,
}

impl StoreLink {
    /// Starts them. `ask` has the control thread answer.
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
        // It may be in the middle of a wait when the agent ends; nobody waits for it.
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

    /// What is known of the store, as it changes.
    pub(super) fn health(&self) -> Arc<Mutex<StoreHealth>> {
        Arc::clone(&self.health)
    }
}

impl Drop for StoreLink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A thread that has ended needs no word.
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
            // Asking costs no call to the store, so it is done every time.
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
                            log::warn!("{}", api::chain_report("the lease goes on", &error));
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
        let result = self.member.round(&self.store, &mut |sight| ask(sight));
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
                let text = api::error_chain(&error).join(": ");
                // Once, not with every try.
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
                // Nothing was read yet; the first round needs no hint.
                thread::sleep(WATCH_RETRY);
                continue;
            }
            let until = Instant::now() + WATCH;
            match self.store.await_change(&self.prefix, Revision(seen), until) {
                Ok(true) => {
                    // A round that is about to be made anyway will see it.
                    let _ = self.nudges.try_send(Nudge::Changed);
                    thread::sleep(WATCH_PAUSE);
                }
                Ok(false) => {}
                Err(_) => thread::sleep(WATCH_RETRY),
            }
        }
    }
}
