//! The queue half for traffic: a receive and a transmit queue on one tap queue and one worker.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MRG_RXBUF};
use vm_memory::GuestAddressSpace;

use super::announce::Announcer;
use super::config_space::has;
use super::params::NetParams;
use super::receive::{self, Receiver};
use super::shared::NetShared;
use super::tap_watch::TapWatch;
use super::transmit::{self, Transmitter};
use crate::device::{Activation, GuestRam, HandlerState, QueueHandler, WorkerError};
use crate::queue::{RamGuard, ServedQueue};
use crate::taken::with_taken;
use crate::worker::{EventSources, Throttle, Turn};

/// Event source: an awaited event of the tap.
const TAP: u32 = 0;
/// Event source: this pair has just been enabled.
const ENABLED: u32 = 1;
/// Event source: the rate limit allows received frames again.
const RECEIVE_TOKENS: u32 = 2;
/// Event source: the rate limit allows transmitted frames again.
const TRANSMIT_TOKENS: u32 = 3;
/// Event source: the next announcement of a restored interface.
const ANNOUNCE: u32 = 4;

/// One pair of queues.
pub(super) struct QueuePair {
    name: String,
    net: Arc<NetShared>,
    index: usize,
    watch: TapWatch,
    receive_throttle: Throttle,
    transmit_throttle: Throttle,
    /// The first pair announces the interface.
    announcer: Option<Announcer>,
    active: Option<Active>,
}

/// State between activation and reset. A driver may leave queues disabled.
struct Active {
    ram: GuestRam,
    receiver: Option<Receiver>,
    transmitter: Option<Transmitter>,
}

impl QueuePair {
    /// Pair number `index` of the device.
    ///
    /// # Errors
    /// No event set or timer is available.
    pub(super) fn new(
        name: String,
        net: Arc<NetShared>,
        index: usize,
        params: &NetParams,
    ) -> std::io::Result<Self> {
        let limiters = &params.limiters;
        Ok(Self {
            name,
            watch: TapWatch::new(net.tap(index).as_raw_fd())?,
            receive_throttle: Throttle::new(Arc::clone(&limiters.receive))?,
            transmit_throttle: Throttle::new(Arc::clone(&limiters.transmit))?,
            announcer: match index {
                0 => Some(Announcer::new(params.mac)?),
                _ => None,
            },
            net,
            index,
            active: None,
        })
    }

    /// Runs `work` on the active state, if there is one.
    fn with_active(
        &mut self,
        work: impl FnOnce(&mut Self, &mut Active, &RamGuard) -> Result<(), WorkerError>,
    ) -> Result<(), WorkerError> {
        with_taken(
            self,
            |pair| &mut pair.active,
            |pair, active| {
                let ram = active.ram.memory();
                work(pair, active, &ram)
            },
        )
    }

    fn receive(
        &mut self,
        active: &mut Active,
        ram: &RamGuard,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        let Some(receiver) = &mut active.receiver else {
            return Ok(());
        };
        let tap = self.net.tap(self.index).as_raw_fd();
        if self.receive_throttle.is_waiting() {
            return Ok(());
        }
        let throttle = &mut self.receive_throttle;
        let stopped = receiver.run(tap, ram, self.net.counters(), throttle, turn)?;
        receiver.queue.signal(ram)?;
        match stopped {
            receive::Stopped::NoFrame | receive::Stopped::TurnOver => self.watch.readable(true),
            receive::Stopped::NoBuffer
            | receive::Stopped::Throttled
            | receive::Stopped::TapFailed => self.watch.readable(false),
        }
    }

    fn transmit(
        &mut self,
        active: &mut Active,
        ram: &RamGuard,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        let Some(transmitter) = &mut active.transmitter else {
            return Ok(());
        };
        let tap = self.net.tap(self.index).as_raw_fd();
        if self.transmit_throttle.is_waiting() {
            return Ok(());
        }
        let throttle = &mut self.transmit_throttle;
        let stopped = transmitter.run(tap, ram, self.net.counters(), throttle, turn)?;
        transmitter.queue.signal(ram)?;
        self.watch.writable(stopped == transmit::Stopped::NoRoom)
    }
}

