#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Seek};
use std::sync::Mutex;

use api::config::CpusConfig;
use virtio_devices::rng::Rng;

use crate::bus::BusDevice;

use std::sync::mpsc::{self, Receiver};

use super::*;
use crate::pci::SegmentWeights;
use crate::threads::{DeviceKind, MachineThread};

/// A context, and the threads that start in it.
fn context() -> (PcContext, Receiver<MachineThread>) {
    let (sender, threads) = mpsc::channel();
    let context = PcContext {
        signals: Arc::new(VmSignals::new().unwrap()),
        thread_start: Arc::new(move |thread| sender.send(thread).unwrap()),
        events: Arc::new(|_| {}),
    };
    (context, threads)
}

fn params() -> PcParams {
    PcParams {
        cpus: CpusConfig::default(),
        numa: Vec::new(),
        pci_segments: vec![SegmentWeights::default()],
        wished_slots: Vec::new(),
        iommu_segments: Vec::new(),
    }
}

#[test]
fn worker_of_a_device_named_like_a_thread_is_confined_as_a_worker() {
    let Ok(kvm) = Kvm::open().map_err(test_skip::skip) else {
        return;
    };
    let (context, threads) = context();
    let memory = GuestMemory::new(&Default::default(), 46).unwrap();
    let mut pc = Pc::new(&kvm, memory, params(), context).unwrap();
    let id = "vcpu0";
    let rng = Rng::new(id, File::open("/dev/zero").unwrap());
    let plug = Plug {
        id: id.to_owned(),
        kind: DeviceKind::Rng,
        place: Default::default(),
        device: Arc::new(Mutex::new(rng)),
        dma: None,
    };
    pc.plug(plug).unwrap();
    let thread = threads.recv().unwrap();
    assert_eq!(thread, MachineThread::Worker(DeviceKind::Rng));
}

#[test]
fn memory_added_is_the_guests_and_is_saved_with_the_machine() {
    let Ok(kvm) = Kvm::open().map_err(test_skip::skip) else {
        return;
    };
    const BYTES: u64 = 128 << 20;
    let config = |size| api::config::MemoryConfig {
        size,
        hotplug_size: Some(4 * BYTES),
        ..Default::default()
    };
    let bits = crate::cpu::guest_phys_bits(&kvm, CpusConfig::default().max_phys_bits).unwrap();
    let pc = |memory| Pc::new(&kvm, memory, params(), context().0).unwrap();
    let mut first = pc(GuestMemory::new(&config(BYTES), bits).unwrap());
    assert!(first.grow_memory(BYTES).unwrap().is_none());
    let refused = first.grow_memory(BYTES + 1).unwrap_err();
    assert!(refused.is_of_configuration(), "{refused}");
    for count in 2..=3 {
        let zone = first.grow_memory(count * BYTES).unwrap().unwrap();
        assert_eq!(zone.bytes(), BYTES);
        first.announce_memory().unwrap();
    }
    let mut event = [0];
    first.chassis.ged.read(0, &mut event);
    assert_eq!(event, [crate::legacy::GED_MEMORY_HOTPLUG]);
    let controller = first.chassis.memory_hotplug.as_ref().unwrap();
    assert_eq!(controller.state().inserting, [0, 1]);
    assert_eq!(first.memory.own_bytes(), 3 * BYTES);
    assert_eq!(
        first.acpi_params().memory_hotplug_address,
        Some(first.chassis.ged_address + 0x3000)
    );

    first.pause().unwrap();
    let state = first.state().unwrap();
    drop(first);
    let map = state.memory.read().unwrap();
    let memory = GuestMemory::with_dimms(
        &config(3 * BYTES),
        bits,
        &map,
        crate::memory::ZoneFiles::New,
    )
    .unwrap();
    let mut second = pc(memory);
    second.restore(&state, false).unwrap();
    let controller = second.chassis.memory_hotplug.as_ref().unwrap();
    assert_eq!(controller.state().inserting, [0, 1]);
    assert_eq!(second.state().unwrap().memory_hotplug, state.memory_hotplug);
    // KVM has slots for all of them, and for one more.
    second.grow_memory(4 * BYTES).unwrap().unwrap();
}

