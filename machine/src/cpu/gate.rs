//! The gate that every vCPU thread passes before it enters the guest.
//!
//! ```text
//!              ┌── pause ──►            ── stop ──►
//!   Running ───┤             Paused ───┤             Stopping ─► threads end
//!              ◄── resume ──┘          └── resume ──► Running
//! ```
//!
//! The control thread sets the wanted state and kicks. vCPU threads check it at the gate and park. A thread that has
//! ended or failed counts as parked, because it will not access the guest again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use virtio_devices::Unpoisoned;

/// The state that the control thread requests of the vCPU threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Running,
    Paused,
    Stopping,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    /// Threads that may still access the guest.
    active: usize,
    /// Threads that have not ended.
    alive: usize,
    /// How often `wanted` was set.
    changes: u64,
    /// No thread passes for a moment.
    held: bool,
}

impl State {
    fn is_open(&self) -> bool {
        self.wanted == Wanted::Running && !self.held
    }
}

#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// [`State::is_open`]; checked without a lock before every run.
    open: AtomicBool,
}

impl Gate {
    /// A closed gate without threads.
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                wanted: Wanted::Paused,
                active: 0,
                alive: 0,
                changes: 0,
                held: false,
            }),
            changed: Condvar::new(),
            open: AtomicBool::new(false),
        }
    }

    /// No code panics while it holds the lock, and the state is plain numbers.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unpoisoned()
    }

    /// Control thread: adds a thread that is about to start. It begins parked.
    pub(super) fn add_thread(&self) {
        self.lock().alive += 1;
    }

    /// Control thread: the thread that was just added could not be started.
    /// vCPU thread: the thread is about to end.
    pub(super) fn remove_thread(&self) {
        self.lock().alive -= 1;
        self.changed.notify_all();
    }

    /// Control thread: sets the wanted state. The caller kicks the threads.
    pub(super) fn set(&self, wanted: Wanted) {
        let mut state = self.lock();
        state.wanted = wanted;
        state.changes += 1;
        self.open.store(state.is_open(), Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Control thread: whether no thread may access the guest until [`Wanted`] changes.
    pub(super) fn is_paused(&self) -> bool {
        self.lock().wanted == Wanted::Paused
    }

    /// Any thread: lets no thread pass, or again those that may run. The caller kicks the threads if they are held.
    pub(super) fn hold(&self, held: bool) {
        let mut state = self.lock();
        state.held = held;
        self.open.store(state.is_open(), Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Control thread: waits until no thread accesses the guest; on a timeout returns how many still do.
    pub(super) fn wait_parked(&self, deadline: Duration) -> Result<(), usize> {
        self.wait(deadline, |state| state.active)
    }

    /// Control thread: waits until all threads but `staying` have ended; on a timeout returns how many have not.
    pub(super) fn wait_ended(&self, staying: usize, deadline: Duration) -> Result<(), usize> {
        self.wait(deadline, |state| state.alive.saturating_sub(staying))
    }

    /// Control thread: makes parked threads check their own flags.
    pub(super) fn wake(&self) {
        // The lock ensures that no thread is between its check and its wait.
        let _state = self.lock();
        self.changed.notify_all();
    }

    fn wait(&self, deadline: Duration, left: impl Fn(&State) -> usize) -> Result<(), usize> {
        let end = Instant::now() + deadline;
        let mut state = self.lock();
        loop {
            let left = left(&state);
            let remaining = end.saturating_duration_since(Instant::now());
            if left == 0 {
                return Ok(());
            }
            if remaining.is_zero() {
                return Err(left);
            }
            state = self.changed.wait_timeout(state, remaining).unpoisoned().0;
        }
    }

    /// vCPU thread: parks until the guest may run (`Some`) or the thread must end (`None`): all threads stop, or
    /// `leaves` is set. While the pass exists, the thread counts as accessing the guest.
    pub(super) fn enter(&self, leaves: &AtomicBool) -> Option<Pass<'_>> {
        let mut state = self.lock();
        loop {
            match state.wanted {
                _ if leaves.load(Ordering::SeqCst) => return None,
                Wanted::Running if !state.held => {
                    state.active += 1;
                    return Some(Pass { gate: self });
                }
                Wanted::Stopping => return None,
                Wanted::Running | Wanted::Paused => {
                    state = self.changed.wait(state).unpoisoned();
                }
            }
        }
    }

    /// vCPU thread: parks until the thread must end, as in [`Gate::enter`].
    pub(super) fn wait_for_stop(&self, leaves: &AtomicBool) {
        let mut state = self.lock();
        while state.wanted != Wanted::Stopping && !leaves.load(Ordering::SeqCst) {
            state = self.changed.wait(state).unpoisoned();
        }
    }

    /// vCPU thread: for [`Gate::wait_for_change`].
    pub(super) fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// vCPU thread: parks until the wanted state is set again after [`Gate::changes`] was `seen`, or `leaves` is set.
    pub(super) fn wait_for_change(&self, seen: u64, leaves: &AtomicBool) {
        let mut state = self.lock();
        while state.changes == seen && !leaves.load(Ordering::SeqCst) {
            state = self.changed.wait(state).unpoisoned();
        }
    }

    /// vCPU thread: whether the guest may continue to run.
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }
}

/// Permission to access the guest, returned on drop.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    gate: &'a Gate,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.lock().active -= 1;
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, channel};
    use std::thread::JoinHandle;

    const DEADLINE: Duration = Duration::from_secs(10);
    static STAYS: AtomicBool = AtomicBool::new(false);

    /// A thread that passes while the gate is open, and reports when it has entered.
    fn passer(gate: &Arc<Gate>) -> (JoinHandle<()>, Receiver<()>) {
        let (entered, on_entered) = channel();
        let gate = Arc::clone(gate);
        let thread = std::thread::spawn(move || {
            while let Some(_pass) = gate.enter(&STAYS) {
                entered.send(()).unwrap();
                while gate.is_open() {
                    std::thread::yield_now();
                }
            }
        });
        (thread, on_entered)
    }

    #[test]
    fn gate_closed_lets_nobody_in_until_it_opens() {
        let gate = Arc::new(Gate::new());
        let (thread, on_entered) = passer(&gate);
        assert!(on_entered.try_recv().is_err());
        for _ in 0..3 {
            gate.set(Wanted::Running);
            on_entered.recv_timeout(DEADLINE).unwrap();
            assert_eq!(gate.wait_parked(Duration::ZERO), Err(1));
            gate.set(Wanted::Paused);
            gate.wait_parked(DEADLINE).unwrap();
        }
        gate.set(Wanted::Stopping);
        thread.join().unwrap();
    }

    #[test]
    fn gate_that_is_held_lets_nobody_in_and_ends_its_threads() {
        let gate = Arc::new(Gate::new());
        gate.set(Wanted::Running);
        gate.hold(true);
        assert!(!gate.is_open());
        let (thread, on_entered) = passer(&gate);
        gate.wait_parked(DEADLINE).unwrap();
        assert!(on_entered.try_recv().is_err());
        gate.hold(false);
        on_entered.recv_timeout(DEADLINE).unwrap();
        // A pause and a resume do not end it.
        gate.hold(true);
        gate.set(Wanted::Paused);
        gate.wait_parked(DEADLINE).unwrap();
        gate.set(Wanted::Running);
        assert!(!gate.is_open());
        gate.set(Wanted::Stopping);
        thread.join().unwrap();
        assert!(on_entered.try_recv().is_err());
    }

    #[test]
    fn gate_wait_for_threads_gives_up_at_the_deadline() {
        let gate = Gate::new();
        gate.add_thread();
        gate.set(Wanted::Stopping);
        assert_eq!(gate.wait_ended(0, Duration::from_millis(1)), Err(1));
        assert_eq!(gate.wait_ended(1, Duration::ZERO), Ok(()));
        gate.remove_thread();
        assert_eq!(gate.wait_ended(0, Duration::ZERO), Ok(()));
    }

    #[test]
    fn gate_parked_thread_that_leaves_ends_alone() {
        let gate = Arc::new(Gate::new());
        let threads = [true, false].map(|failed| {
            let leaves = Arc::new(AtomicBool::new(false));
            gate.add_thread();
            let thread = std::thread::spawn({
                let (gate, leaves) = (Arc::clone(&gate), Arc::clone(&leaves));
                move || {
                    if failed {
                        gate.wait_for_stop(&leaves);
                    } else {
                        assert!(gate.enter(&leaves).is_none());
                    }
                    gate.remove_thread();
                }
            });
            (thread, leaves)
        });
        for (staying, (thread, leaves)) in [1, 0].into_iter().zip(threads) {
            leaves.store(true, Ordering::SeqCst);
            gate.wake();
            gate.wait_ended(staying, DEADLINE).unwrap();
            thread.join().unwrap();
        }
    }

    #[test]
    fn gate_thread_that_waits_for_a_change_misses_none() {
        let gate = Arc::new(Gate::new());
        gate.set(Wanted::Running);
        let seen = gate.changes();
        let thread = std::thread::spawn({
            let gate = Arc::clone(&gate);
            move || {
                gate.wait_for_change(seen, &STAYS);
                drop(gate.enter(&STAYS));
            }
        });
        gate.set(Wanted::Paused);
        gate.wait_parked(DEADLINE).unwrap();
        gate.set(Wanted::Running);
        thread.join().unwrap();
    }

    #[test]
    fn gate_thread_that_waits_for_stop_does_not_hold_up_a_pause() {
        let gate = Arc::new(Gate::new());
        gate.set(Wanted::Running);
        let thread = std::thread::spawn({
            let gate = Arc::clone(&gate);
            move || {
                drop(gate.enter(&STAYS));
                gate.wait_for_stop(&STAYS);
            }
        });
        gate.set(Wanted::Paused);
        gate.wait_parked(DEADLINE).unwrap();
        gate.set(Wanted::Stopping);
        thread.join().unwrap();
    }
}
