//! The handle of a worker thread, used by the transport and the control thread.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::WorkerStart;
use super::affinity::pin;
use super::command::{Command, Progress};
use super::sources::EventSources;
use super::thread::WorkerThread;
use crate::Unpoisoned;
use crate::device::{Activation, HandlerState, QueueHandler, WorkerError};

/// Maximum number of commands in transit. The guest can cause one activation and two resets (one of them by switching
/// Bus Master off), because the transport accepts no other before the resets are done. The control thread can send a
/// pause, a resume, a reset and a stop, and there is one kick at a time. That is eight.
const COMMANDS_PENDING_MAX: usize = 8;

/// Virtual size of a worker's stack; only touched pages use memory. Handlers keep their buffers on the heap.
const STACK_BYTES: usize = 256 << 10;

/// Creates worker threads.
#[derive(Debug)]
pub struct Worker {}

impl Worker {
    /// Starts the thread that owns `handler`, named after it. `thread_start`
    /// runs on it before anything else.
    ///
    /// # Errors
    /// No descriptor or thread is available, or the thread cannot run on the handler's host CPUs.
    pub fn spawn(
        handler: Box<dyn QueueHandler>,
        thread_start: WorkerStart,
    ) -> Result<WorkerHandle, WorkerError> {
        let wake = Arc::new(
            EventFd::new(EFD_NONBLOCK).map_err(|source| WorkerError::Host {
                what: "eventfd",
                source,
            })?,
        );
        let sources = EventSources::new()?;
        sources.watch_commands(&wake)?;
        for (fd, token) in handler.idle_sources() {
            sources.watch_idle(fd, token)?;
        }

        let progress = Arc::new(Progress::default());
        let (sender, receiver) = sync_channel(COMMANDS_PENDING_MAX);
        // A NUL in a thread name would make std panic.
        let name = handler.name().replace('\0', "");
        let host_cpus = handler.host_cpus().to_vec();
        let thread = WorkerThread::new(
            name.clone(),
            handler,
            sources,
            (Arc::clone(&wake), receiver),
            Arc::clone(&progress),
        );
        let join = std::thread::Builder::new()
            .name(name.clone())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                thread_start(&name);
                thread.run();
            })
            .map_err(|source| WorkerError::Host {
                what: "starting a worker thread",
                source,
            })?;
        let pinned = match host_cpus.as_slice() {
            [] => Ok(()),
            host_cpus => pin(&join, host_cpus),
        };
        let worker = WorkerHandle {
            commands: sender,
            wake,
            progress,
            kicks: Mutex::new(()),
            join: Some(join),
        };
        match pinned {
            Ok(()) => Ok(worker),
            // Dropping the handle ends the thread.
            Err(source) => Err(WorkerError::Affinity { host_cpus, source }),
        }
    }
}

/// The handle of a worker thread. Dropping it stops and joins the thread.
#[derive(Debug)]
pub struct WorkerHandle {
    commands: SyncSender<Command>,
    wake: Arc<EventFd>,
    progress: Arc<Progress>,
    /// Locked for the duration of a kick: see COMMANDS_PENDING_MAX.
    kicks: Mutex<()>,
    join: Option<JoinHandle<()>>,
}

impl WorkerHandle {
    /// Passes the queues to the worker and returns immediately (called by vCPU threads). A handler that cannot activate
    /// notifies the driver through its interrupt.
    ///
    /// # Errors
    /// [`WorkerError::Unresponsive`]: the thread has ended or accepts no commands.
    pub fn activate(&self, activation: Activation) -> Result<(), WorkerError> {
        self.post(Command::Activate(Box::new(activation)))
    }

    /// Requests a reset and returns immediately (called by vCPU threads). [`WorkerHandle::reset_done`] reports when the
    /// handler has released the queues.
    pub fn request_reset(&self) {
        self.progress
            .resets_requested
            .fetch_add(1, Ordering::SeqCst);
        if self.post(Command::Reset(None)).is_err() {
            // Cannot happen while the thread is alive, see COMMANDS_PENDING_MAX. If it has ended, `reset_done` returns
            // true.
            log::error!(
                "{}: the worker did not accept the reset command",
                self.name()
            );
        }
    }

    /// Whether every requested reset is finished. A thread that has ended accesses nothing any more, so it counts as
    /// reset.
    pub fn reset_done(&self) -> bool {
        let done = self.progress.resets_done.load(Ordering::SeqCst);
        done == self.progress.resets_requested.load(Ordering::SeqCst) || self.is_finished()
    }

