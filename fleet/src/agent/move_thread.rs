//! The thread that moves VMs from and to this host. The control loop never waits for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::thread;
use std::time::{Duration, Instant};

use super::error::AgentError;
use super::event::Event;
use super::membership::Membership;
use crate::agent_config::AgentConfig;
use crate::cluster::{Keys, MovePhase, MovePicture, Placer, Wanted};
use crate::config::Config;
use crate::moves::{Home, MoveNews, MoveSettings, Mover, RealVmms};
use crate::store::{Store, StoreError};

/// Time between two looks at the moves while some are under way.
const BUSY: Duration = Duration::from_millis(300);
/// The same while there are none.
const IDLE: Duration = Duration::from_secs(5);
/// The same if the store or the control loop does not respond.
const RETRY: Duration = Duration::from_secs(1);
/// Time limit of a search for a host.
const PLACE: Duration = Duration::from_secs(10);
/// How long the thread waits for the control loop.
const ANSWER: Duration = Duration::from_secs(5);

/// The running thread. Dropping it lets the thread end after its current call.
pub(super) struct MoveThread {
    stop: Arc<AtomicBool>,
}

impl Drop for MoveThread {
    fn drop(&mut self) {
        // The thread may be waiting for the store or a VMM, and is not joined.
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl MoveThread {
    /// Starts it, if this host takes part in moves.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start(
        config: &AgentConfig,
        proc: PathBuf,
        membership: &Membership,
        events: SyncSender<Event>,
    ) -> Result<Option<Self>, AgentError> {
        let address = config.agent.move_address;
        let Some(address) = address.filter(|_| config.receives_moves()) else {
            return Ok(None);
        };
        let agent = &config.agent;
        let first = u16::try_from(agent.move_port).unwrap_or(u16::MAX);
        let most = u32::from(u16::MAX - first) + 1;
        let count = u16::try_from(agent.move_ports.min(most)).unwrap_or(u16::MAX);
        let stop = Arc::new(AtomicBool::new(false));
        let task = Task {
            host: membership.host().to_owned(),
            keys: config.store.keys().map_err(AgentError::Store)?,
            store: membership.store(),
            call: config.store.deadline.duration(),
            planning: config.planning.clone(),
            settings: MoveSettings {
                address,
                ports: (first, count),
                command: agent.move_command.clone(),
                tls_dir: agent.move_tls_dir.clone(),
                sockets: config.discovery.sockets.clone(),
                proc,
            },
            events,
            stop: Arc::clone(&stop),
        };
        let thread = thread::Builder::new().name("moves".to_owned());
        thread
            .spawn(move || task.run())
            .map_err(AgentError::Thread)?;
        Ok(Some(Self { stop }))
    }
}

struct Task {
    host: String,
    keys: Keys,
    store: Arc<dyn Store>,
    /// Time limit of a call to the store.
    call: Duration,
    planning: Config,
    settings: MoveSettings,
    events: SyncSender<Event>,
    stop: Arc<AtomicBool>,
}

/// The control loop has ended.
struct Ended;

impl Task {
    fn run(self) {
        let placer = Placer::new(
            &*self.store,
            self.keys.clone(),
            self.planning.clone(),
            self.call,
            Placer::seed(),
        );
        let parts = (&*self.store, self.keys.clone());
        let reserve = |wanted: &Wanted| placer.reserve_move(wanted, Instant::now() + PLACE);
        let mut mover = Mover::new(self.host.clone(), parts, &reserve, self.call);
        let mut vmms = RealVmms::new(self.settings.clone());
        let mut is_failing = false;
        while !self.stop.load(Ordering::Relaxed) {
            match self.round(&mut mover, &mut vmms) {
                Ok(Some(picture)) => {
                    is_failing = false;
                    self.wait(&picture);
                }
                Ok(None) => thread::sleep(RETRY),
                Err(error) => match error {
                    RoundError::Ended => return,
                    RoundError::Store(error) => {
                        // Logged once, not with every try.
                        if !std::mem::replace(&mut is_failing, true) {
                            log::warn!("moves: {}", api::error_line(&error));
                        }
                        thread::sleep(RETRY);
                    }
                },
            }
        }
    }

    /// One round; the moves as they were before it, unless the control loop is too busy.
    fn round(
        &self,
        mover: &mut Mover<'_>,
        vmms: &mut RealVmms,
    ) -> Result<Option<MovePicture>, RoundError> {
        vmms.reap();
        let (picture, news) = mover.look().map_err(RoundError::Store)?;
        let Some(home) = self.tell(news).map_err(|Ended| RoundError::Ended)? else {
            return Ok(None);
        };
        mover
            .round(&picture, &home, vmms)
            .map_err(RoundError::Store)?;
        Ok(Some(picture))
    }

    fn tell(&self, news: MoveNews) -> Result<Option<Home>, Ended> {
        let (answer, answered) = mpsc::sync_channel(1);
        match self.events.try_send(Event::Moves(Box::new(news), answer)) {
            Ok(()) => Ok(answered.recv_timeout(ANSWER).ok()),
            Err(TrySendError::Full(_)) => Ok(None),
            Err(TrySendError::Disconnected(_)) => Err(Ended),
        }
    }

    /// Waits until the next round is due.
    fn wait(&self, picture: &MovePicture) {
        let mut records = picture.moves.iter().map(|stored| &stored.record);
        let is_busy = picture.orders.contains_key(&self.host)
            || records.any(|record| {
                let is_own = record.from == self.host || record.to == self.host;
                is_own && !record.phase.is_over() && record.phase != MovePhase::Arrived
            });
        let until = Instant::now() + if is_busy { BUSY } else { IDLE };
        let prefix = self.keys.moves();
        match self.store.await_change(&prefix, picture.revision, until) {
            Ok(_) => {}
            Err(_) => thread::sleep(RETRY),
        }
    }
}

enum RoundError {
    Ended,
    Store(StoreError),
}
