#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::sync::Mutex;

use virtio_devices::rng::Rng;

use super::*;
use crate::threads::{DeviceKind, MachineThread};

#[test]
fn worker_of_a_device_named_like_a_thread_is_confined_as_a_worker() {
    let Ok(kvm) = Kvm::open().map_err(test_skip::skip) else {
        return;
    };
    let (sender, threads) = std::sync::mpsc::channel();
    let context = PcContext {
        signals: Arc::new(VmSignals::new().unwrap()),
        thread_start: Arc::new(move |thread| sender.send(thread).unwrap()),
        events: Arc::new(|_| {}),
    };
    let memory = GuestMemory::new(&Default::default(), 46).unwrap();
    let params = PcParams {
        cpus: CpusConfig::default(),
        numa: Vec::new(),
        pci_segments: 1,
        wished_slots: Vec::new(),
    };
    let mut pc = Pc::new(&kvm, memory, params, context).unwrap();
    let id = "vcpu0";
    let rng = Rng::new(id, File::open("/dev/zero").unwrap());
    let plug = Plug {
        id: id.to_owned(),
        kind: DeviceKind::Rng,
        place: Default::default(),
        device: Arc::new(Mutex::new(rng)),
    };
    pc.plug(plug).unwrap();
    let thread = threads.recv().unwrap();
    assert_eq!(thread, MachineThread::Worker(DeviceKind::Rng));
}
