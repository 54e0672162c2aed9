//! Pauses and saves a bare-metal guest in the middle of its work. A new machine built from the saved states continues
//! and finishes the work; the memory itself is passed on.
//!
//! Without a usable KVM the test prints the reason and passes without testing anything.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use api::config::{CpusConfig, MemoryConfig};
use hypervisor::{Kvm, Vm};
use machine::boot::{BootProtocol, EntryPoint};
use machine::bus::Bus;
use machine::cpu::{
    ExceptionPath, GuestEvent, Vcpus, VcpusContext, VcpusState, VmExitHandler, guest_phys_bits,
};
use machine::interrupt::{GsiRouter, IOAPIC_PIN_COUNT, Ioapic, IoapicState};
use machine::legacy::{CMOS_PORTS, Cmos, CmosState, PM_TIMER_PORTS, PmTimer, PmTimerState};
use machine::memory::layout::{IOAPIC_BYTES, IOAPIC_START};
use machine::memory::{GuestMemory, MemoryState, RamSlots};
use state::Saved;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const DEADLINE: Duration = Duration::from_secs(60);
const CODE_ADDRESS: u64 = 0x10_0000;
const COUNT_PORT: u16 = 0x10;
const DONE_PORT: u16 = 0x14;
/// The guest's final count.
const LAST: u32 = 3000;
/// Written to the clock's RAM before the move, and read after it.
const MARK: u32 = 0x5a;

/// 32-bit code: writes a mark to the clock's RAM, counts in a register, in memory and on a port, and at the end reports
/// the mark.
const CODE: &[u8] = &[
    0xb0, 0x40, // mov al,0x40
    0xe6, 0x70, // out 0x70,al
    0xb0, 0x5a, // mov al,MARK
    0xe6, 0x71, // out 0x71,al
    0x31, 0xc9, // xor ecx,ecx
    0x41, // again: inc ecx
    0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // inc dword [0x200000]
    0xa1, 0x00, 0x00, 0x20, 0x00, // mov eax,[0x200000]
    0xe7, 0x10, // out COUNT_PORT,eax
    0x81, 0xf9, 0xb8, 0x0b, 0x00, 0x00, // cmp ecx,LAST
    0x75, 0xea, // jne again
    0x31, 0xc0, // xor eax,eax
    0xe4, 0x71, // in al,0x71
    0xe7, 0x14, // out DONE_PORT,eax
    0xeb, 0xfe, // jmp $
];

/// The guest's reports so far.
#[derive(Default)]
struct GuestReport {
    counts: Vec<u32>,
    done: Option<u32>,
}

/// The buses, and the ports through which the guest reports to the test.
struct Board {
    ports: Bus,
    mmio: Bus,
    told: Arc<(Mutex<GuestReport>, Condvar)>,
}

impl VmExitHandler for Board {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port.into(), data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        let word = || u32::from_le_bytes(data.try_into().unwrap());
        match port {
            COUNT_PORT => self.told.0.lock().unwrap().counts.push(word()),
            DONE_PORT => self.told.0.lock().unwrap().done = Some(word()),
            _ => {
                self.ports.write(port.into(), data);
            }
        }
        self.told.1.notify_all();
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.mmio.write(address, data);
    }
    fn ioapic_eoi(&self, _vector: u8) {}
    fn lacks_ram(&self, _path: &ExceptionPath) -> bool {
        false
    }
}

/// Drop order: the vCPUs before the memory they use.
struct Machine {
    vcpus: Vcpus,
    ioapic: Arc<Ioapic>,
    cmos: Arc<Cmos>,
    pm_timer: Arc<PmTimer>,
    _slots: RamSlots,
    _vm: Arc<Vm>,
}

/// The machine's state without its memory, as text.
struct SavedMachine(Vec<String>);

