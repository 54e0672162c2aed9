//! Slows a guest down that writes its memory faster than the connection transfers it.
//!
//! ```text
//!   left after a pass   100 MiB ─► 95 MiB ─► 85 MiB ─► 60 MiB ─► 40 MiB
//!   vCPUs held           0 %      20 %      40 %      40 %      40 %      of each period
//! ```
//! Each pass that leaves more than three quarters of what its predecessor left begins the next step.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use machine::cpu::VcpuBrake;
use virtio_devices::Unpoisoned;

use crate::threads::MIGRATION_THREAD;

/// The part of each period for which vCPUs are held, in percent.
const STEPS: &[u8] = &[20, 40, 60, 80, 90, 95];
const PERIOD: Duration = Duration::from_millis(100);

/// Holds back the guest. Dropping it releases the guest.
pub trait Brake: Send + Sync + std::fmt::Debug {
    /// The guest makes no progress soon.
    fn hold(&self);
    /// It makes progress again.
    fn release(&self);
}

impl Brake for VcpuBrake {
    fn hold(&self) {
        Self::hold(self);
    }

    fn release(&self) {
        Self::release(self);
    }
}

/// Slows the guest down step by step, until it is dropped.
#[derive(Debug)]
pub(super) struct Converge {
    brake: Arc<dyn Brake>,
    shared: Arc<Shared>,
    /// Started at the first step.
    thread: Option<JoinHandle<()>>,
    steps: std::slice::Iter<'static, u8>,
    last_left_bytes: Option<u64>,
}

impl Converge {
    pub(super) fn new(brake: &Arc<dyn Brake>) -> Self {
        Self {
            brake: Arc::clone(brake),
            shared: Arc::default(),
            thread: None,
            steps: STEPS.iter(),
            last_left_bytes: None,
        }
    }

    /// A pass has left this much. Returns the percentage if it is higher from now on.
    pub(super) fn after_pass(&mut self, left_bytes: u64) -> io::Result<Option<u8>> {
        let last = self.last_left_bytes.replace(left_bytes);
        if last.is_none_or(|last| left_bytes <= last / 4 * 3) {
            return Ok(None);
        }
        let Some(percent) = self.steps.next() else {
            return Ok(None);
        };
        self.shared.lock().percent = *percent;
        if self.thread.is_none() {
            let (shared, brake) = (Arc::clone(&self.shared), Arc::clone(&self.brake));
            let thread = std::thread::Builder::new()
                .name(MIGRATION_THREAD.to_owned())
                .spawn(move || shared.hold_in_turns(&*brake))?;
            self.thread = Some(thread);
        }
        Ok(Some(*percent))
    }
}

impl Drop for Converge {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has released the guest, too.
            thread.join().ok();
        }
    }
}

/// Releases the guest, even if the thread unwinds.
struct Released<'a>(&'a dyn Brake);

impl Drop for Released<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

#[derive(Debug, Default)]
struct State {
    percent: u8,
    is_over: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unpoisoned()
    }

    fn hold_in_turns(&self, brake: &dyn Brake) {
        let _released = Released(brake);
        loop {
            let percent = u32::from(self.lock().percent);
            if self.is_over_within(PERIOD * (100 - percent) / 100) {
                return;
            }
            brake.hold();
            if self.is_over_within(PERIOD * percent / 100) {
                return;
            }
            brake.release();
        }
    }

    /// Waits for the end, at most this long.
    fn is_over_within(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        let mut state = self.lock();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if state.is_over || left.is_zero() {
                return state.is_over;
            }
            state = self.changed.wait_timeout(state, left).unpoisoned().0;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// Records when it holds and releases.
    #[derive(Debug)]
    struct Recorder(Mutex<Sender<bool>>);

    impl Brake for Recorder {
        fn hold(&self) {
            self.0.lock().unwrap().send(true).unwrap();
        }

        fn release(&self) {
            self.0.lock().unwrap().send(false).unwrap();
        }
    }

    #[test]
    fn guest_is_held_in_turns_until_the_end_and_released_then() {
        let (sender, held) = channel();
        let brake: Arc<dyn Brake> = Arc::new(Recorder(Mutex::new(sender)));
        let mut converge = Converge::new(&brake);
        assert_eq!(converge.after_pass(100).unwrap(), None);
        assert!(held.try_recv().is_err());
        assert_eq!(converge.after_pass(100).unwrap(), Some(20));
        for expected in [true, false, true, false, true] {
            let it = held.recv_timeout(Duration::from_secs(60)).unwrap();
            assert_eq!(it, expected);
        }
        drop(converge);
        drop(brake);
        // The thread has ended, so no other event can follow.
        assert_eq!(held.iter().last(), Some(false));
    }

    #[test]
    fn steps_follow_passes_that_shrink_too_little_and_have_an_end() {
        let (sender, _held) = channel();
        let brake: Arc<dyn Brake> = Arc::new(Recorder(Mutex::new(sender)));
        let mut converge = Converge::new(&brake);
        let mut after = |left| converge.after_pass(left).unwrap();
        assert_eq!(after(1000), None);
        assert_eq!(after(740), None, "three quarters are enough");
        assert_eq!(after(730), Some(20));
        assert_eq!(after(400), None);
        let steps: Vec<_> = (0..8).map(|_| after(400)).collect();
        let percent = [40, 60, 80, 90, 95].map(Some);
        assert_eq!(steps[..5], percent);
        assert_eq!(steps[5..], [None; 3]);
    }
}
