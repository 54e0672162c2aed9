//! Watchdog device (virtio device id 35, as Cloud Hypervisor defines it): after a guest's first ping it must keep
//! pinging; otherwise the host resets the machine.
//!
//! There is one queue. Each device-writable buffer on it is a ping, answered with one byte.
//!
//! ```text
//!   unarmed ── first ping ──► armed ── no ping within the timeout ──► expired: the host is called, once
//!      ▲                       │ ▲
//!      └──── device reset ─────┘ └── ping, or resume after a pause: the timeout restarts
//! ```

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use state::{Part, Saved, State, StateError, parts};
use vmm_sys_util::timerfd::TimerFd;

use crate::counters::counters;
use crate::device::{Counters, QueueHandler, VirtioDevice, boxed};
use crate::empty_state::{empty_state, saves_empty_state};
use crate::queue::{ChainBuffers, ChainError, Driver, Reply, SingleQueue, SingleQueueDevice};
use crate::worker::Turn;

/// Virtio device id.
const DEVICE_TYPE: u32 = 35;
/// Entries of the one queue. A driver keeps a single ping in flight.
const QUEUE_SIZES: [u16; 1] = [8];
/// The response to a ping.
const PONG: [u8; 1] = [1];

/// Maximum time between pings. Cloud Hypervisor has the same limit but checks it only every 15 s, so it resets up to 15
/// s later.
pub const TIMEOUT: Duration = Duration::from_secs(20);

counters! {
    Stats {
        pings,
        bad_requests,
        expirations,
    }
}

empty_state! {
    /// The configuration half has no state that a driver could change.
    WatchdogState = WATCHDOG
}

/// The state of the queue half. It does not include the time of the last ping: the timeout restarts on the host that
/// continues the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WatchdogTimerState {
    /// The guest has pinged, and the timeout has not expired since.
    pub armed: bool,
}

impl State for WatchdogTimerState {
    const PART: Part = parts::WATCHDOG_TIMER;
}

/// The configuration half. There is no device configuration.
#[derive(Debug)]
pub struct Watchdog {
    handler: Option<Pings>,
    stats: Arc<Stats>,
}

impl Watchdog {
    /// Calls `expired` on the worker thread when an armed watchdog has received no ping for `timeout`. `expired` must
    /// not block. `id` names the device and its thread.
    ///
    /// # Errors
    /// No descriptor is left for the timer.
    pub fn new(
        id: &str,
        timeout: Duration,
        expired: impl FnMut() + Send + 'static,
    ) -> io::Result<Self> {
        let stats = Arc::new(Stats::default());
        Ok(Self {
            handler: Some(Pings {
                name: id.to_owned(),
                timer: TimerFd::new()?,
                timeout,
                armed: false,
                expired: Box::new(expired),
                stats: Arc::clone(&stats),
            }),
            stats,
        })
    }
}

impl VirtioDevice for Watchdog {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        boxed(self.handler.take().map(SingleQueue::new))
    }

    saves_empty_state!(WatchdogState);

    fn counters(&self) -> Counters {
        self.stats.read()
    }
}

/// The queue half.
struct Pings {
    name: String,
    timer: TimerFd,
    timeout: Duration,
    armed: bool,
    expired: Box<dyn FnMut() + Send>,
    stats: Arc<Stats>,
}

crate::debug_fields!(Pings { name, armed });

impl Pings {
    /// Starts the timeout if the watchdog is armed, and stops it otherwise.
    fn set_timer(&mut self) {
        let done = if self.armed {
            self.timer.reset(self.timeout, None)
        } else {
            self.timer.clear()
        };
        if let Err(error) = done {
            // Neither call can fail on a timer with a valid time.
            log::error!("{}: timer: {error}", self.name);
        }
    }
}

impl SingleQueueDevice for Pings {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn activated(&mut self, _features: u64) {
        self.set_timer();
    }

    fn answer(
        &mut self,
        _driver: &Driver,
        request: Result<ChainBuffers, ChainError>,
        turn: &mut Turn,
    ) -> Reply {
        Reply::Done(match request {
            Ok(buffers) if buffers.writable.copy_in(&PONG) > 0 => {
                self.stats.pings.count();
                self.armed = true;
                turn.charge_call(1, 1);
                self.set_timer();
                1
            }
            _ => {
                self.stats.bad_requests.count();
                0
            }
        })
    }

    fn timer(&self) -> Option<RawFd> {
        Some(self.timer.as_raw_fd())
    }

    fn timer_expired(&mut self) {
        // The worker also woke up for a ping and served it first, so the timeout has restarted.
        if self.timer.is_armed().unwrap_or(false) {
            return;
        }
        // Disarmed: the machine is about to be reset, and a new guest arms its own watchdog.
        self.armed = false;
        self.set_timer();
        self.stats.expirations.count();
        log::warn!(
            "{}: no ping from the guest for {} s, resetting the VM",
            self.name,
            self.timeout.as_secs()
        );
        (self.expired)();
    }

    fn paused(&mut self) {
        // A paused guest cannot ping.
        if let Err(error) = self.timer.clear() {
            log::error!("{}: timer: {error}", self.name);
        }
    }

    fn resumed(&mut self) {
        self.set_timer();
    }

    fn reset(&mut self) {
        self.armed = false;
        self.set_timer();
    }

    fn own_state(&self) -> Option<Saved> {
        Some(Saved::of(&WatchdogTimerState { armed: self.armed }))
    }

    fn restore(&mut self, own: Option<&Saved>) -> Result<(), StateError> {
        let missing = || StateError::invalid(parts::WATCHDOG_TIMER, "armed", "is missing");
        let WatchdogTimerState { armed } = own.ok_or_else(missing)?.read()?;
        self.armed = armed;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};

