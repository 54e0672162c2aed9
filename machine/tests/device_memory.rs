//! Tests a bare-metal guest that touches the memory of a device whose file was truncated.
//!
//! Without a usable KVM the test prints the reason and passes without testing anything.
#![allow(clippy::unwrap_used)]

#[path = "boot/images.rs"]
#[allow(dead_code)]
mod images;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::config::{CpusConfig, MemoryConfig, PayloadConfig};
use hypervisor::Kvm;
use machine::boot::PayloadFiles;
use machine::cpu::guest_phys_bits;
use machine::memory::GuestMemory;
use machine::pc::{Pc, PcContext, PcParams, Plug};
use machine::pci::{Place, SegmentWeights};
use machine::signals::VmSignals;
use machine::threads::DeviceKind;
use virtio_devices::VirtioDevice;
use virtio_devices::pmem::{ALIGN_BYTES, Pmem, PmemParams};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use images::{LOAD_ADDRESS, PVH_NOTE, elf};

const DEADLINE: Duration = Duration::from_secs(60);

/// Page tables, each of one page: the root, the first 512 GiB, and the first two GiB.
const ROOT: u64 = 0x30_0000;
const UPPER: u64 = ROOT + 0x1000;
const LOW: u64 = ROOT + 0x2000;
const HIGH: u64 = ROOT + 0x3000;
/// A writable page table, and a writable page of 2 MiB.
const TABLE: u64 = 3;
const LARGE_PAGE: u64 = 0x83;
/// The pointer to the descriptor table, and the table.
const GDT_POINTER: u64 = ROOT + 0x4000;
const GDT: u64 = GDT_POINTER + 16;
const CODE_64: u64 = 0x00af_9b00_0000_ffff;

/// Enters long mode, as `boot.s` of the bare-metal guest, and reads the first word of the second GiB.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xb8, 0x00, 0x00, 0x30, 0x00,             // mov eax, ROOT
    0x0f, 0x22, 0xd8,                         // mov cr3, eax
    0x0f, 0x20, 0xe0,                         // mov eax, cr4
    0x83, 0xc8, 0x20,                         // or eax, PAE
    0x0f, 0x22, 0xe0,                         // mov cr4, eax
    0xb9, 0x80, 0x00, 0x00, 0xc0,             // mov ecx, EFER
    0x0f, 0x32,                               // rdmsr
    0x0d, 0x00, 0x01, 0x00, 0x00,             // or eax, LME
    0x0f, 0x30,                               // wrmsr
    0x0f, 0x20, 0xc0,                         // mov eax, cr0
    0x0d, 0x01, 0x00, 0x00, 0x80,             // or eax, PG | PE
    0x0f, 0x22, 0xc0,                         // mov cr0, eax
    0x0f, 0x01, 0x15, 0x00, 0x40, 0x30, 0x00, // lgdt [GDT_POINTER]
    0xea, 0x38, 0x00, 0x10, 0x00, 0x08, 0x00, // jmp 8:long
    // long: mov eax, [0x40000000]
    0xa1, 0x00, 0x00, 0x00, 0x40, 0x00, 0x00, 0x00, 0x00,
    0xeb, 0xfe,                               // jmp $
];

fn pc(kvm: &Kvm, memory: GuestMemory) -> Pc {
    let context = PcContext {
        signals: Arc::new(VmSignals::new().unwrap()),
        thread_start: Arc::new(|_| {}),
        events: Arc::new(|_| {}),
    };
    let params = PcParams {
        cpus: CpusConfig::default(),
        numa: Vec::new(),
        pci_segments: vec![SegmentWeights::default()],
        wished_slots: Vec::new(),
        iommu_segments: Vec::new(),
    };
    Pc::new(kvm, memory, params, context).unwrap()
}

#[test]
fn guest_that_touches_what_a_file_no_longer_has_is_stopped_and_the_device_is_named() {
    let Ok(kvm) = Kvm::open().map_err(test_skip::skip) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    std::fs::write(&kernel, elf(CODE, LOAD_ADDRESS, PVH_NOTE)).unwrap();
    let payload = PayloadConfig {
        kernel: Some(kernel),
        ..PayloadConfig::default()
    };
    let config = MemoryConfig {
        size: 64 << 20,
        ..MemoryConfig::default()
    };
    let bits = guest_phys_bits(&kvm, CpusConfig::default().max_phys_bits).unwrap();
    let memory = GuestMemory::new(&config, bits).unwrap();
    let payload = PayloadFiles::open(&payload).unwrap().load(&memory).unwrap();
    let mut pc = pc(&kvm, memory);
    assert!(!pc.may_run_out_of_memory());

    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(ALIGN_BYTES).unwrap();
    let pmem = Pmem::new(&PmemParams {
        id: "_pmem0".to_owned(),
        file: file.path().to_owned(),
        bytes: None,
        discard_writes: false,
    });
    let pmem = Arc::new(Mutex::new(pmem.unwrap()));
    pc.plug(Plug {
        id: "_pmem0".to_owned(),
        kind: DeviceKind::Pmem,
        place: Place::default(),
        device: pmem.clone(),
        dma: None,
    })
    .unwrap();
    assert!(pc.may_run_out_of_memory());
    let start = pmem.lock().unwrap().memory().unwrap().start.unwrap();
    let ram = pc.memory().ram().memory();
    for (address, entry) in [
        (ROOT, UPPER | TABLE),
        (UPPER, LOW | TABLE),
        (UPPER + 8, HIGH | TABLE),
        (LOW, LARGE_PAGE),
        (LOW + 8, (2 << 20) | LARGE_PAGE),
        (HIGH, start | LARGE_PAGE),
        (GDT_POINTER, GDT << 16 | 15),
        (GDT + 8, CODE_64),
    ] {
        ram.write_obj(entry, GuestAddress(address)).unwrap();
    }
    drop(ram);
    file.as_file().set_len(0).unwrap();

    pc.boot(&payload, None).unwrap();
    let booted = Instant::now();
    let failure = loop {
        if let Some(failure) = pc.memory_failure() {
            break failure;
        }
        assert!(booted.elapsed() < DEADLINE, "nothing was noticed");
        std::thread::yield_now();
    };
    // If KVM emulates the guest's code, it does not let the vCPU try again.
    let named = "memory of device _pmem0 that ";
    assert!(failure.reason.contains(named), "{failure:?}");
    assert_eq!(
        failure.can_continue,
        failure.reason.contains("vCPU 0 touched")
    );
    pc.pause().unwrap();
    if failure.can_continue {
        file.as_file().set_len(ALIGN_BYTES).unwrap();
        pc.resume();
    }
    pc.shutdown().unwrap();
    assert_eq!(pc.memory_failure(), None);
}
