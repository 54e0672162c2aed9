//! Runs payloads of a few instructions on this host's KVM, through loader and vCPU threads.
//!
//! Without a usable KVM the tests print the reason and pass without testing anything.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::config::{CpuAffinity, CpuTopology, CpusConfig, MemoryConfig, PayloadConfig};
use hypervisor::Kvm;
use machine::boot::PayloadFiles;
use machine::cpu::{CpuError, ExceptionPath, GuestEvent, Vcpus, VcpusContext, VmExitHandler};
use machine::memory::layout::{MIB, RSDP_START};
use machine::memory::{GuestMemory, RamSlots};
use machine::threads::MachineThread;
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::images::{LOAD_ADDRESS, PVH_NOTE, bzimage, elf};

const DEADLINE: Duration = Duration::from_secs(20);
const IOAPIC_PINS: u32 = 24;

/// jmp $
const SPIN: [u8; 2] = [0xeb, 0xfe];

#[derive(Debug, PartialEq, Eq)]
enum Access {
    Out(u16, Vec<u8>),
    Store(u64, Vec<u8>),
}

/// Records writes, and answers reads with 0x5a.
#[derive(Default)]
struct Recorder {
    accesses: Mutex<Vec<Access>>,
    reads: AtomicUsize,
}

impl Recorder {
    fn note(&self, access: Access) {
        self.accesses.lock().expect("no panic").push(access);
    }
}

impl VmExitHandler for Recorder {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        self.reads.fetch_add(1, Ordering::SeqCst);
        data.fill(0x5a);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.note(Access::Out(port, data.to_vec()));
    }
    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        self.reads.fetch_add(1, Ordering::SeqCst);
        data.fill(0x5a);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.note(Access::Store(address, data.to_vec()));
    }
    fn ioapic_eoi(&self, _vector: u8) {}
    fn lacks_ram(&self, _path: &ExceptionPath) -> bool {
        false
    }
}

struct Machine {
    // Drop order: threads first, then the parts that they use.
    vcpus: Vcpus,
    memory: GuestMemory,
    _slots: RamSlots,
    recorder: Arc<Recorder>,
    events: Receiver<GuestEvent>,
    threads: Arc<Mutex<Vec<String>>>,
}

fn kvm() -> Option<Kvm> {
    Kvm::open().map_err(test_skip::skip).ok()
}

/// A machine with the image loaded, not yet started.
fn machine(image: &[u8], cpus: &CpusConfig) -> Option<Machine> {
    let kvm = kvm()?;
    let file = NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), image).expect("a file");
    let memory = MemoryConfig {
        size: 16 * MIB,
        ..MemoryConfig::default()
    };
    let memory = GuestMemory::new(&memory, 46).expect("guest RAM");
    let vm = Arc::new(kvm.create_vm().expect("a machine"));
    vm.enable_split_irqchip(IOAPIC_PINS).expect("irqchip");
    let slots = memory.attach(&vm).expect("slots");
    let payload = PayloadConfig {
        kernel: Some(file.path().to_path_buf()),
        cmdline: Some("Q".into()),
        ..PayloadConfig::default()
    };
    let entry = PayloadFiles::open(&payload)
        .and_then(|files| files.load(&memory))
        .and_then(|payload| payload.write_boot_data(&memory, None, GuestAddress(RSDP_START)))
        .expect("a payload");

    let recorder = Arc::new(Recorder::default());
    let (sender, events): (Sender<GuestEvent>, _) = channel();
    let threads = Arc::new(Mutex::new(Vec::new()));
    let names = Arc::clone(&threads);
    let context = VcpusContext {
        handler: Arc::clone(&recorder) as Arc<dyn VmExitHandler>,
        events: Arc::new(move |event| sender.send(event).expect("the test listens")),
        thread_start: Arc::new(move |kind| {
            assert_eq!(kind, MachineThread::Vcpu);
            let name = std::thread::current().name().map(str::to_owned);
            names.lock().expect("no panic").extend(name);
        }),
    };
    let vcpus = Vcpus::new(&kvm, &vm, cpus, context).expect("vCPUs");
    vcpus.configure(entry).expect("registers");
    Some(Machine {
        vcpus,
        memory,
        _slots: slots,
        recorder,
        events,
        threads,
    })
}

