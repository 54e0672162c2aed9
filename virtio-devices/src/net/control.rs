//! The control queue (virtio 1.2 §5.1.6.5): how many pairs the driver uses, and
//! which offloads it can cope with at the moment.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};
use vm_memory::GuestAddressSpace;

use super::config_space::{GUEST_OFFLOADS, has};
use super::counters::NetCounters;
use super::device::NetState;
use crate::device::{Activation, GuestRam, QueueHandler, WorkerError};
use crate::guest_buffers::{ChainBuffers, RamGuard};
use crate::served_queue::{Popped, ServedQueue};
use crate::worker::EventSources;

/// Class, command, and the longest data of a command we know.
const COMMAND_BYTES_MAX: usize = 2 + 8;
/// Commands before other work has its turn.
const COMMANDS_PER_TURN: usize = 64;

/// Serves the control queue.
pub(super) struct ControlQueue {
    name: String,
    net: Arc<NetState>,
    active: Option<Active>,
}

struct Active {
    ram: GuestRam,
    features: u64,
    queue: ServedQueue,
}

impl ControlQueue {
    pub(super) fn new(name: String, net: Arc<NetState>) -> Self {
        Self {
            name,
            net,
            active: None,
        }
    }

    fn serve(&self, active: &mut Active, ram: &RamGuard) -> Result<(), WorkerError> {
        active.queue.disable_doorbell(ram)?;
        for _ in 0..COMMANDS_PER_TURN {
            let Some(popped) = active.queue.pop(ram)? else {
                if active.queue.enable_doorbell(ram)? {
                    continue;
                }
                return active.queue.signal(ram);
            };
            let (head, written) = (popped.head, self.answer(active.features, popped));
            active.queue.push_used(ram, head, written)?;
        }
        active.queue.signal(ram)?;
        active.queue.ring_again()
    }

    /// Obeys a command and returns the bytes written in answer.
    fn answer(&self, features: u64, popped: Popped) -> u32 {
        let parts = popped.buffers.ok().and_then(|chain| {
            let ChainBuffers {
                readable,
                mut writable,
            } = chain;
            Some((readable, writable.split_last_byte()?))
        });
        let Some((readable, ack)) = parts else {
            NetCounters::count(&self.net.counters().bad_requests);
            return 0;
        };
        let mut command = [0; COMMAND_BYTES_MAX];
        let len = readable.copy_out(&mut command);
        let obeyed = readable.bytes() <= COMMAND_BYTES_MAX && self.obey(features, &command[..len]);
        if !obeyed {
            NetCounters::count(&self.net.counters().bad_requests);
        }
        let status = if obeyed {
            VIRTIO_NET_OK
        } else {
            VIRTIO_NET_ERR
        };
        ack.copy_in(&[status as u8]);
        1
    }

    fn obey(&self, features: u64, command: &[u8]) -> bool {
        let Some((&[class, number], data)) = command.split_first_chunk() else {
            return false;
        };
        match (u32::from(class), u32::from(number)) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET)
                if has(features, VIRTIO_NET_F_MQ) =>
            {
                <[u8; 2]>::try_from(data)
                    .is_ok_and(|pairs| self.net.enable_pairs(u16::from_le_bytes(pairs)))
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
                if has(features, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) =>
            {
                let Ok(offloads) = <[u8; 8]>::try_from(data).map(u64::from_le_bytes) else {
                    return false;
                };
                offloads & !(features & GUEST_OFFLOADS) == 0 && self.net.set_offloads(offloads)
            }
            _ => false,
        }
    }
}

impl QueueHandler for ControlQueue {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn activate(
        &mut self,
        activation: Activation,
        _: &mut EventSources,
    ) -> Result<(), WorkerError> {
        self.net.set_offloads(activation.features);
        self.active = activation.queues.into_iter().next().map(|queue| Active {
            ram: activation.mem,
            features: activation.features,
            queue: ServedQueue::new(queue, activation.features, activation.interrupt),
        });
        Ok(())
    }

    fn queue_ready(&mut self, _queue_index: u16) -> Result<(), WorkerError> {
        let Some(mut active) = self.active.take() else {
            return Ok(());
        };
        let ram = active.ram.memory();
        let result = self.serve(&mut active, &ram);
        self.active = Some(active);
        result
    }

    fn reset(&mut self) {
        self.active = None;
        // What a driver finds after reset: one pair (virtio 1.2 §5.1.6.5.5), and
        // no frame that only the driver before it could cope with.
        self.net.enable_pairs(1);
        self.net.set_offloads(0);
    }
}
