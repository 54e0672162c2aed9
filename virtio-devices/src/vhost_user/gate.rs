//! State shared by the queues' thread and the link's thread.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::rings::Rings;
use crate::Unpoisoned;

/// Maximum time for a back end to return the rings.
const GRACE: Duration = Duration::from_secs(1);

/// Every ring is in use.
pub(super) const ALL_PAIRS: u16 = u16::MAX;

/// Reason why the back end must not have the rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// The VM is paused.
    Pause,
    /// The driver is gone.
    Reset,
}

/// The link's next action.
#[derive(Debug)]
pub(super) enum Step {
    Connect,
    /// The back end gets the rings, of which it may use those of this number of pairs.
    Start(Arc<Rings>, u16),
    /// The driver uses another number of pairs. The previous one is the second.
    SetPairs(Arc<Rings>, u16, u16),
    Stop(Arc<Rings>),
    Rest,
}

#[derive(Debug, Default)]
struct State {
    /// The rings of the active device.
    offered: Option<Arc<Rings>>,
    /// The rings that the back end may access.
    served: Option<Arc<Rings>>,
    /// Number of pairs of queues that the driver uses; [`ALL_PAIRS`] for a device without pairs.
    pairs: u16,
    /// The number that the back end knows.
    served_pairs: u16,
    paused: bool,
    /// Number of resets seen by the queues' thread and by the link. Either may be first; a reset is complete when both
    /// have seen it.
    resets: [u64; 2],
    /// The link is waiting for the back end.
    talking: bool,
    /// Shutting it down ends the link's wait.
    connection: Option<UnixStream>,
}

/// Decides when the back end may have the rings.
#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    wake: EventFd,
}

impl State {
    /// Whether the back end may have the rings.
    fn is_open(&self) -> bool {
        let [queues, link] = self.resets;
        !self.paused && queues == link
    }
}

impl Gate {
    /// A new gate, which wakes the link immediately to connect.
    pub(super) fn new() -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK)?;
        wake.write(1)?;
        Ok(Self {
            state: Mutex::new(State {
                pairs: ALL_PAIRS,
                ..State::default()
            }),
            changed: Condvar::new(),
            wake,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unpoisoned()
    }

    fn wake(&self) {
        // Fails only if the counter is full, and then the link is about to wake anyway.
        self.wake.write(1).ok();
    }

    /// The descriptor that wakes the link.
    pub(super) fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// Called by the link before it checks the state.
    pub(super) fn drain(&self) {
        // EAGAIN: already drained.
        self.wake.read().ok();
    }

    /// The driver is ready: the back end may have its rings.
    pub(super) fn offer(&self, rings: Arc<Rings>) {
        self.lock().offered = Some(rings);
        self.wake();
    }

    /// The driver uses this number of pairs. The back end learns it later.
    pub(super) fn set_pairs(&self, pairs: u16) {
        self.lock().pairs = pairs;
        self.wake();
    }

    /// The number of pairs that the driver uses.
    pub(super) fn pairs(&self) -> u16 {
        self.lock().pairs
    }

    /// Takes the rings away from the back end. Returns when the back end has returned them or its connection has been
    /// shut down: after at most [`GRACE`] plus the time that the link needs to notice. False if the connection was shut
    /// down.
    pub(super) fn close(&self, reason: Reason) -> bool {
        let mut state = self.lock();
        match reason {
            Reason::Pause => state.paused = true,
            Reason::Reset => {
                state.resets[0] += 1;
                state.offered = None;
            }
        }
        self.wake();
        let start = Instant::now();
        let mut willing = true;
        while state.talking || state.served.is_some() {
            // A handshake can be aborted immediately; for rings it is worth waiting.
            let patience = if state.served.is_some() {
                GRACE
            } else {
                Duration::ZERO
            };
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                if let Some(connection) = state.connection.take() {
                    willing = state.served.is_none();
                    // ENOTCONN: the back end has already disconnected.
                    connection.shutdown(Shutdown::Both).ok();
                } else if start.elapsed() > GRACE * 4 {
                    log::error!("the thread that talks to the back end does not respond");
                    return false;
                }
            }
            let pause = if left.is_zero() { GRACE } else { left };
            let waited = self.changed.wait_timeout(state, pause);
            state = waited.unpoisoned().0;
        }
        willing
    }

    /// The link has seen the reason, before or after the queues' thread.
    pub(super) fn link_saw(&self, reason: Reason) {
        let mut state = self.lock();
        match reason {
            Reason::Pause => state.paused = true,
            Reason::Reset => state.resets[1] += 1,
        }
        drop(state);
        self.wake();
    }

    /// Undoes a [`Gate::close`] for a pause.
    pub(super) fn end_pause(&self) {
        self.lock().paused = false;
        self.wake();
    }

    /// The link's next action. The link must report the end of a start or a stop.
    pub(super) fn next(&self, connected: bool) -> Step {
        let mut state = self.lock();
        let open = state.is_open();
        if let Some(served) = &state.served {
            let still_offered = state
                .offered
                .as_ref()
                .is_some_and(|it| Arc::ptr_eq(it, served));
            if open && still_offered && state.pairs == state.served_pairs {
                return Step::Rest;
            }
            let served = Arc::clone(served);
            state.talking = true;
            if open && still_offered {
                let pairs = state.pairs;
                let before = std::mem::replace(&mut state.served_pairs, pairs);
                return Step::SetPairs(served, pairs, before);
            }
            return Step::Stop(served);
        }
        match &state.offered {
            _ if !open => Step::Rest,
            _ if !connected => Step::Connect,
            Some(offered) => {
                let offered = Arc::clone(offered);
                state.served = Some(Arc::clone(&offered));
                state.talking = true;
                state.served_pairs = state.pairs;
                Step::Start(offered, state.pairs)
            }
            None => Step::Rest,
        }
    }

    /// The link is about to start the handshake with a back end. False if it must not now.
    pub(super) fn greet(&self, connection: UnixStream) -> bool {
        let mut state = self.lock();
        let open = state.is_open();
        if open {
            state.connection = Some(connection);
            state.talking = true;
        }
        open
    }

    /// The link no longer waits. `keeps_rings`: whether the back end has the rings.
    pub(super) fn end_talk(&self, keeps_rings: bool) {
        let mut state = self.lock();
        state.talking = false;
        if !keeps_rings {
            state.served = None;
        }
        self.changed.notify_all();
    }

    /// The connection is lost. Returns the rings that the back end had.
    pub(super) fn lose(&self) -> Option<Arc<Rings>> {
        let mut state = self.lock();
        state.connection = None;
        state.served.clone()
    }
}
