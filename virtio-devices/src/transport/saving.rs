//! Saves a virtio-pci function, and continues from a saved one.
//!
//! ```text
//!  pause ─► workers finish what is in flight ─► state(): registers, MSI-X, device, handlers
//!
//!  from_state: check all ─► device, handlers ─► workers, paused ─► pass queues on, signal doorbells
//!  resume ─► workers check every queue ─► an interrupt for each: the last one may have been lost
//! ```

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use ::state::{Saved, StateError, parts};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use super::common_config::{CommonConfig, S_DRIVER_OK, S_NEEDS_RESET};
use super::function::{Registers, VirtioPciFunction, lock};
use super::interrupt::PciInterrupt;
use super::state::{QueueState, RingState, VirtioPciState};
use crate::device::{HandlerState, QueuePosition, WorkerError};
use crate::worker::WorkerHandle;

impl VirtioPciFunction {
    /// The current state of the function. The caller must have paused it, and no vCPU may run.
    ///
    /// # Errors
    /// A worker has ended; the driver's requests are lost.
    pub fn state(&self) -> Result<VirtioPciState, WorkerError> {
        let handlers = self.workers.iter().map(WorkerHandle::state);
        let handlers = handlers.collect::<Result<Vec<HandlerState>, _>>()?;
        let positions: BTreeMap<u16, QueuePosition> = handlers
            .iter()
            .flat_map(|handler| &handler.queues)
            .map(|position| (position.index, *position))
            .collect();
        let registers = self.lock_state();
        let common = &registers.common;
        let device = lock(&self.device);
        Ok(VirtioPciState {
            device_type: device.device_type(),
            offered: common.offered,
            accepted: common.accepted,
            status: if common.is_resetting() {
                0
            } else {
                self.interrupt.status()
            },
            isr: self.interrupt.isr(),
            config_generation: self.interrupt.config_generation(),
            config_vector: self.interrupt.config_vector(),
            device_feature_select: common.device_feature_select,
            driver_feature_select: common.driver_feature_select,
            queue_select: common.queue_select,
            queues: queue_states(common, &self.interrupt, &positions),
            config_space: Saved::of(&registers.header.space.state()),
            msix: Saved::of(&registers.msix.state()),
            device: device.state(),
            handlers: handlers.into_iter().map(|handler| handler.own).collect(),
        })
    }

    /// Passes the queues that were served to their workers, which are paused.
    pub(super) fn continue_from(&self, state: &VirtioPciState) -> Result<(), StateError> {
        let mem = self.mem.memory();
        let mem = self.dma_memory(&mem);
        let event_idx = state.accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::new();
        let mut registers = self.lock_state();
        for (index, config) in registers.common.enabled_queues() {
            let Some(position) = state.queues[usize::from(index)].position else {
                continue;
            };
            let mut queue = match config.build(&mem, event_idx) {
                Ok(queue) => queue,
                // The guest has unmapped a ring that the device was using. It stops, as at its next access before.
                Err(_) if self.dma.is_some() => {
                    self.counters.bad_queue_rings.count();
                    self.interrupt.add_status(S_NEEDS_RESET);
                    continue;
                }
                Err(fault) => {
                    let reason = format!("are unusable: queue {index}: {fault}");
                    return Err(StateError::invalid(parts::VIRTIO_PCI, "queues", reason));
                }
            };
            queue.set_next_avail(position.next_avail);
            queue.set_next_used(position.next_used);
            queues.push((index, queue));
            // Signalled doorbells are not part of the state, and the worker checks a queue only when its doorbell is
            // signalled. The counter is new, so the write cannot fail.
            self.doorbells[usize::from(index)].write(1).ok();
        }
        let served = registers.common.enabled_queues().count() == queues.len();
        registers.active = state.status & S_DRIVER_OK != 0;
        if !queues.is_empty() || registers.active && served {
            self.hand_over(&mut registers, queues);
        }
        self.owes_signals.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// After the first resume: sends interrupts that may have been in transit when the state was taken.
    pub(super) fn pay_signals(&self) {
        if !self.owes_signals.swap(false, Ordering::SeqCst) {
            return;
        }
        if self.interrupt.status() & S_DRIVER_OK != 0 {
            self.interrupt.signal_all();
        }
    }
}

fn queue_states(
    common: &CommonConfig,
    interrupt: &PciInterrupt,
    positions: &BTreeMap<u16, QueuePosition>,
) -> Vec<QueueState> {
    let queues = (0u16..).zip(&common.queues);
    queues
        .map(|(index, queue)| QueueState {
            max_size: queue.max_size,
            size: queue.size,
            enabled: queue.enabled,
            desc_table: queue.desc_table,
            avail_ring: queue.avail_ring,
            used_ring: queue.used_ring,
            vector: interrupt.queue_vector(index),
            position: positions.get(&index).map(|position| RingState {
                next_avail: position.next_avail,
                next_used: position.next_used,
            }),
        })
        .collect()
}

impl Registers {
    /// Restores configuration space, MSI-X and the common configuration of a function before the guest sees it.
    pub(super) fn restore(
        &mut self,
        state: &VirtioPciState,
        interrupt: &PciInterrupt,
    ) -> Result<(), StateError> {
        self.header.space.restore(&state.config_space.read()?)?;
        let mut control = [0; 2];
        self.header
            .space
            .read(self.header.msix_control, &mut control);
        self.msix
            .restore(&state.msix.read()?, u16::from_le_bytes(control))?;
        self.common.restore(state, interrupt);
        Ok(())
    }
}