fn cpus(count: u32) -> CpusConfig {
    CpusConfig {
        boot_vcpus: count,
        max_vcpus: count,
        ..CpusConfig::default()
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn run_pvh_payload_finds_start_info_and_devices() {
    #[rustfmt::skip]
    let code = [
        0x8b, 0x03,                         // mov eax, [ebx]           magic of the start info
        0x66, 0xba, 0x10, 0x05,             // mov dx, 0x510
        0xef,                               // out dx, eax
        0x8b, 0x73, 0x18,                   // mov esi, [ebx + 0x18]    command line
        0x8a, 0x06,                         // mov al, [esi]
        0xe6, 0x80,                         // out 0x80, al
        0xa1, 0x00, 0x00, 0xd0, 0xfe,       // mov eax, [0xfed00000]
        0xa3, 0x04, 0x00, 0xd0, 0xfe,       // mov [0xfed00004], eax
        0x0f, 0x0b,                         // ud2: no handler, so a triple fault
    ];
    let Some(mut machine) = machine(&elf(&code, LOAD_ADDRESS, PVH_NOTE), &cpus(1)) else {
        return;
    };
    machine.vcpus.start().unwrap();
    assert_eq!(
        machine.events.recv_timeout(DEADLINE).unwrap(),
        GuestEvent::Reset
    );
    machine.vcpus.stop().unwrap();
    assert_eq!(
        *machine.recorder.accesses.lock().unwrap(),
        [
            Access::Out(0x510, 0x336e_c578u32.to_le_bytes().to_vec()),
            Access::Out(0x80, b"Q".to_vec()),
            Access::Store(0xfed0_0004, vec![0x5a; 4]),
        ]
    );
    let counts = machine.vcpus.counters()[0].counts();
    assert_eq!(
        (counts.pio_out, counts.mmio_read, counts.mmio_write),
        (2, 1, 1)
    );
    assert_eq!(*machine.threads.lock().unwrap(), ["vcpu0"]);
    assert!(
        machine.events.try_recv().is_err(),
        "one event for one triple fault"
    );
}

#[test]
fn run_bzimage_payload_finds_its_zero_page() {
    #[rustfmt::skip]
    let code = [
        0x8b, 0x86, 0x02, 0x02, 0x00, 0x00, // mov eax, [esi + 0x202]
        0x66, 0xba, 0x10, 0x05,             // mov dx, 0x510
        0xef,                               // out dx, eax
        0x0f, 0x0b,                         // ud2
    ];
    let Some(mut machine) = machine(&bzimage(&code, 0x20f), &cpus(1)) else {
        return;
    };
    machine.vcpus.start().unwrap();
    assert_eq!(
        machine.events.recv_timeout(DEADLINE).unwrap(),
        GuestEvent::Reset
    );
    assert_eq!(
        *machine.recorder.accesses.lock().unwrap(),
        [Access::Out(0x510, b"HdrS".to_vec())]
    );
}

#[test]
fn pause_guest_that_computes_or_waits_stands_still() {
    let config = CpusConfig {
        topology: Some(CpuTopology {
            threads_per_core: 1,
            cores_per_die: 3,
            dies_per_package: 1,
            packages: 1,
        }),
        ..cpus(3)
    };
    let Some(mut machine) = machine(&elf(&SPIN, LOAD_ADDRESS, PVH_NOTE), &config) else {
        return;
    };
    machine.vcpus.start().unwrap();
    for _ in 0..3 {
        machine.vcpus.pause().unwrap();
        machine.vcpus.resume();
    }
    machine.vcpus.pause().unwrap();
    machine.vcpus.stop().unwrap();
    machine.vcpus.stop().unwrap();
    assert_eq!(machine.threads.lock().unwrap().len(), 3);
    assert!(machine.events.try_recv().is_err());
}

#[test]
fn brake_holds_a_guest_that_computes_and_releases_it_when_dropped() {
    #[rustfmt::skip]
    let code = [
        0xff, 0x05, 0x00, 0x00, 0x40, 0x00, // inc dword [0x400000]
        0xeb, 0xf8,                         // jmp to it
    ];
    let Some(mut machine) = machine(&elf(&code, LOAD_ADDRESS, PVH_NOTE), &cpus(1)) else {
        return;
    };
    let memory = machine.memory.clone();
    let count = || -> u32 {
        memory
            .ram()
            .memory()
            .read_obj(GuestAddress(0x40_0000))
            .unwrap()
    };
    machine.vcpus.start().unwrap();
    wait_until("the guest counts", || count() > 0);
    let brake = machine.vcpus.brake();
    for _ in 0..3 {
        brake.hold();
        // It is out of the guest once it has counted the exit and made no progress between two looks.
        wait_until("the guest stands still", || {
            let before = count();
            (0..1000).for_each(|_| std::thread::yield_now());
            count() == before
        });
        let held = count();
        brake.release();
        wait_until("the guest counts again", || count() != held);
    }
    // A pause works while the vCPUs are held, and a resume does not release them.
    brake.hold();
    machine.vcpus.pause().unwrap();
    let held = count();
    machine.vcpus.resume();
    assert_eq!(count(), held);
    drop(brake);
    wait_until("the guest counts after the brake", || count() != held);
    machine.vcpus.brake().hold();
    machine.vcpus.stop().unwrap();
}

#[test]
fn pause_guest_that_reads_ports_without_end_makes_no_more_accesses() {
    #[rustfmt::skip]
    let read_loop = [
        0xe4, 0x80,                         // in al, 0x80
        0xeb, 0xfc,                         // jmp back
    ];
    #[rustfmt::skip]
    let read_string = [
        0xb9, 0xff, 0xff, 0x0f, 0x00,       // mov ecx, 0xfffff
        0xbf, 0x00, 0x00, 0x20, 0x00,       // mov edi, 0x200000
        0xba, 0x80, 0x00, 0x00, 0x00,       // mov edx, 0x80
        0xf3, 0x6c,                         // rep insb
        0xeb, 0xed,                         // jmp back to the start
    ];
    for code in [&read_loop[..], &read_string[..]] {
        let Some(mut machine) = machine(&elf(code, LOAD_ADDRESS, PVH_NOTE), &cpus(1)) else {
            return;
        };
        let recorder = Arc::clone(&machine.recorder);
        let reads = || recorder.reads.load(Ordering::SeqCst);
        machine.vcpus.start().unwrap();
        for _ in 0..3 {
            let before = reads();
            wait_until("the guest reads", || reads() > before);
            machine.vcpus.pause().unwrap();
            let paused = reads();
            for _ in 0..1000 {
                std::thread::yield_now();
            }
            assert_eq!(reads(), paused, "a paused guest reads on");
            machine.vcpus.resume();
        }
        machine.vcpus.stop().unwrap();
    }
}

/// Without a handler, the interrupt causes a triple fault. The second vCPU was never started.
#[test]
fn nmi_reaches_the_vcpu_that_runs_and_leaves_others_asleep() {
    #[rustfmt::skip]
    let code = [
        0xe6, 0x80,                         // out 0x80, al
        0xeb, 0xfe,                         // jmp $
    ];
    let Some(mut machine) = machine(&elf(&code, LOAD_ADDRESS, PVH_NOTE), &cpus(2)) else {
        return;
    };
    machine.vcpus.start().unwrap();
    let recorder = Arc::clone(&machine.recorder);
    wait_until("the guest runs", || {
        !recorder.accesses.lock().unwrap().is_empty()
    });
    machine.vcpus.pause().unwrap();
    machine.vcpus.nmi();
    assert!(machine.events.try_recv().is_err(), "a paused vCPU ran");
    machine.vcpus.resume();
    assert_eq!(
        machine.events.recv_timeout(DEADLINE).unwrap(),
        GuestEvent::Reset
    );
    let wakes = || machine.vcpus.counters()[1].counts().interrupted;
    for _ in 0..1000 {
        std::thread::yield_now();
    }
    assert!(wakes() < 100, "{} wakes without an end", wakes());
    machine.vcpus.stop().unwrap();
}

#[test]
fn drop_running_machine_ends_its_threads() {
    let Some(mut machine) = machine(&elf(&SPIN, LOAD_ADDRESS, PVH_NOTE), &cpus(2)) else {
        return;
    };
    machine.vcpus.start().unwrap();
    let recorder = Arc::downgrade(&machine.recorder);
    drop(machine);
    assert!(
        recorder.upgrade().is_none(),
        "a vCPU thread still holds the buses"
    );
}

#[test]
fn start_affinity_of_no_such_host_cpu_leaves_nothing_running() {
    let config = CpusConfig {
        affinity: Some(vec![CpuAffinity {
            vcpu: 0,
            host_cpus: vec![1000],
        }]),
        ..cpus(1)
    };
    let Some(mut machine) = machine(&elf(&SPIN, LOAD_ADDRESS, PVH_NOTE), &config) else {
        return;
    };
    assert!(matches!(
        machine.vcpus.start(),
        Err(CpuError::Affinity { vcpu: 0, .. })
    ));
    let recorder = Arc::downgrade(&machine.recorder);
    drop(machine);
    assert!(recorder.upgrade().is_none());
}

#[test]
fn validate_bad_cpu_configurations_are_refused() {
    let Some(kvm) = kvm() else { return };
    let refused = |config: &CpusConfig| Vcpus::validate(&kvm, config).expect_err("refused");
    for (boot, max) in [(0, 1), (2, 1), (1, 1 << 20)] {
        let config = CpusConfig {
            boot_vcpus: boot,
            max_vcpus: max,
            ..CpusConfig::default()
        };
        assert!(matches!(refused(&config), CpuError::VcpuCount { .. }));
    }
    for (vcpu, host_cpus) in [(4, vec![0]), (0, vec![]), (0, vec![5000])] {
        let config = CpusConfig {
            affinity: Some(vec![CpuAffinity { vcpu, host_cpus }]),
            ..cpus(4)
        };
        assert!(matches!(refused(&config), CpuError::AffinityRange { .. }));
    }
}
