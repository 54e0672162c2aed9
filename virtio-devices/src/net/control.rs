//! The control queue (virtio 1.2 §5.1.6.5): sets the number of pairs that the driver uses, and the offloads that it
//! accepts. Devices whose other queues a back end serves use it too.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use super::config_space::{GUEST_OFFLOADS, has};
use crate::queue::{ChainBuffers, ChainError, Driver, Reply, SingleQueueDevice};
use crate::worker::Turn;

/// Class, command, and the longest data of a known command.
const COMMAND_BYTES_MAX: usize = 2 + 8;

/// What the driver controls. Called by the control queue's worker, and so must not wait.
pub(crate) trait Controlled: Send + Sync {
    /// A driver has accepted these features.
    fn activated(&self, features: u64);

    /// Uses this number of pairs. False if there are fewer, or if it is 0.
    fn enable_pairs(&self, count: u16) -> bool;

    /// Sets the guest's offloads, which were negotiated. False if they cannot be set.
    fn set_offloads(&self, features: u64) -> bool;

    /// Counts a bad request.
    fn count_bad(&self);
}

/// Serves the control queue.
pub(crate) struct ControlQueue<C> {
    name: String,
    net: Arc<C>,
}

impl<C: Controlled> ControlQueue<C> {
    pub(crate) fn new(name: String, net: Arc<C>) -> Self {
        Self { name, net }
    }

    /// Executes a command and returns the number of response bytes.
    fn carry_out(&self, features: u64, request: Result<ChainBuffers, ChainError>) -> u32 {
        let parts = request.ok().and_then(|chain| {
            let ChainBuffers {
                readable,
                mut writable,
            } = chain;
            Some((readable, writable.split_last_byte()?))
        });
        let Some((readable, ack)) = parts else {
            self.net.count_bad();
            return 0;
        };
        let mut command = [0; COMMAND_BYTES_MAX];
        let len = readable.copy_out(&mut command);
        let obeyed = readable.bytes() <= COMMAND_BYTES_MAX && self.obey(features, &command[..len]);
        if !obeyed {
            self.net.count_bad();
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

impl<C: Controlled> SingleQueueDevice for ControlQueue<C> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn activated(&mut self, features: u64) {
        self.net.activated(features);
    }

    fn answer(
        &mut self,
        driver: &Driver,
        request: Result<ChainBuffers, ChainError>,
        turn: &mut Turn,
    ) -> Reply {
        turn.charge_call(1, 0);
        Reply::Done(self.carry_out(driver.features, request))
    }

    fn reset(&mut self) {
        // The state that a driver finds after a reset: one pair (virtio 1.2 §5.1.6.5.5), and no offloads that only the
        // previous driver accepted.
        self.net.enable_pairs(1);
        self.net.set_offloads(0);
    }
}
