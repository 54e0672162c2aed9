//! The queue half of devices with one queue that complete each request immediately.

use std::os::fd::RawFd;

use state::{Saved, StateError};
use vm_memory::GuestAddressSpace;

use super::buffers::{ChainBuffers, ChainError};
use super::served::{Next, Popped, ServedQueue};
use crate::device::{Activation, GuestRam, HandlerState, QueueHandler, WorkerError, no_own_state};
use crate::worker::{EventSources, Turn};

/// Token of the device's timer, the only source.
const TOKEN_TIMER: u32 = 0;

/// The result of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reply {
    /// Completed, with this number of bytes written.
    Done(u32),
    /// A command arrived during the request. The chain goes back to the ring and will be served again from the start.
    PutBack,
}

/// The device-specific part.
pub(crate) trait SingleQueueDevice: Send {
    /// As [`QueueHandler::name`].
    fn name(&self) -> String;

    /// A driver is ready.
    fn activated(&mut self, _features: u64) {}

    /// Executes one request.
    fn answer(
        &mut self,
        driver: &Driver,
        request: Result<ChainBuffers, ChainError>,
        turn: &mut Turn,
    ) -> Reply;

    /// A descriptor that becomes readable when [`SingleQueueDevice::timer_expired`] should be called. It is watched
    /// while a driver is active.
    fn timer(&self) -> Option<RawFd> {
        None
    }

    /// The timer is readable. It must not be readable any more when this returns.
    fn timer_expired(&mut self) {}

    /// The VM pauses.
    fn paused(&mut self) {}

    /// The VM continues after a pause, with the driver still active.
    fn resumed(&mut self) {}

    /// As [`QueueHandler::reset`].
    fn reset(&mut self) {}

    /// As [`HandlerState::own`].
    fn own_state(&self) -> Option<Saved> {
        None
    }

    /// As [`QueueHandler::restore`].
    fn restore(&mut self, own: Option<&Saved>) -> Result<(), StateError> {
        no_own_state(own)
    }
}

/// The state while a driver is active.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) ram: GuestRam,
    pub(crate) features: u64,
}

/// The queue half.
#[derive(Debug)]
pub(crate) struct SingleQueue<D> {
    device: D,
    /// Also absent if the driver left the queue disabled.
    active: Option<(Driver, ServedQueue)>,
    paused: bool,
}

impl<D: SingleQueueDevice> SingleQueue<D> {
    pub(crate) fn new(device: D) -> Self {
        Self {
            device,
            active: None,
            paused: false,
        }
    }
}

impl<D: SingleQueueDevice> QueueHandler for SingleQueue<D> {
    fn name(&self) -> String {
        self.device.name()
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        if let Some(timer) = self.device.timer() {
            sources.add(timer, TOKEN_TIMER)?;
        }
        self.paused = false;
        let features = activation.features;
        self.device.activated(features);
        let (ram, mut queues) = activation.serve();
        self.active = queues.next().map(|queue| (Driver { ram, features }, queue));
        Ok(())
    }

    fn queue_ready(&mut self, _queue_index: u16, turn: &mut Turn) -> Result<(), WorkerError> {
        let Some((driver, queue)) = &mut self.active else {
            return Ok(());
        };
        if std::mem::take(&mut self.paused) {
            self.device.resumed();
        }
        let ram = driver.ram.memory();
        queue.disable_doorbell(&ram)?;
        loop {
            match queue.next(&ram, turn)? {
                Next::Chain(Popped { head, buffers }) => {
                    match self.device.answer(driver, buffers, turn) {
                        Reply::Done(written) => queue.push_used(&ram, head, written)?,
                        Reply::PutBack => {
                            queue.put_back(1)?;
                            break;
                        }
                    }
                }
                Next::Empty if queue.enable_doorbell(&ram)? => queue.disable_doorbell(&ram)?,
                Next::Empty | Next::TurnOver => break,
            }
        }
        queue.signal(&ram)
    }

    fn source_ready(
        &mut self,
        _token: u32,
        _sources: &mut EventSources,
        _turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        self.device.timer_expired();
        Ok(())
    }

    fn pause(&mut self) {
        self.paused = true;
        self.device.paused();
    }

    fn reset(&mut self) {
        self.active = None;
        self.paused = false;
        self.device.reset();
    }

    fn state(&self) -> HandlerState {
        HandlerState {
            queues: self
                .active
                .iter()
                .map(|(_, queue)| queue.position())
                .collect(),
            own: self.device.own_state(),
        }
    }

    fn restore(&mut self, own: Option<&Saved>) -> Result<(), StateError> {
        self.device.restore(own)
    }
}
