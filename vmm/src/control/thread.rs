//! The `vmm` thread: one epoll on requests, signals from the guest, and exit requests.
//!
//! It owns the VM and never waits for the guest. Requests arrive through a bounded queue, and a callback receives each
//! result, so that no caller has to block.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use api::Endpoint;
use api::config::MemoryUnavailableAction;

use super::error::{Done, LifecycleError, RequestError};
use super::lifecycle::Lifecycle;
use crate::events::EventKind;
use crate::figures_thread::FiguresThread;
use crate::threads::{CONTROL_THREAD, THRESHOLDS_THREAD, ThreadKind};
use crate::thresholds::Thresholds;
use crate::view::PublishedView;
use crate::vm::{MachineFactory, VmContext};
use machine::attempt_limit::AttemptLimit;
use machine::cpu::STALL_CHECK_INTERVAL;
use machine::signals::VmSignals;

/// Maximum number of queued requests. It exceeds the HTTP server's number of connections, so only clients that
/// disconnect before their response can fill the queue.
const QUEUE_LENGTH: usize = 32;
const STACK_BYTES: usize = 1 << 20;
/// Number of resets that a guest may request without delay. In a crash loop, each reset reads kernel and firmware from
/// disk and populates RAM.
const GUEST_RESETS_BURST: u32 = 30;
/// Interval between further resets.
pub(crate) const GUEST_RESET_INTERVAL: Duration = Duration::from_secs(2);

/// The sources that wake the thread, in the order in which they are handled.
const TOKEN_EXIT: u64 = 0;
/// Guest signals are handled before requests: when a pause returns, all signals of the paused guest have been raised,
/// so the next request sees their effects. A client that checks whether the guest released a device also sees it
/// removed. This signal is handled before the end of the machine, so that the earlier event is reported first.
const TOKEN_EJECTED: u64 = 1;
const TOKEN_FAILED: u64 = 2;
const TOKEN_MEMORY: u64 = 3;
const TOKEN_GUEST_SHUTDOWN: u64 = 4;
const TOKEN_RESET: u64 = 5;
const TOKEN_REQUEST: u64 = 6;
const TOKENS: usize = 7;

/// A change and the callback for its result. Without a lifecycle, it reports that the change was not made.
type Job = Box<dyn FnOnce(Option<&mut Lifecycle>) + Send>;

struct Request {
    /// Absent for a step of a change that is under way.
    endpoint: Option<Endpoint>,
    job: Job,
}

/// How the control thread ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// On request: by the API, a signal, or the guest's power-off.
    Regular,
    /// The machine failed.
    MachineFailed,
}

