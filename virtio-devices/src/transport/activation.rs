//! DRIVER_OK: passes the configured queues to the workers.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;

use super::function::{Registers, VirtioPciFunction, lock};
use crate::device::{Activation, ActiveQueue, Interrupt};

impl VirtioPciFunction {
    /// Passes the enabled queues to the workers. If a driver set them up incorrectly, DEVICE_NEEDS_RESET is set.
    pub(super) fn activate(&self, state: &mut Registers) {
        let features = state.common.accepted();
        let Some(queues) = self.build_queues(state, features) else {
            self.interrupt.signal_needs_reset();
            return;
        };
        self.hand_over(state, queues);
    }

    /// Passes queues to their workers.
    pub(super) fn hand_over(&self, state: &mut Registers, queues: Vec<(u16, Queue)>) {
        let features = state.common.accepted();
        let mut groups: Vec<Vec<ActiveQueue>> = self.workers.iter().map(|_| Vec::new()).collect();
        {
            let device = lock(&self.device);
            for (index, queue) in queues {
                let group = device
                    .handler_of_queue(index, features)
                    .and_then(|handler| groups.get_mut(handler));
                if let Some(group) = group {
                    group.push(ActiveQueue {
                        index,
                        queue,
                        doorbell: Arc::clone(&self.doorbells[usize::from(index)]),
                        dma: self.dma.clone(),
                    });
                }
            }
        }
        state.active = true;
        state.stopped = false;
        self.counters.activations.count();
        for (worker, queues) in self.workers.iter().zip(groups) {
            if queues.is_empty() {
                continue;
            }
            let activation = Activation {
                mem: self.mem.clone(),
                features,
                queues,
                interrupt: self.interrupt.clone(),
            };
            if let Err(error) = worker.activate(activation) {
                log::error!("{}: {error}", self.id);
                self.interrupt.signal_needs_reset();
            }
        }
        if let Some(listener) = &self.listener {
            listener.device_activated(&self.id);
        }
    }

    /// The enabled queues; `None` if one of them is unusable.
    fn build_queues(&self, state: &Registers, features: u64) -> Option<Vec<(u16, Queue)>> {
        let mem = self.mem.memory();
        let mem = self.dma_memory(&mem);
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        state
            .common
            .enabled_queues()
            .map(|(index, config)| match config.build(&mem, event_idx) {
                Ok(queue) => Some((index, queue)),
                Err(fault) => {
                    self.counters.bad_queue_rings.count();
                    log::debug!("{}: queue {index}: {fault}", self.id);
                    None
                }
            })
            .collect()
    }
}
