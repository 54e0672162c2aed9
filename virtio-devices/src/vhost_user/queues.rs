//! The handler of all queues: offers them to the back end, and passes its interrupts on.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::counters::Shared;
use super::gate::{Gate, Reason};
use super::rings::Rings;
use crate::device::{Activation, HandlerState, QueueHandler, WorkerError};
use crate::worker::{EventSources, Turn};

pub(super) struct Queues {
    name: String,
    gate: Arc<Gate>,
    shared: Arc<Shared>,
    rings: Option<Arc<Rings>>,
}

impl Queues {
    pub(super) fn new(name: String, gate: Arc<Gate>, shared: Arc<Shared>) -> Self {
        Self {
            name,
            gate,
            shared,
            rings: None,
        }
    }

    fn close(&self, reason: Reason) {
        if !self.gate.close(reason) {
            self.shared.rings_taken_away.count();
            log::warn!("{}: the back end did not return the rings", self.name);
        }
    }
}

impl QueueHandler for Queues {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        let rings = Rings::new(activation).map_err(|source| WorkerError::Host {
            what: "eventfd",
            source,
        })?;
        for (token, ring) in (0..).zip(&rings.rings) {
            sources.add(ring.call.as_raw_fd(), token)?;
        }
        let rings = Arc::new(rings);
        self.gate.offer(Arc::clone(&rings));
        self.rings = Some(rings);
        Ok(())
    }

    fn serves_doorbells(&self) -> bool {
        false
    }

    fn queue_ready(&mut self, _queue_index: u16, _turn: &mut Turn) -> Result<(), WorkerError> {
        Ok(())
    }

    fn source_ready(
        &mut self,
        token: u32,
        _sources: &mut EventSources,
        _turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        let Some(rings) = &self.rings else {
            return Ok(());
        };
        if let Some(ring) = rings.rings.get(token as usize) {
            // EAGAIN: the event has already been read.
            ring.call.read().ok();
            self.shared.interrupts.count();
            rings.follow(ring);
            rings.interrupt.signal_queue(ring.index);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.close(Reason::Reset);
        self.rings = None;
    }

    fn state(&self) -> HandlerState {
        let rings = self.rings.iter();
        HandlerState::of_queues(rings.flat_map(|rings| rings.positions()))
    }

    fn pause(&mut self) {
        self.close(Reason::Pause);
    }

    fn resume(&mut self) {
        self.gate.end_pause();
    }
}