#[test]
fn device_added_into_the_slot_of_an_ejected_one_stays() {
    const EJECT: u64 = 8;
    let Ok(kvm) = Kvm::open().map_err(test_skip::skip) else {
        return;
    };
    let memory = GuestMemory::new(&Default::default(), 46).unwrap();
    let (context, _threads) = context();
    let mut pc = Pc::new(&kvm, memory, params(), context).unwrap();
    let add = |pc: &mut Pc, id: &str| {
        let plug = Plug {
            id: id.to_owned(),
            kind: DeviceKind::Rng,
            place: Default::default(),
            device: Arc::new(Mutex::new(Rng::new(id, File::open("/dev/zero").unwrap()))),
            dma: None,
        };
        pc.add(plug).unwrap().clone()
    };
    let first = add(&mut pc, "first");
    pc.request_removal(&first).unwrap();
    let slot = 1_u32 << first.bdf.slot;
    pc.chassis.hotplug.write(EJECT, &slot.to_le_bytes());
    let second = add(&mut pc, "second");
    assert_eq!(second.bdf, first.bdf);
    // Repeated by a client that does not know of the ejection.
    pc.request_removal(&first).unwrap();
    assert_eq!(pc.chassis.hotplug.state().segments[0].leaving, 0);
    // A function that is held here looks like an access in progress.
    drop(first);
    let gone: Vec<_> = pc.take_ejected().into_iter().map(|it| it.id).collect();
    assert_eq!(gone, ["first"]);
    assert_eq!(pc.devices().len(), 1);
    pc.request_removal(&second).unwrap();
    pc.chassis.hotplug.write(EJECT, &slot.to_le_bytes());
    drop(second);
    assert_eq!(pc.take_ejected().len(), 1);
}

/// Acts as a guest that ejects `vcpu` through the controller.
fn eject(pc: &Pc, vcpu: u32) {
    const EJECT: u8 = 1 << 3;
    pc.chassis.cpu_hotplug.write(0, &vcpu.to_le_bytes());
    pc.chassis.cpu_hotplug.write(4, &[EJECT]);
}

/// The numbers of the vCPUs in a core file, from its notes.
fn vcpus_of_core_file(pc: &Pc) -> Vec<u32> {
    let mut core = tempfile::tempfile().unwrap();
    pc.write_core(&core).unwrap();
    let mut head = vec![0; 64 << 10];
    core.rewind().unwrap();
    core.read_exact(&mut head).unwrap();
    let number = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
    // The first program header, which follows the file header, is that of the notes.
    let (mut at, bytes) = (number(64 + 8) as usize, number(64 + 32) as usize);
    let end = at + bytes;
    let (mut vcpus, mut of_qemu) = (Vec::new(), 0);
    while at < end {
        match &head[at + 12..at + 16] {
            b"CORE" => vcpus.push(number(at + 20 + 32)),
            _ => of_qemu += 1,
        }
        at += 20 + number(at + 4) as usize;
    }
    assert_eq!(vcpus.len(), of_qemu);
    vcpus
}

#[test]
fn vcpus_come_and_go_as_the_guest_lets_go_of_them() {
    let Ok(kvm) = Kvm::open().map_err(test_skip::skip) else {
        return;
    };
    let (context, threads) = context();
    let signals = Arc::clone(&context.signals);
    let memory = GuestMemory::new(&Default::default(), 46).unwrap();
    let params = PcParams {
        cpus: CpusConfig {
            boot_vcpus: 1,
            max_vcpus: 4,
            ..CpusConfig::default()
        },
        ..params()
    };
    let mut pc = Pc::new(&kvm, memory, params, context).unwrap();
    // Paused: the added vCPUs wait for their start-up interrupt either way.
    pc.resize_vcpus(3).unwrap();
    for _ in 0..2 {
        assert_eq!(threads.recv().unwrap(), MachineThread::Vcpu);
    }
    pc.resize_vcpus(1).unwrap();
    let refused = pc.resize_vcpus(2).unwrap_err();
    assert!(matches!(refused, PcError::LeavingVcpus { count: 2 }));
    assert!(matches!(
        pc.state(),
        Err(PcError::LeavingVcpus { count: 2 })
    ));
    eject(&pc, 1);
    assert_eq!(signals.ejected.read().unwrap(), 1);
    pc.take_ejected_vcpus().unwrap();
    let refused = pc.resize_vcpus(2).unwrap_err();
    assert!(matches!(refused, PcError::LeavingVcpus { count: 1 }));
    eject(&pc, 2);
    // A second consecutive removal: one vCPU is new and one was present before.
    pc.resize_vcpus(4).unwrap();
    for _ in 0..3 {
        assert_eq!(threads.recv().unwrap(), MachineThread::Vcpu);
    }
    pc.resize_vcpus(2).unwrap();
    pc.pause().unwrap();
    // Linux releases vCPUs in any order.
    for (ejected, left) in [(2, vec![0, 1, 3]), (3, vec![0, 1])] {
        eject(&pc, ejected);
        assert_eq!(vcpus_of_core_file(&pc), left);
    }
    pc.resume();
    eject(&pc, 1);
    pc.take_ejected_vcpus().unwrap();
    assert_eq!(pc.chassis.cpu_hotplug.present(), 2);
    assert_eq!(pc.chassis.cpu_hotplug.refused_ejects(), 1);
    assert!(threads.try_recv().is_err());
}