    use crate::testing::{HandlerHarness, Segment, conformance};
    use crate::worker::EventSources;

    /// Long enough never to expire in a test.
    const NEVER: Duration = Duration::from_secs(24 * 60 * 60);
    /// Expires before the test's first check.
    const SOON: Duration = Duration::from_millis(1);
    /// A test that waits longer than this for an expiry has failed.
    const DEADLINE_MS: i32 = 60_000;

    struct Rig {
        watchdog: Watchdog,
        expired: Arc<AtomicU64>,
        harness: HandlerHarness<Box<dyn QueueHandler>>,
    }

    impl Rig {
        fn new(timeout: Duration) -> Self {
            Self::restored(timeout, None)
        }

        fn restored(timeout: Duration, own: Option<&Saved>) -> Self {
            let expired = Arc::new(AtomicU64::new(0));
            let count = Arc::clone(&expired);
            let mut watchdog = Watchdog::new("__watchdog", timeout, move || {
                count.fetch_add(1, Ordering::Relaxed);
            })
            .unwrap();
            let mut handler = watchdog.take_handlers().remove(0);
            if own.is_some() {
                handler.restore(own).unwrap();
            }
            let mut harness = HandlerHarness::new(handler, watchdog.features());
            harness.add_queues(1);
            harness.activate().unwrap();
            Self {
                watchdog,
                expired,
                harness,
            }
        }

        fn ping(&mut self) {
            let (chain, used) = self.harness.request(0, &[Segment::Writable(1)]).unwrap();
            assert_eq!(used.unwrap().len, 1);
            assert_eq!(self.harness.queue(0).read_buffer(chain.buffers[0]), [1]);
        }

        fn expirations(&self) -> u64 {
            self.expired.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn watchdog_conforms() {
        conformance("watchdog", |_| {
            Arc::new(Mutex::new(
                Watchdog::new("__watchdog", TIMEOUT, || {}).unwrap(),
            ))
        });
    }

    #[test]
    fn watchdog_without_a_further_ping_expires_once() {
        let mut rig = Rig::new(SOON);
        rig.ping();
        assert_eq!(rig.harness.serve_sources(DEADLINE_MS).unwrap(), 1);
        assert_eq!(rig.expirations(), 1);
        assert_eq!(rig.watchdog.counters()["expirations"], 1);
        // Disarmed until the next ping.
        assert_eq!(rig.harness.serve_sources(20).unwrap(), 0);
        rig.ping();
        assert_eq!(rig.harness.serve_sources(DEADLINE_MS).unwrap(), 1);
        assert_eq!(rig.expirations(), 2);
    }

    #[test]
    fn watchdog_pinged_after_the_worker_saw_the_expiry_goes_on() {
        let mut rig = Rig::new(NEVER);
        rig.ping();
        // The wake-up for the expiry is served after the doorbell, and so after the ping.
        let mut sources = EventSources::new().unwrap();
        let handler = &mut rig.harness.handler;
        let served = handler.source_ready(0, &mut sources, &mut Turn::default());
        served.unwrap();
        assert_eq!(rig.expirations(), 0);
        let own = rig.harness.handler.state().own.unwrap();
        assert!(own.read::<WatchdogTimerState>().unwrap().armed);
    }

    #[test]
    fn watchdog_never_pinged_never_expires() {
        let mut rig = Rig::new(SOON);
        assert_eq!(rig.harness.serve_sources(20).unwrap(), 0);
        assert_eq!(rig.expirations(), 0);
    }

    #[test]
    fn watchdog_paused_does_not_expire_and_a_resume_starts_the_timeout_anew() {
        let mut rig = Rig::new(SOON);
        rig.ping();
        rig.harness.handler.pause();
        assert_eq!(rig.harness.serve_sources(20).unwrap(), 0);
        // As the worker does when it resumes.
        rig.harness.kick(0).unwrap();
        assert_eq!(rig.harness.serve_sources(DEADLINE_MS).unwrap(), 1);
        assert_eq!(rig.expirations(), 1);
    }

    #[test]
    fn watchdog_reset_by_its_driver_is_unarmed() {
        let mut rig = Rig::new(SOON);
        rig.ping();
        rig.harness.reset();
        rig.harness.activate().unwrap();
        assert_eq!(rig.harness.serve_sources(20).unwrap(), 0);
        assert_eq!(rig.expirations(), 0);
    }

    #[test]
    fn watchdog_saved_armed_expires_where_it_continues() {
        let mut rig = Rig::new(NEVER);
        let unarmed = rig.harness.handler.state().own;
        rig.ping();
        let armed = rig.harness.handler.state().own;
        let mut continued = Rig::restored(SOON, armed.as_ref());
        assert_eq!(continued.harness.serve_sources(DEADLINE_MS).unwrap(), 1);
        assert_eq!(continued.expirations(), 1);
        let mut continued = Rig::restored(SOON, unarmed.as_ref());
        assert_eq!(continued.harness.serve_sources(20).unwrap(), 0);
    }

    #[test]
    fn requests_without_room_for_the_answer_are_no_pings() {
        let mut rig = Rig::new(SOON);
        let (_, used) = rig.harness.request(0, &[Segment::Readable(b"x")]).unwrap();
        assert_eq!(used.unwrap().len, 0);
        assert_eq!(rig.watchdog.counters()["bad_requests"], 1);
        assert_eq!(rig.watchdog.counters()["pings"], 0);
        assert_eq!(rig.harness.serve_sources(20).unwrap(), 0);
        assert_eq!(rig.expirations(), 0);
    }
}