/// Errors of starting the control thread.
#[derive(Debug, thiserror::Error)]
pub enum ControlThreadError {
    /// No epoll or eventfd.
    #[error("Cannot set up the event loop of the control thread")]
    Setup(#[source] io::Error),
    /// The thread cannot be started.
    #[error("Cannot start the thread {CONTROL_THREAD}")]
    Spawn(#[source] io::Error),
    /// The thread cannot be started.
    #[error("Cannot start the thread {THRESHOLDS_THREAD}")]
    SpawnThresholds(#[source] io::Error),
}

/// A handle for requests to the control thread.
#[derive(Clone)]
pub struct ControlHandle {
    queue: SyncSender<Request>,
    wake: Arc<EventFd>,
    exit: Arc<EventFd>,
}

virtio_devices::debug_fields!(ControlHandle {});

impl ControlHandle {
    /// Queues `change` and returns immediately. `done` is called with the result, even if the queue is full. It runs on
    /// the control thread, so it must not block.
    pub fn submit<T>(
        &self,
        endpoint: Endpoint,
        change: impl FnOnce(&mut Lifecycle) -> Result<T, LifecycleError> + Send + 'static,
        done: impl FnOnce(Result<T, RequestError>) + Send + 'static,
    ) {
        let job: Job = Box::new(move |lifecycle| {
            done(match lifecycle {
                Some(lifecycle) => lifecycle.run_request(endpoint, change),
                None => Err(queue_full(endpoint)),
            });
        });
        self.queue_job(endpoint, job);
    }

    /// Queues a request whose work continues after `start`, which takes `done` if the work has begun.
    pub fn submit_long(
        &self,
        endpoint: Endpoint,
        start: impl FnOnce(&mut Lifecycle, &Self, &mut Option<Done>) -> Result<(), LifecycleError>
        + Send
        + 'static,
        done: impl FnOnce(Result<(), RequestError>) + Send + 'static,
    ) {
        let control = self.clone();
        let job: Job = Box::new(move |lifecycle| {
            let Some(lifecycle) = lifecycle else {
                return done(Err(queue_full(endpoint)));
            };
            let mut done: Option<Done> = Some(Box::new(done));
            let started = lifecycle.run_request(endpoint, |vm| start(vm, &control, &mut done));
            if let Some(done) = done {
                done(started);
            }
        });
        self.queue_job(endpoint, job);
    }

    fn queue_job(&self, endpoint: Endpoint, job: Job) {
        let request = Request {
            endpoint: Some(endpoint),
            job,
        };
        match self.queue.try_send(request) {
            // If the counter is full, a wake-up is already pending.
            Ok(()) => drop(self.wake.write(1)),
            Err(TrySendError::Full(request) | TrySendError::Disconnected(request)) => {
                (request.job)(None);
            }
        }
    }

    /// Queues `change` and waits for its result.
    ///
    /// # Errors
    /// The change failed.
    pub fn call<T: Send + 'static>(
        &self,
        endpoint: Endpoint,
        change: impl FnOnce(&mut Lifecycle) -> Result<T, LifecycleError> + Send + 'static,
    ) -> Result<T, RequestError> {
        let (sender, receiver) = sync_channel(1);
        // The receiver exists as long as the caller waits below.
        self.submit(endpoint, change, move |outcome| drop(sender.send(outcome)));
        receiver
            .recv()
            .unwrap_or_else(|_| Err(queue_full(endpoint)))
    }

    /// Makes a step of a migration and waits for its result, also if the queue is full. Not for the control thread.
    ///
    /// # Errors
    /// The step failed, or the control thread has ended.
    pub(super) fn step<T: Send + 'static>(
        &self,
        endpoint: Endpoint,
        step: impl FnOnce(&mut Lifecycle) -> Result<T, LifecycleError> + Send + 'static,
    ) -> Result<T, RequestError> {
        let (sender, receiver) = sync_channel(1);
        let job: Job = Box::new(move |lifecycle| {
            if let Some(lifecycle) = lifecycle {
                // The receiver exists as long as the caller waits below.
                drop(sender.send(lifecycle.run(endpoint, step)));
            }
        });
        let request = Request {
            endpoint: None,
            job,
        };
        if self.queue.send(request).is_err() {
            return Err(queue_full(endpoint));
        }
        // If the counter is full, a wake-up is already pending.
        drop(self.wake.write(1));
        receiver
            .recv()
            .unwrap_or_else(|_| Err(queue_full(endpoint)))
    }

    /// The descriptor to write to when the process must end, for signal handlers.
    pub fn exit_event(&self) -> Arc<EventFd> {
        Arc::clone(&self.exit)
    }
}

fn queue_full(endpoint: Endpoint) -> RequestError {
    let cause = LifecycleError::QueueFull;
    RequestError { endpoint, cause }
}

/// The parts of the control thread.
pub struct ControlSetup {
    /// Creates machines.
    pub make_machine: MachineFactory,
    /// The view in which the state is published.
    pub view: Arc<PublishedView>,
    /// The environment of every machine; its signals wake this thread.
    pub context: VmContext,
    /// Keep running when the guest powers off (`--no-shutdown`).
    pub no_shutdown: bool,
    /// Whether there is an event monitor. Without one, no events of the balloon are evaluated.
    pub events_are_read: bool,
    /// Called first on the thread.
    pub on_start: Box<dyn FnOnce() + Send>,
}

virtio_devices::debug_fields!(ControlSetup {});

/// The running control thread.
#[derive(Debug)]
pub struct ControlThread {
    handle: ControlHandle,
    thread: JoinHandle<Ending>,
}

impl ControlThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host lacks descriptors or threads.
    pub fn start(setup: ControlSetup) -> Result<Self, ControlThreadError> {
        let new_event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let wake = Arc::new(new_event().map_err(ControlThreadError::Setup)?);
        let exit = Arc::new(new_event().map_err(ControlThreadError::Setup)?);
        let (queue, requests) = sync_channel(QUEUE_LENGTH);
        let epoll = watch(&[
            (&exit, TOKEN_EXIT),
            (&setup.context.signals.failed, TOKEN_FAILED),
            (&setup.context.signals.memory, TOKEN_MEMORY),
            (&setup.context.signals.shutdown, TOKEN_GUEST_SHUTDOWN),
            (&setup.context.signals.reset, TOKEN_RESET),
            (&setup.context.signals.ejected, TOKEN_EJECTED),
            (&wake, TOKEN_REQUEST),
        ])
        .map_err(ControlThreadError::Setup)?;
        let handle = ControlHandle { queue, wake, exit };
        let own = handle.clone();
        let thresholds = Arc::new(Thresholds::default());
        let thread_start = Arc::clone(&setup.context.thread_start);
        let monitor = FiguresThread::start(
            Arc::clone(&thresholds),
            Arc::clone(&setup.view),
            Arc::clone(&setup.context.events),
            move || thread_start(ThreadKind::Thresholds),
        )
        .map_err(ControlThreadError::SpawnThresholds)?;
        let thread = std::thread::Builder::new()
            .name(CONTROL_THREAD.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let ending = run(setup, thresholds, &epoll, &requests, &own);
                // No further events follow after the final one.
                drop(monitor);
                ending
            })
            .map_err(ControlThreadError::Spawn)?;
        Ok(Self { handle, thread })
    }

    /// A handle for requests.
    pub fn handle(&self) -> ControlHandle {
        self.handle.clone()
    }

    /// Waits until it ends.
    pub fn join(self) -> Ending {
        self.thread.join().unwrap_or(Ending::MachineFailed)
    }
}

