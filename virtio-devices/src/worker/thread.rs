//! The loop of a worker thread.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};

use vmm_sys_util::eventfd::EventFd;

use super::command::{Command, Progress};
use super::sources::{EventSources, Wake};
use super::turn::Turn;
use crate::device::{Activation, ActiveQueue, HandlerState, Interrupt, QueueHandler, WorkerError};

/// Whether the thread continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Continue,
    Stop,
}

/// Everything that a worker thread owns.
pub(super) struct WorkerThread {
    name: String,
    handler: Box<dyn QueueHandler>,
    sources: EventSources,
    wake: Arc<EventFd>,
    commands: Receiver<Command>,
    progress: Arc<Progress>,
    /// Present while the device is active.
    interrupt: Option<Arc<dyn Interrupt>>,
    wakes: Vec<Wake>,
    turn: Turn,
    paused: bool,
    /// An activation that arrived during a pause.
    deferred: Option<Box<Activation>>,
}

impl WorkerThread {
    pub(super) fn new(
        name: String,
        handler: Box<dyn QueueHandler>,
        sources: EventSources,
        (wake, commands): (Arc<EventFd>, Receiver<Command>),
        progress: Arc<Progress>,
    ) -> Self {
        Self {
            name,
            handler,
            sources,
            wake,
            commands,
            turn: Turn::new(progress.pending.clone()),
            progress,
            interrupt: None,
            wakes: Vec::new(),
            paused: false,
            deferred: None,
        }
    }

    /// Runs until it is stopped or until the handle is dropped.
    pub(super) fn run(mut self) {
        while self.turn() == Flow::Continue {}
        self.reset();
    }

    fn turn(&mut self) -> Flow {
        if self.paused {
            // Sleeping on the channel instead of on the descriptors leaves kicks pending.
            return match self.commands.recv() {
                Ok(command) => self.take(command),
                Err(_) => Flow::Stop,
            };
        }
        // Taken out and put back, so that a busy worker does not allocate.
        let mut wakes = std::mem::take(&mut self.wakes);
        let flow = self.wait_and_serve(&mut wakes);
        self.wakes = wakes;
        flow
    }

    fn wait_and_serve(&mut self, wakes: &mut Vec<Wake>) -> Flow {
        if let Err(error) = self.sources.wait(-1, wakes) {
            self.fail(&error);
            return Flow::Stop;
        }
        if wakes.contains(&Wake::Command) {
            // A command may make the other wake-ups stale. They are level-triggered, so valid ones are reported again.
            return self.obey_all();
        }
        for wake in wakes.drain(..) {
            // The other wake-ups are reported again after the command.
            if self.turn.is_called() {
                break;
            }
            if let Err(error) = self.serve(wake) {
                self.fail(&error);
                break;
            }
        }
        Flow::Continue
    }

