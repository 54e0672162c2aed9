//! Devices on the PCI bus: present at boot, or hot-plugged and unplugged.
//!
//! ```text
//! add:     on the bus ─► guest interrupted                             (immediately)
//! remove:  guest interrupted ─► … ─► guest releases it ─► off the bus ─► device dropped
//!          (immediately)             (vCPU thread)                       (thread that owns the machine)
//! ```
//! No step waits for the guest. If the guest never releases a device, the device stays until the guest reboots.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use state::Saved;
use virtio_devices::Unpoisoned;
use virtio_devices::transport::{VirtioPciFunction, VirtioPciParams, vectors_needed};
use virtio_devices::worker::WorkerStart;

use super::Pc;
use super::device_events::DeviceEvents;
use super::device_memory::MappedMemory;
use super::error::PcError;
use super::plugged::{Plug, Plugged};
use crate::interrupt::FunctionVectors;
use crate::threads::{DeviceKind, MachineThread, MachineThreadStart};

/// Maximum time of one access to a device. It is one system call, on a host that may not run the vCPU for a while.
const ACCESS_DEADLINE: Duration = Duration::from_secs(60);

/// Returns when only the caller holds a function that is not on the bus anymore, `own` times: vCPUs have finished their
/// accesses, and find it no more. Its drop ends workers and calls VFIO, which a vCPU thread may not. Observers may still
/// look at it, and then drop it under a lock of its owner.
fn wait_for_accesses<T: ?Sized>(function: &Arc<T>, own: usize, deadline: Duration) {
    let begun = Instant::now();
    while Arc::strong_count(function) > own {
        if begun.elapsed() > deadline {
            log::warn!("An access to a removed device does not end");
            return;
        }
        thread::yield_now();
    }
}

impl Pc {
    /// Adds a device to the bus of a machine that has not booted, and starts its workers.
    ///
    /// # Errors
    /// No free slot, thread or descriptor.
    pub fn plug(&mut self, plug: Plug) -> Result<&Plugged, PcError> {
        let plugged = self.put_on_bus(plug)?;
        Ok(self.keep(plugged))
    }

    /// Adds a device to the bus of a running or paused machine and notifies the guest. On an error nothing is left
    /// behind.
    ///
    /// # Errors
    /// As [`Pc::plug`], or the guest cannot be notified.
    pub fn add(&mut self, plug: Plug) -> Result<&Plugged, PcError> {
        let plugged = self.put_on_bus(plug)?;
        self.announce(plugged)
    }

    /// Notifies the guest of a device that is on the bus.
    pub(super) fn announce(&mut self, plugged: Plugged) -> Result<&Plugged, PcError> {
        if self.paused {
            plugged.function.pause();
        }
        self.chassis.hotplug.announce(plugged.bdf);
        if let Err(source) = self.chassis.ged.announce_pci_change() {
            self.chassis.pci.remove(plugged.bdf);
            wait_for_accesses(&plugged.function, plugged.holds(), ACCESS_DEADLINE);
            let id = plugged.id;
            return Err(PcError::Announce { id, source });
        }
        Ok(self.keep(plugged))
    }

    /// The devices on the bus.
    pub fn devices(&self) -> &[Plugged] {
        &self.plugged
    }

    /// Runs `change` while the workers of a device are paused and no request is in flight. Waits only for host I/O.
    pub fn while_paused<T>(&self, device: &Plugged, change: impl FnOnce() -> T) -> T {
        if self.paused {
            return change();
        }
        device.function.pause();
        let result = change();
        device.function.resume();
        result
    }

    /// Asks the guest to release a device and returns immediately; may be repeated. After the guest has released it,
    /// [`Pc::take_ejected`] removes the device.
    ///
    /// # Errors
    /// The guest cannot be notified.
    pub fn request_removal(&self, device: &Plugged) -> Result<(), PcError> {
        if !self.is_on_bus(device) {
            return Ok(());
        }
        self.chassis.hotplug.request_removal(device.bdf);
        let told = self.chassis.ged.announce_pci_change();
        told.map_err(|source| PcError::Announce {
            id: device.id.clone(),
            source,
        })
    }

    /// Removes the devices that the guest has released. Waits only for host I/O.
    pub fn take_ejected(&mut self) -> Vec<Plugged> {
        let ejected = self.chassis.hotplug.take_ejected();
        // A device that was added since may have the slot of one that was ejected.
        let (gone, stay): (Vec<_>, _) = std::mem::take(&mut self.plugged)
            .into_iter()
            .partition(|it| ejected.contains(&it.bdf) && !self.is_on_bus(it));
        self.plugged = stay;
        for plugged in &gone {
            // Work in progress ends here and not on a vCPU thread that happens to hold the last reference.
            plugged.function.reset();
            wait_for_accesses(&plugged.function, plugged.holds(), ACCESS_DEADLINE);
        }
        gone
    }