fn watch(events: &[(&EventFd, u64)]) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    for (event, token) in events {
        epoll.ctl(
            ControlOperation::Add,
            event.as_raw_fd(),
            EpollEvent::new(EventSet::IN, *token),
        )?;
    }
    Ok(epoll)
}

fn run(
    setup: ControlSetup,
    thresholds: Arc<Thresholds>,
    epoll: &Epoll,
    requests: &Receiver<Request>,
    own: &ControlHandle,
) -> Ending {
    (setup.on_start)();
    (setup.context.events)(&EventKind::VmmStarting.into());
    let signals = Arc::clone(&setup.context.signals);
    let lifecycle = Lifecycle::new(
        setup.make_machine,
        setup.view,
        thresholds,
        setup.events_are_read,
        setup.context,
    );
    let mut control = Control {
        lifecycle,
        signals,
        no_shutdown: setup.no_shutdown,
        guest_resets: AttemptLimit::new(GUEST_RESETS_BURST, GUEST_RESET_INTERVAL, Instant::now()),
        delayed_reset: None,
    };
    let ending = loop {
        let mut events = [EpollEvent::default(); TOKENS];
        let count = match epoll.wait(control.timeout_ms(), &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                log::error!("The control thread cannot wait for events: {error}");
                break Ending::MachineFailed;
            }
        };
        let mut tokens: Vec<u64> = events[..count].iter().map(EpollEvent::data).collect();
        tokens.sort_unstable();
        let ending = control.handle_tokens(&tokens, requests, &own.wake);
        let ending = ending.or_else(|| control.check_memory());
        if let Some(ending) = ending.or_else(|| control.reset_if_due()) {
            break ending;
        }
    };
    control.log_failure(Endpoint::VmmShutdown, Lifecycle::end);
    ending
}

struct Control {
    lifecycle: Lifecycle,
    signals: Arc<VmSignals>,
    no_shutdown: bool,
    guest_resets: AttemptLimit,
    delayed_reset: Option<DelayedReset>,
}

/// A delayed reset: the guest has requested too many, or the operator has paused it.
struct DelayedReset {
    due: Instant,
    /// The number of the machine that requested it.
    machine: u64,
}

impl Control {
    fn timeout_ms(&self) -> i32 {
        // A machine that the operator paused is reset only after a resume.
        let delayed = self.delayed_reset.as_ref();
        let delayed = delayed.filter(|_| !self.must_wait());
        let reset = delayed.map(|delayed| delayed.due.saturating_duration_since(Instant::now()));
        let check = self.lifecycle.needs_memory_checks();
        let check = check.then_some(STALL_CHECK_INTERVAL);
        reset.into_iter().chain(check).min().map_or(-1, |wait| {
            // Rounded up: waking too early would busy-wait.
            i32::try_from(wait.as_millis() + 1).unwrap_or(i32::MAX)
        })
    }

    fn check_memory(&mut self) -> Option<Ending> {
        match self.lifecycle.needs_memory_checks() {
            true => self.memory_failed(),
            false => None,
        }
    }

    fn memory_failed(&mut self) -> Option<Ending> {
        clear(&self.signals.memory);
        match self.lifecycle.take_memory_failure()? {
            MemoryUnavailableAction::Pause => {
                self.log_failure(Endpoint::VmPause, Lifecycle::pause);
                None
            }
            MemoryUnavailableAction::Shutdown => self.machine_failed(),
        }
    }

    /// A reset waits until the operator resumes the machine, and until a migration has ended.
    fn must_wait(&self) -> bool {
        self.lifecycle.is_paused() || self.lifecycle.is_migrating()
    }