    fn obey_all(&mut self) -> Flow {
        // Drained before the channel: a later command signals the event again. EAGAIN is harmless, because the channel
        // is checked anyway.
        self.wake.read().ok();
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    if self.take(command) == Flow::Stop {
                        return Flow::Stop;
                    }
                }
                Err(TryRecvError::Empty) => return Flow::Continue,
                Err(TryRecvError::Disconnected) => return Flow::Stop,
            }
        }
    }

    fn take(&mut self, command: Command) -> Flow {
        self.progress.pending.settle();
        self.obey(command)
    }

    fn obey(&mut self, command: Command) -> Flow {
        match command {
            Command::Activate(activation) if self.paused => self.deferred = Some(activation),
            Command::Activate(activation) => self.activate(*activation),
            Command::Reset(ack) => {
                self.reset();
                self.progress.resets_done.fetch_add(1, Ordering::SeqCst);
                if let Some(ack) = ack {
                    acknowledge(&ack);
                }
            }
            Command::Pause(ack) => {
                if !self.paused {
                    self.handler.pause();
                    self.paused = true;
                }
                acknowledge(&ack);
            }
            Command::Resume(ack) => self.resume(&ack),
            // The channel holds one message, so this never waits.
            Command::State(answer) => drop(answer.send(self.state())),
            Command::Kick(index, ack) => {
                let served = self.serve_held(index);
                // The channel holds one message, so this never waits.
                ack.send(served).ok();
            }
            Command::Stop => return Flow::Stop,
        }
        Flow::Continue
    }

    fn activate(&mut self, activation: Activation) {
        // Removes whatever was active before. The transport resets first, so this is only for other callers.
        self.sources.clear();
        self.interrupt = Some(Arc::clone(&activation.interrupt));
        let watched = match self.handler.serves_doorbells() {
            true => activation.queues.as_slice(),
            false => &[],
        };
        let outcome = watched
            .iter()
            .try_for_each(|active| self.sources.add_doorbell(active.index, &active.doorbell))
            .and_then(|()| self.handler.activate(activation, &mut self.sources));
        if let Err(error) = outcome {
            self.fail(&error);
        }
    }

    fn state(&self) -> HandlerState {
        let mut state = self.handler.state();
        if let Some(activation) = &self.deferred {
            let queues = activation.queues.iter();
            state.queues = queues.map(ActiveQueue::position).collect();
        } else if self.interrupt.is_none() {
            // The handler failed: its queues are not served until the driver resets them.
            state.queues.clear();
        }
        state
    }

    fn resume(&mut self, ack: &SyncSender<()>) {
        if !self.paused {
            acknowledge(ack);
            return;
        }
        self.paused = false;
        self.handler.resume();
        if let Some(activation) = self.deferred.take() {
            self.activate(*activation);
            acknowledge(ack);
            return;
        }
        acknowledge(ack);
        // Work that the handler postponed for the pause causes no kick.
        for index in self.sources.queue_indices() {
            self.turn.begin();
            if let Err(error) = self.handler.queue_ready(index, &mut self.turn) {
                self.fail(&error);
                return;
            }
        }
    }

    fn serve(&mut self, wake: Wake) -> Result<(), WorkerError> {
        self.turn.begin();
        let (sources, turn) = (&mut self.sources, &mut self.turn);
        match wake {
            Wake::Doorbell(index) if sources.drain_doorbell(index) => {
                self.handler.queue_ready(index, turn)
            }
            Wake::Source(token) if sources.has_source(token) => {
                self.handler.source_ready(token, sources, turn)
            }
            Wake::Idle(token) => self.handler.source_ready(token, sources, turn),
            // A handler that ran just before has removed this source.
            Wake::Doorbell(_) | Wake::Source(_) | Wake::Command => Ok(()),
        }
    }

    /// Serves a queue while the vCPU that signalled it is held; false if this is not possible now.
    fn serve_held(&mut self, index: u16) -> bool {
        if self.paused || !self.sources.drain_doorbell(index) {
            return false;
        }
        self.turn.begin();
        if let Err(error) = self.handler.queue_ready_while_held(index, &mut self.turn) {
            self.fail(&error);
        }
        true
    }

    fn reset(&mut self) {
        self.sources.clear();
        self.interrupt = None;
        self.deferred = None;
        self.handler.reset();
    }

    /// Stops until the next reset.
    fn fail(&mut self, error: &WorkerError) {
        self.sources.clear();
        // A driver that resets the device can repeat this, and each time with another cause.
        let level = match self.progress.failures.count_loudly() {
            true => log::Level::Error,
            false => log::Level::Debug,
        };
        let cause = error
            .source()
            .map_or_else(String::new, |source| format!(": {source}"));
        log::log!(
            level,
            "{}: device stopped until the driver resets it: {error}{cause}",
            self.name
        );
        if let Some(interrupt) = self.interrupt.take() {
            interrupt.signal_needs_reset();
        }
    }
}

fn acknowledge(ack: &SyncSender<()>) {
    // The channel holds one message, so this never waits; a dropped receiver is not an error.
    ack.send(()).ok();
}