impl Machine {
    fn new(
        kvm: &Kvm,
        memory: &GuestMemory,
        timer: PmTimerState,
        told: &Arc<(Mutex<GuestReport>, Condvar)>,
    ) -> Self {
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.enable_split_irqchip(u32::from(IOAPIC_PIN_COUNT))
            .unwrap();
        let slots = memory.attach(&vm).unwrap();
        let router = Arc::new(GsiRouter::new(Arc::clone(&vm) as _));
        let ioapic = Arc::new(Ioapic::new(router));
        let cmos = Arc::new(Cmos::new(64 << 20, 0));
        let pm_timer = Arc::new(PmTimer::new());
        pm_timer.restore(timer);
        let board = Board {
            ports: Bus::new(),
            mmio: Bus::new(),
            told: Arc::clone(told),
        };
        board
            .mmio
            .insert(IOAPIC_START, IOAPIC_BYTES, ioapic.clone())
            .unwrap();
        machine::legacy::insert(&board.ports, CMOS_PORTS, cmos.clone()).unwrap();
        machine::legacy::insert(&board.ports, PM_TIMER_PORTS, pm_timer.clone()).unwrap();
        let context = VcpusContext {
            handler: Arc::new(board),
            events: Arc::new(|event: GuestEvent| println!("guest: {event:?}")),
            thread_start: Arc::new(|_| {}),
        };
        let vcpus = Vcpus::new(kvm, &vm, &CpusConfig::default(), context).unwrap();
        Self {
            vcpus,
            ioapic,
            cmos,
            pm_timer,
            _slots: slots,
            _vm: vm,
        }
    }

    fn save(mut self, memory: &GuestMemory) -> SavedMachine {
        self.vcpus.pause().unwrap();
        let states = [
            Saved::of(&memory.state()),
            Saved::of(&self.vcpus.state(&[0]).unwrap()),
            Saved::of(&self.ioapic.state()),
            Saved::of(&self.cmos.state()),
            Saved::of(&self.pm_timer.state()),
        ];
        let text = |state: &Saved| serde_json::to_string(state).unwrap();
        SavedMachine(states.iter().map(text).collect())
    }

    fn restore(
        kvm: &Kvm,
        memory: &GuestMemory,
        saved: &SavedMachine,
        told: &Arc<(Mutex<GuestReport>, Condvar)>,
    ) -> Self {
        let read = |at: usize| serde_json::from_str::<Saved>(&saved.0[at]).unwrap();
        memory
            .check_state(&read(0).read::<MemoryState>().unwrap())
            .unwrap();
        let mut machine = Self::new(kvm, memory, read(4).read().unwrap(), told);
        machine
            .ioapic
            .restore(&read(2).read::<IoapicState>().unwrap())
            .unwrap();
        machine
            .cmos
            .restore(&read(3).read::<CmosState>().unwrap())
            .unwrap();
        machine
            .vcpus
            .restore(&read(1).read::<VcpusState>().unwrap())
            .unwrap();
        machine
    }
}

fn wait(told: &(Mutex<GuestReport>, Condvar), what: &str, reached: impl Fn(&GuestReport) -> bool) {
    let end = Instant::now() + DEADLINE;
    let mut now = told.0.lock().unwrap();
    while !reached(&now) {
        let left = end.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "deadline passed waiting for {what}");
        now = told.1.wait_timeout(now, left).unwrap().0;
    }
}

#[test]
fn guest_saved_twice_at_work_finishes_in_a_third_machine() {
    let Ok(kvm) = Kvm::open().map_err(test_skip::skip) else {
        return;
    };
    let config = MemoryConfig {
        size: 64 << 20,
        ..MemoryConfig::default()
    };
    let phys_bits = guest_phys_bits(&kvm, CpusConfig::default().max_phys_bits).unwrap();
    let memory = GuestMemory::new(&config, phys_bits).unwrap();
    memory
        .ram()
        .memory()
        .write_slice(CODE, GuestAddress(CODE_ADDRESS))
        .unwrap();
    let told = Arc::<(Mutex<GuestReport>, Condvar)>::default();
    let timer = PmTimerState { elapsed_ns: 0 };

    let mut machine = Machine::new(&kvm, &memory, timer, &told);
    let entry = EntryPoint {
        protocol: BootProtocol::Pvh,
        address: CODE_ADDRESS,
    };
    machine.vcpus.configure(entry).unwrap();
    machine.vcpus.start().unwrap();
    for _ in 0..2 {
        let before = told.0.lock().unwrap().counts.len();
        wait(&told, "some work", |told| told.counts.len() > before + 50);
        let saved = machine.save(&memory);
        let at_pause = told.0.lock().unwrap().counts.len();
        assert!(at_pause < LAST as usize, "saved in the middle");
        machine = Machine::restore(&kvm, &memory, &saved, &told);
        assert_eq!(
            told.0.lock().unwrap().counts.len(),
            at_pause,
            "paused until resumed"
        );
        machine.vcpus.resume();
    }
    wait(&told, "the end", |told| told.done.is_some());
    let told = told.0.lock().unwrap();
    assert_eq!(
        told.counts,
        (1..=LAST).collect::<Vec<_>>(),
        "nothing lost, nothing twice"
    );
    assert_eq!(told.done, Some(MARK));
}