    /// Whether the guest has not released the device. Its slot may belong to another one otherwise.
    pub(super) fn is_on_bus(&self, device: &Plugged) -> bool {
        let own = Arc::as_ptr(&device.function).cast::<()>();
        let functions = self.chassis.pci.functions();
        functions
            .iter()
            .any(|(_, function)| Arc::as_ptr(function).cast::<()>() == own)
    }

    /// Puts `device` behind a virtio-pci function on the bus.
    fn put_on_bus(&self, plug: Plug) -> Result<Plugged, PcError> {
        let function = self.function_of(&plug, None)?;
        let memory = self.map_memory_of(&plug, plug.place.segment)?;
        let pci = &self.chassis.pci;
        let bdf = pci.add(function.clone(), plug.place);
        match bdf {
            Ok(bdf) => {
                // Until here, every access of the device fails.
                plug.place_endpoint(bdf);
                Ok(Plugged::new(plug, bdf, function, memory))
            }
            Err(source) => Err(PcError::Device {
                id: plug.id,
                source: source.into(),
            }),
        }
    }

    /// Maps the device's memory, if it has any, in the window of `segment` for the guest.
    pub(super) fn map_memory_of(
        &self,
        plug: &Plug,
        segment: u16,
    ) -> Result<Option<MappedMemory>, PcError> {
        let mut device = plug.device.lock().unpoisoned();
        let Some(memory) = device.memory() else {
            return Ok(None);
        };
        let bus = self.chassis.pci.bus(segment);
        let bus = bus.map_err(|source| PcError::Device {
            id: plug.id.clone(),
            source: source.into(),
        })?;
        let mapped = self.device_slots.map(bus, &plug.id, memory)?;
        let mapped = mapped.covered(&self.faults, &plug.id);
        device.set_memory_start(mapped.start());
        Ok(Some(mapped))
    }

    /// Creates the device's virtio-pci function, in the saved state if one is given.
    pub(super) fn function_of(
        &self,
        plug: &Plug,
        saved: Option<&Saved>,
    ) -> Result<Arc<VirtioPciFunction>, PcError> {
        let device = plug.device.lock().unpoisoned();
        let count = vectors_needed(&*device);
        let ram = if device.ram_is_mapped_elsewhere() {
            self.memory.hotplug_ram().iter().for_each(|it| it.bypass());
            self.memory.ram()
        } else {
            self.memory.device_ram()
        };
        drop(device);
        let vectors = FunctionVectors::new(Arc::clone(&self.chassis.router), count);
        let params = VirtioPciParams {
            id: plug.id.clone(),
            device: Arc::clone(&plug.device),
            mem: ram.clone(),
            dma: plug.dma.clone(),
            vectors: Arc::new(vectors),
            thread_start: worker_start(&self.context.thread_start, plug.kind),
            listener: Some(Arc::new(DeviceEvents::new(Arc::clone(
                &self.context.events,
            )))),
        };
        let function = match saved {
            Some(saved) => VirtioPciFunction::from_state(params, saved),
            None => VirtioPciFunction::new(params),
        };
        function.map_err(|source| PcError::Device {
            id: plug.id.clone(),
            source: source.into(),
        })
    }

    /// Adds a function that is on the bus to the list.
    pub(super) fn keep(&mut self, plugged: Plugged) -> &Plugged {
        self.plugged.push(plugged);
        self.plugged.last().expect("it was put there just now")
    }
}

/// The start hook for workers of this kind, independent of the device's name.
fn worker_start(thread_start: &MachineThreadStart, kind: DeviceKind) -> WorkerStart {
    let thread_start = Arc::clone(thread_start);
    Arc::new(move |_own_name| thread_start(MachineThread::Worker(kind)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_function_is_dropped_by_the_caller_or_after_the_deadline() {
        let function = Arc::new(());
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let held = Arc::clone(&function);
        let vcpu = thread::spawn(move || {
            receiver.recv().unwrap();
            drop(held);
        });
        wait_for_accesses(&function, 1, Duration::ZERO);
        assert_eq!(Arc::strong_count(&function), 2, "the access goes on");
        sender.send(()).unwrap();
        wait_for_accesses(&function, 1, Duration::from_secs(60));
        assert_eq!(Arc::strong_count(&function), 1);
        vcpu.join().unwrap();
    }
}