    fn reset_if_due(&mut self) -> Option<Ending> {
        let delayed = self.delayed_reset.take()?;
        // The operator may have replaced or stopped the machine in the meantime.
        if self.lifecycle.machine_number() != Some(delayed.machine) {
            return None;
        }
        if self.must_wait() || Instant::now() < delayed.due {
            self.delayed_reset = Some(delayed);
            return None;
        }
        // Because of rounding, a token may not be available yet. The result is ignored, because this reset has already
        // waited.
        let _ = self.guest_resets.take(Instant::now());
        self.reboot()
    }

    fn handle_tokens(
        &mut self,
        tokens: &[u64],
        requests: &Receiver<Request>,
        wake: &EventFd,
    ) -> Option<Ending> {
        for token in tokens {
            let ending = match *token {
                TOKEN_EXIT => Some(Ending::Regular),
                TOKEN_FAILED => self.machine_failed(),
                TOKEN_MEMORY => self.memory_failed(),
                TOKEN_GUEST_SHUTDOWN => self.guest_shut_down(),
                TOKEN_RESET => self.guest_reset(),
                TOKEN_EJECTED => {
                    clear(&self.signals.ejected);
                    self.lifecycle.finish_removals();
                    None
                }
                _ => {
                    clear(wake);
                    self.serve_request(requests, wake)
                }
            };
            if ending.is_some() {
                return ending;
            }
        }
        None
    }

    /// Serves one request and returns. An exit request or a failed machine thus waits for at most one request,
    /// regardless of the number of clients.
    fn serve_request(&mut self, requests: &Receiver<Request>, wake: &EventFd) -> Option<Ending> {
        // Empty: every request has been served. Its sender lives as long as this thread.
        let Request { endpoint, job } = requests.try_recv().ok()?;
        // A full counter wakes the thread as well.
        let _ = wake.write(1);
        if let Some(endpoint) = endpoint {
            log::info!("API request: {endpoint:?}");
        }
        // The caller reports failures: the API in its response and in the log, the command line when the process exits.
        job(Some(&mut self.lifecycle));
        self.lifecycle.has_ended().then_some(Ending::Regular)
    }

    fn guest_shut_down(&mut self) -> Option<Ending> {
        clear(&self.signals.shutdown);
        if !self.lifecycle.has_machine() {
            return None;
        }
        log::info!("The guest has powered off");
        if !self.no_shutdown {
            return Some(Ending::Regular);
        }
        self.log_failure(Endpoint::VmShutdown, Lifecycle::shutdown);
        None
    }

    fn guest_reset(&mut self) -> Option<Ending> {
        clear(&self.signals.reset);
        let machine = self.lifecycle.machine_number()?;
        log::info!("The guest has requested a reset");
        self.lifecycle.note_reset_request();
        let delayed = self.delayed_reset.as_ref();
        if delayed.is_some_and(|delayed| delayed.machine == machine) {
            return None;
        }
        let now = Instant::now();
        if self.must_wait() {
            // The guest requested the reset while it was being paused or migrated.
            self.delayed_reset = Some(DelayedReset { due: now, machine });
            return None;
        }
        if self.guest_resets.take(now).is_some() {
            return self.reboot();
        }
        log::warn!("The guest resets itself too often: the next reboot is delayed");
        self.delayed_reset = Some(DelayedReset {
            due: now + GUEST_RESET_INTERVAL,
            machine,
        });
        self.log_failure(Endpoint::VmReboot, Lifecycle::delay_reboot);
        None
    }

    fn reboot(&mut self) -> Option<Ending> {
        match self.log_failure(Endpoint::VmReboot, Lifecycle::reboot) {
            true => Some(Ending::MachineFailed),
            false => None,
        }
    }

    fn machine_failed(&mut self) -> Option<Ending> {
        clear(&self.signals.failed);
        if !self.lifecycle.has_machine() || self.lifecycle.refuse_received() {
            return None;
        }
        log::error!("The machine has failed and is stopped");
        self.log_failure(Endpoint::VmShutdown, Lifecycle::shutdown);
        (!self.no_shutdown).then_some(Ending::MachineFailed)
    }

    /// Makes a change that no caller waits for and logs a failure; returns true if it failed.
    fn log_failure(
        &mut self,
        endpoint: Endpoint,
        change: impl FnOnce(&mut Lifecycle) -> Result<(), LifecycleError>,
    ) -> bool {
        let outcome = self.lifecycle.run(endpoint, change);
        if let Err(error) = &outcome {
            log::error!("{}", api::error_line(error));
        }
        outcome.is_err()
    }
}

fn clear(event: &EventFd) {
    // If there is nothing to read, the event is already clear.
    let _ = event.read();
}