impl QueueHandler for QueuePair {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        let features = activation.features;
        let (ram, queues) = activation.serve();
        // With a control queue, that queue's worker sets the offloads.
        if self.index == 0 && !has(features, VIRTIO_NET_F_CTRL_VQ) {
            self.net.set_first_offloads(features);
        }
        let mut active = Active {
            ram,
            receiver: None,
            transmitter: None,
        };
        for queue in queues {
            if queue.index() % 2 == 0 {
                let mergeable = has(features, VIRTIO_NET_F_MRG_RXBUF);
                active.receiver = Some(Receiver::new(queue, mergeable));
            } else {
                active.transmitter = Some(Transmitter::new(queue));
            }
        }
        sources.add(self.watch.as_raw_fd(), TAP)?;
        sources.add(self.net.enabled_event(self.index).as_raw_fd(), ENABLED)?;
        sources.add(self.receive_throttle.as_raw_fd(), RECEIVE_TOKENS)?;
        sources.add(self.transmit_throttle.as_raw_fd(), TRANSMIT_TOKENS)?;
        self.active = Some(active);
        if let Some(announcer) = &mut self.announcer {
            sources.add(announcer.as_raw_fd(), ANNOUNCE)?;
            if self.net.take_restored() {
                announcer.start(self.net.tap(self.index));
            }
        }
        // The driver may have provided buffers before this, and need not notify the device of them.
        let mut turn = Turn::default();
        self.with_active(|pair, active, ram| {
            pair.receive(active, ram, &mut turn)?;
            turn.begin();
            pair.transmit(active, ram, &mut turn)
        })
    }

    fn queue_ready(&mut self, queue_index: u16, turn: &mut Turn) -> Result<(), WorkerError> {
        self.with_active(|pair, active, ram| {
            let receiver_index = active.receiver.as_ref().map(|it| it.queue.index());
            let transmitter_index = active.transmitter.as_ref().map(|it| it.queue.index());
            if receiver_index == Some(queue_index) {
                return pair.receive(active, ram, turn);
            }
            // The doorbell was signalled while the tap is full: the tap's event will follow.
            if transmitter_index == Some(queue_index) && !pair.watch.wants_writable() {
                return pair.transmit(active, ram, turn);
            }
            Ok(())
        })
    }

    fn source_ready(
        &mut self,
        token: u32,
        _: &mut EventSources,
        turn: &mut Turn,
    ) -> Result<(), WorkerError> {
        if token == ENABLED {
            // Reading fails only if the event was not signalled.
            self.net.enabled_event(self.index).read().ok();
            return self.with_active(|pair, active, ram| pair.receive(active, ram, turn));
        }
        if token == RECEIVE_TOKENS {
            self.receive_throttle.release();
            return self.with_active(|pair, active, ram| pair.receive(active, ram, turn));
        }
        if token == TRANSMIT_TOKENS {
            self.transmit_throttle.release();
            return self.with_active(|pair, active, ram| pair.transmit(active, ram, turn));
        }
        if token == ANNOUNCE {
            if let Some(announcer) = &mut self.announcer {
                announcer.next(self.net.tap(self.index));
            }
            return Ok(());
        }
        self.with_active(|pair, active, ram| {
            if pair.watch.wants_readable() {
                pair.receive(active, ram, turn)?;
            }
            if pair.watch.wants_writable() {
                pair.transmit(active, ram, turn)?;
            }
            Ok(())
        })
    }

    fn reset(&mut self) {
        self.resume();
        self.announcer.iter_mut().for_each(Announcer::stop);
        self.active = None;
        for stop in [TapWatch::readable, TapWatch::writable] {
            if let Err(error) = stop(&mut self.watch, false) {
                log::warn!("{}: {error}", self.name);
            }
        }
    }

    fn state(&self) -> HandlerState {
        let queues = self.active.iter().flat_map(|active| {
            let receive = active.receiver.iter().map(|it| &it.queue);
            receive.chain(active.transmitter.iter().map(|it| &it.queue))
        });
        HandlerState::of_queues(queues.map(ServedQueue::position))
    }

    fn pause(&mut self) {
        // Each frame is read and written within one call, so nothing is in flight.
        if let Some(Active {
            receiver: Some(receiver),
            ..
        }) = &mut self.active
        {
            receiver.put_back();
        }
    }

    /// The limits may have changed during the pause.
    fn resume(&mut self) {
        self.receive_throttle.release();
        self.transmit_throttle.release();
    }
}