    /// Resets the handler and returns when it has released the queues. For the control thread. Waits only for host I/O,
    /// never for the guest.
    pub fn reset_and_wait(&self) {
        self.progress
            .resets_requested
            .fetch_add(1, Ordering::SeqCst);
        self.call(|ack| Command::Reset(Some(ack)));
    }

    /// Pauses the handler and returns when its requests in flight are finished and the thread no longer accesses guest
    /// RAM. For the control thread.
    pub fn pause(&self) {
        self.begin_pause().wait();
    }

    /// As [`WorkerHandle::pause`], but returns without waiting, so that several workers can pause at the same time.
    pub fn begin_pause(&self) -> Pausing {
        Pausing(self.begin_call(Command::Pause))
    }

    /// Undoes [`WorkerHandle::pause`]; every active queue is served again. If the device was activated during the
    /// pause, this returns after the handler is active, so that subsequent callers find a driver. For the control
    /// thread.
    pub fn resume(&self) {
        self.call(Command::Resume);
    }

    /// Asks the thread to reset its handler and to end. Dropping the handle waits for that.
    pub fn begin_stop(&self) {
        self.send(Command::Stop);
    }

    /// The handler's state; the caller must have paused the handler. For the control thread.
    ///
    /// # Errors
    /// [`WorkerError::Unresponsive`]: the thread has ended, and the handler's state is lost.
    pub fn state(&self) -> Result<HandlerState, WorkerError> {
        let (answer, state) = sync_channel(1);
        self.send(Command::State(answer));
        // Also an error if the command was not sent, because the reply's sender is dropped with it.
        state.recv().map_err(|_ended| WorkerError::Unresponsive {
            reason: "the thread has ended",
        })
    }

    /// Makes the handler serve a queue and returns when it has (called by vCPU threads). False if the handler is paused
    /// or not active; the caller then signals the doorbell. Waits for the current piece of work, never for the guest.
    pub fn kick_and_wait(&self, queue_index: u16) -> bool {
        let one_at_a_time = self.kicks.lock();
        // The lock guards no data that a panic could have left inconsistent.
        let _one_at_a_time = one_at_a_time.unpoisoned();
        let (ack, done) = sync_channel(1);
        // An error means that the thread has ended: the queue is not served any more.
        self.send(Command::Kick(queue_index, ack)) && done.recv().unwrap_or(false)
    }

    /// Number of times the handler failed and stopped serving its device until a reset.
    pub fn failures(&self) -> u64 {
        self.progress.failures.get()
    }

    fn name(&self) -> &str {
        self.join
            .as_ref()
            .and_then(|join| join.thread().name())
            .unwrap_or("worker")
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.join.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Sends without waiting.
    fn post(&self, command: Command) -> Result<(), WorkerError> {
        self.progress.pending.announce();
        let sent = self.commands.try_send(command);
        if sent.is_err() {
            self.progress.pending.settle();
        }
        self.ring();
        sent.map_err(|error| WorkerError::Unresponsive {
            reason: match error {
                TrySendError::Full(_) => "too many commands are pending",
                TrySendError::Disconnected(_) => "the thread has ended",
            },
        })
    }

    /// Sends, and waits for space if necessary. Fails only if the thread has ended, which every caller treats as
    /// stopped.
    fn send(&self, command: Command) -> bool {
        self.progress.pending.announce();
        let sent = self.commands.send(command).is_ok();
        self.ring();
        sent
    }

    fn call(&self, command: impl FnOnce(SyncSender<()>) -> Command) {
        wait_for(&self.begin_call(command));
    }

    fn begin_call(&self, command: impl FnOnce(SyncSender<()>) -> Command) -> Receiver<()> {
        let (ack, done) = sync_channel(1);
        // If the thread has ended, the sender is dropped, and the receiver returns an error.
        self.send(command(ack));
        done
    }

    fn ring(&self) {
        // Fails only if the counter is at u64::MAX - 1.
        self.wake.write(1).ok();
    }
}

/// A pause in progress.
#[derive(Debug)]
#[must_use]
pub struct Pausing(Receiver<()>);

impl Pausing {
    /// Returns when the worker is paused.
    pub fn wait(self) {
        wait_for(&self.0);
    }
}

fn wait_for(done: &Receiver<()>) {
    // An error means that the thread has ended, and so has stopped.
    done.recv().ok();
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        // The second stop of a worker, if any, is not read.
        self.begin_stop();
        if let Some(join) = self.join.take()
            && join.join().is_err()
        {
            log::error!("a worker thread panicked");
        }
    }
}
