//! Plugs the configured virtio devices into the chassis.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use api::{DeviceNode, PciDeviceInfo};
use virtio_devices::transport::{
    LifecycleListener, VirtioPciFunction, VirtioPciParams, vectors_needed,
};
use virtio_devices::{GuestRam, VirtioDevice};

use super::chassis::Chassis;
use super::observer::CounterSource;
use super::{EventSink, ThreadStart, VmContext, VmError};
use crate::interrupt::FunctionVectors;
use crate::pci::Bdf;
use crate::seccomp::ThreadKind;

/// Where a device goes and what it is called.
pub(super) struct Plug<'a> {
    pub(super) id: &'a str,
    /// What its workers may do.
    pub(super) kind: ThreadKind,
    /// The slot asked for; the next free one when `None`.
    pub(super) slot: Option<u8>,
}

/// A device on the bus.
#[derive(Debug)]
pub(super) struct Plugged {
    pub(super) id: String,
    /// What serves it, which also says what it is.
    pub(super) kind: ThreadKind,
    pub(super) bdf: Bdf,
    pub(super) function: Arc<VirtioPciFunction>,
}

impl Plugged {
    /// As the API shows it.
    pub(super) fn info(&self) -> PciDeviceInfo {
        PciDeviceInfo {
            id: self.id.clone(),
            bdf: self.bdf.to_string(),
        }
    }
}

/// The devices plugged in so far.
pub(super) struct Devices<'a> {
    chassis: &'a Chassis,
    ram: GuestRam,
    context: &'a VmContext,
    pub(super) plugged: Vec<Plugged>,
    pub(super) counters: Vec<(String, CounterSource)>,
    pub(super) tree: BTreeMap<String, DeviceNode>,
}

impl<'a> Devices<'a> {
    pub(super) fn new(chassis: &'a Chassis, ram: GuestRam, context: &'a VmContext) -> Self {
        Self {
            chassis,
            ram,
            context,
            plugged: Vec::new(),
            counters: Vec::new(),
            tree: BTreeMap::new(),
        }
    }

    /// Puts `device` behind a virtio-pci function on the bus. Its counters are
    /// its own unless the caller has better ones.
    ///
    /// # Errors
    /// No slot, no thread, no descriptor.
    pub(super) fn plug(
        &mut self,
        plug: &Plug<'_>,
        device: impl VirtioDevice + 'static,
        counters: Option<CounterSource>,
    ) -> Result<(), VmError> {
        let in_device = |source: Box<dyn Error + Send + Sync>| VmError::Device {
            id: plug.id.to_owned(),
            source,
        };
        let device: Arc<Mutex<dyn VirtioDevice>> = Arc::new(Mutex::new(device));
        let count = vectors_needed(&*device.lock().unwrap_or_else(PoisonError::into_inner));
        let vectors = FunctionVectors::new(Arc::clone(&self.chassis.router), count);
        let function = VirtioPciFunction::new(VirtioPciParams {
            id: plug.id.to_owned(),
            device: Arc::clone(&device),
            mem: self.ram.clone(),
            vectors: Arc::new(vectors),
            thread_start: self.worker_start(plug.kind),
            listener: Some(Arc::new(DeviceEvents(Arc::clone(&self.context.events)))),
        })
        .map_err(|source| in_device(source.into()))?;
        let bdf = self
            .chassis
            .pci
            .add(Arc::clone(&function) as _, plug.slot)
            .map_err(|source| in_device(source.into()))?;
        self.counters.push((
            plug.id.to_owned(),
            counters.unwrap_or(CounterSource::Device(device)),
        ));
        self.add_nodes(plug.id, bdf.to_string());
        self.plugged.push(Plugged {
            id: plug.id.to_owned(),
            kind: plug.kind,
            bdf,
            function,
        });
        Ok(())
    }

    /// The hook for workers of this kind, whatever the user has called their device.
    fn worker_start(&self, kind: ThreadKind) -> ThreadStart {
        let thread_start = Arc::clone(&self.context.thread_start);
        let name = kind.worker_name().expect("devices are served by workers");
        Arc::new(move |_own_name| thread_start(name))
    }

    /// A device is two nodes, as upstream shows it: the PCI function and, below
    /// it, the virtio device.
    fn add_nodes(&mut self, id: &str, bdf: String) {
        let function_id = format!("_virtio-pci-{id}");
        self.tree.insert(
            function_id.clone(),
            DeviceNode {
                id: function_id.clone(),
                children: vec![id.to_owned()],
                pci_bdf: Some(bdf.clone()),
                ..DeviceNode::default()
            },
        );
        self.tree.insert(
            id.to_owned(),
            DeviceNode {
                id: id.to_owned(),
                parent: Some(function_id),
                pci_bdf: Some(bdf),
                ..DeviceNode::default()
            },
        );
    }
}

/// Tells the event monitor of drivers that come and go.
struct DeviceEvents(EventSink);

impl LifecycleListener for DeviceEvents {
    fn device_activated(&self, id: &str) {
        (self.0)("virtio-device", "activated", &[("id", id.to_owned())]);
    }

    fn device_reset(&self, id: &str) {
        (self.0)("virtio-device", "reset", &[("id", id.to_owned())]);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs::File;

    use hypervisor::Kvm;
    use virtio_devices::rng::Rng;

    use super::*;
    use crate::memory::GuestMemory;
    use crate::vm::VmSignals;

    #[test]
    fn worker_of_a_device_named_like_a_thread_is_confined_as_a_worker() {
        let Ok(kvm) = Kvm::open() else {
            eprintln!("skipped: no usable /dev/kvm");
            return;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let signals = Arc::new(VmSignals::new().unwrap());
        let (sender, names) = std::sync::mpsc::channel();
        let context = VmContext {
            signals: Arc::clone(&signals),
            thread_start: Arc::new(move |name| sender.send(name.to_owned()).unwrap()),
            events: Arc::new(|_, _, _| {}),
            consoles: Arc::default(),
        };
        let memory = GuestMemory::new(&Default::default(), 46).unwrap();
        let chassis = Chassis::new(&vm, memory.map(), &signals).unwrap();
        let mut devices = Devices::new(&chassis, memory.ram().clone(), &context);
        let plug = Plug {
            id: "vcpu0",
            kind: ThreadKind::Rng,
            slot: None,
        };
        let rng = Rng::new(plug.id, File::open("/dev/zero").unwrap());
        devices.plug(&plug, rng, None).unwrap();
        let name = names.recv().unwrap();
        assert_eq!(ThreadKind::of_name(&name), Some(ThreadKind::Rng), "{name}");
    }
}
