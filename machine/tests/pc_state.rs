//! Saves a bare-metal guest in a whole PC in the middle of its work. The guest finishes the work in another PC with a
//! copy of its memory.
//!
//! Without a usable KVM the tests print the reason and pass without testing anything.
#![allow(clippy::unwrap_used)]

#[path = "boot/images.rs"]
#[allow(dead_code)]
mod images;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::config::{CpusConfig, HotplugMethod, MemoryConfig, PayloadConfig};
use hypervisor::{ClockState, Kvm, VcpuState};
use machine::boot::PayloadFiles;
use machine::cpu::{CpuHotplugState, VcpusState, guest_phys_bits};
use machine::interrupt::IoapicState;
use machine::legacy::{CmosState, GED_GENERATION, GedState, PmTimerState};
use machine::memory::layout::GENERATION_ID_START;
use machine::memory::{GuestMemory, MemoryHotplugState, MemoryState};
use machine::pc::{BarePc, Pc, PcContext, PcError, PcParams, PcState, Plug};
use machine::pci::{Bdf, HotplugState, PciBusState, Place, SegmentWeights};
use machine::serial::{Endpoint, EndpointMode, SerialManager, UartState};
use machine::signals::VmSignals;
use machine::threads::DeviceKind;
use state::{Part, Saved, State};
use virtio_devices::rng::Rng;
use virtio_devices::transport::VirtioPciState;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use images::{LOAD_ADDRESS, PVH_NOTE, elf};

const DEADLINE: Duration = Duration::from_secs(60);
/// The guest's final count.
const LAST: u32 = 5000;
const EVENT_VECTOR: usize = 0x41;

/// 32-bit code: enables the local APIC, routes the event device's interrupt to [`EVENT_VECTOR`], which it never takes,
/// counts in memory, and writes each count's low byte to the serial port.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00, // mov dword [0xfee000f0], 0x1ff
    0xc7, 0x05, 0x00, 0x00, 0xc0, 0xfe, 0x30, 0x00, 0x00, 0x00, // mov dword [0xfec00000], 0x10 + 2 * GED_IRQ
    0xc7, 0x05, 0x10, 0x00, 0xc0, 0xfe, 0x41, 0x00, 0x00, 0x00, // mov dword [0xfec00010], EVENT_VECTOR
    0x66, 0xba, 0xf8, 0x03,             // mov dx, 0x3f8
    0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // again: inc dword [0x200000]
    0xa1, 0x00, 0x00, 0x20, 0x00,       // mov eax, [0x200000]
    0xee,                               // out dx, al
    0x3d, 0x88, 0x13, 0x00, 0x00,       // cmp eax, LAST
    0x75, 0xed,                         // jne again
    0xeb, 0xfe,                         // jmp $
];

struct Rig {
    kvm: Kvm,
    manager: SerialManager,
    folder: tempfile::TempDir,
}

impl Rig {
    fn new() -> Option<Self> {
        Some(Self {
            kvm: Kvm::open().map_err(test_skip::skip).ok()?,
            manager: SerialManager::new(Arc::new(|_| {})).unwrap(),
            folder: tempfile::tempdir().unwrap(),
        })
    }

    fn memory(&self) -> GuestMemory {
        let config = MemoryConfig {
            size: 64 << 20,
            ..MemoryConfig::default()
        };
        let bits = guest_phys_bits(&self.kvm, CpusConfig::default().max_phys_bits).unwrap();
        GuestMemory::new(&config, bits).unwrap()
    }

    /// A machine with a serial port that writes to `output`.
    fn pc(&self, memory: GuestMemory, output: &Path) -> Pc {
        let context = PcContext {
            signals: Arc::new(VmSignals::new().unwrap()),
            thread_start: Arc::new(|_| {}),
            events: Arc::new(|_| {}),
        };
        let params = PcParams {
            cpus: CpusConfig::default(),
            numa: Vec::new(),
            pci_segments: vec![SegmentWeights::default(); 2],
            wished_slots: vec![Bdf {
                segment: 0,
                slot: 3,
            }],
            iommu_segments: Vec::new(),
        };
        let mut pc = Pc::new(&self.kvm, memory, params, context).unwrap();
        let mode = EndpointMode::File {
            path: output.to_path_buf(),
            bytes_max: None,
        };
        let endpoint = Endpoint::open(&mode, &self.manager).unwrap();
        pc.plug_serial(endpoint).unwrap();
        pc
    }

    /// A booted machine with two devices.
    fn booted(&self, output: &Path) -> Pc {
        let kernel = self.folder.path().join("kernel");
        std::fs::write(&kernel, elf(CODE, LOAD_ADDRESS, PVH_NOTE)).unwrap();
        let payload = PayloadConfig {
            kernel: Some(kernel),
            ..PayloadConfig::default()
        };
        let memory = self.memory();
        let payload = PayloadFiles::open(&payload).unwrap().load(&memory).unwrap();
        let mut pc = self.pc(memory, output);
        pc.plug(rng("_rng", 0, Some(3))).unwrap();
        pc.plug(rng("_other", 1, None)).unwrap();
        pc.plug_pvpanic().unwrap();
        pc.boot(&payload, None).unwrap();
        pc
    }

    /// Another machine in this state and with the memory of `from`, paused.
    fn restored(&self, from: &Pc, state: &PcState, output: &Path, is_moved: bool) -> Pc {
        let memory = self.memory();
        copy(from.memory(), &memory);
        let mut pc = self.pc(memory, output);
        // In a different order than at boot: the state determines the slots.
        pc.plug_restored(rng("_other", 1, None), state).unwrap();
        pc.plug_restored(rng("_rng", 0, None), state).unwrap();
        pc.restore_pvpanic(state).unwrap();
        pc.restore(state, is_moved).unwrap();
        pc
    }
}

fn rng(id: &str, segment: u16, slot: Option<u8>) -> Plug {
    Plug {
        id: id.to_owned(),
        kind: DeviceKind::Rng,
        place: Place { segment, slot },
        device: Arc::new(Mutex::new(Rng::new(id, File::open("/dev/zero").unwrap()))),
        dma: None,
    }
}

fn copy(from: &GuestMemory, to: &GuestMemory) {
    let (from, to) = (from.ram().memory(), to.ram().memory());
    for region in from.iter() {
        let mut bytes = vec![0; region.len() as usize];
        from.read_slice(&mut bytes, region.start_addr()).unwrap();
        to.write_slice(&bytes, region.start_addr()).unwrap();
    }
}

fn wait_for_bytes(path: &Path, count: u64) {
    let end = Instant::now() + DEADLINE;
    while std::fs::metadata(path).unwrap().len() < count {
        assert!(Instant::now() < end, "the guest wrote too little");
        std::thread::yield_now();
    }
}

/// The state after serialisation and deserialisation.
fn through_text(state: &PcState) -> PcState {
    let text = serde_json::to_string(&Saved::of(state)).unwrap();
    serde_json::from_str::<Saved>(&text)
        .unwrap()
        .read()
        .unwrap()
}

#[test]
fn guest_saved_at_work_finishes_in_another_pc() {
    let Some(rig) = Rig::new() else {
        return;
    };
    let outputs = ["first", "second"].map(|name| rig.folder.path().join(name));
    let mut first = rig.booted(&outputs[0]);
    wait_for_bytes(&outputs[0], 50);
    assert!(matches!(first.state(), Err(PcError::Cpu(_))), "not paused");
    first.pause().unwrap();
    let state = through_text(&first.state().unwrap());
    let map: MemoryState = state.memory.read().unwrap();
    rig.memory().check_state(&map).unwrap();
    let mut second = rig.restored(&first, &state, &outputs[1], false);
    drop(first);
    let written = std::fs::read(&outputs[0]).unwrap();
    assert!(written.len() < LAST as usize, "saved in the middle");

    let again = second.state().unwrap();
    let without_time = |state: &PcState| PcState {
        // The time stamp counter and the timer count on, and the guest has a new generation.
        vcpus: state.memory.clone(),
        pm_timer: state.memory.clone(),
        ged: state.memory.clone(),
        ..state.clone()
    };
    assert_eq!(without_time(&again), without_time(&state));
    assert_eq!(std::fs::metadata(&outputs[1]).unwrap().len(), 0, "paused");
    second.resume();
    wait_for_bytes(&outputs[1], u64::from(LAST) - written.len() as u64);
    let all = [written, std::fs::read(&outputs[1]).unwrap()].concat();
    let counted: Vec<u8> = (1..=LAST).map(|count| count as u8).collect();
    assert_eq!(all, counted, "nothing lost, nothing twice");
}

const MSR_TSC: u32 = 0x10;

/// The clock and the first time stamp counter of a state, and the counter's frequency.
fn times(state: &PcState) -> (ClockState, u64, u64) {
    let vcpus: VcpusState = state.vcpus.read().unwrap();
    let vcpu: VcpuState = vcpus.vcpus[0].state.read().unwrap();
    let tsc = vcpu.msrs.iter().find(|msr| msr.index == MSR_TSC).unwrap();
    let khz = u64::from(vcpu.tsc_khz.unwrap_or(0));
    (vcpus.clock.read().unwrap(), tsc.data, khz)
}

/// Whether this host lets guests have another time stamp counter than its own. Some nested hosts do not.
fn sets_tsc(kvm: &Kvm) -> bool {
    const FAR: u64 = 1 << 50;
    let vcpu = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
    let read = || vcpu.msrs(&[MSR_TSC]).unwrap()[0];
    let mut tsc = read();
    tsc.data += FAR;
    vcpu.set_msrs(&[tsc]).unwrap();
    read().data >= tsc.data
}

/// `state` as if it had been saved `ns` earlier, or by a version that did not know when.
fn saved_earlier(state: &PcState, ns: Option<u64>) -> PcState {
    let mut vcpus: VcpusState = state.vcpus.read().unwrap();
    let mut clock: ClockState = vcpus.clock.read().unwrap();
    clock.realtime_ns = ns.map(|ns| clock.realtime_ns.unwrap() - ns);
    vcpus.clock = Saved::of(&clock);
    PcState {
        vcpus: Saved::of(&vcpus),
        ..state.clone()
    }
}

/// The time that passed on each of the guest's clocks between two states.
struct Passed {
    clock_ns: u64,
    /// None if this host does not let a guest have its own counter.
    tsc_ns: Option<u64>,
    pm_timer_ns: u64,
}

impl Passed {
    fn between(kvm: &Kvm, earlier: &PcState, later: &PcState) -> Self {
        let ((clock, tsc, khz), (later_clock, later_tsc, _)) = (times(earlier), times(later));
        let ns =
            |ticks: u64| u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(khz)).unwrap();
        let pm_timer = |state: &PcState| state.pm_timer.read::<PmTimerState>().unwrap().elapsed_ns;
        Self {
            clock_ns: later_clock.clock_ns - clock.clock_ns,
            tsc_ns: (khz > 0 && sets_tsc(kvm)).then(|| ns(later_tsc - tsc)),
            pm_timer_ns: pm_timer(later) - pm_timer(earlier),
        }
    }

    /// A guest compares them and gives up one that differs from another.
    fn expect_the_same(&self) {
        // Linux compares clock and counter twice per second, and tolerates a few hundred microseconds.
        const TSC_MAX_NS: u64 = 300_000;
        // It is read once, so that the test may be interrupted between it and the clock.
        const PM_TIMER_MAX_NS: u64 = 500_000_000;
        let apart = |ns: u64| ns.abs_diff(self.clock_ns);
        if let Some(tsc_ns) = self.tsc_ns {
            assert!(apart(tsc_ns) < TSC_MAX_NS, "{} ns", apart(tsc_ns));
        }
        let pm_timer = apart(self.pm_timer_ns);
        assert!(pm_timer < PM_TIMER_MAX_NS, "{pm_timer} ns");
    }
}

#[test]
fn clocks_advance_equally_during_a_pause_and_between_a_save_and_its_restore() {
    const HOUR_NS: u64 = 3_600_000_000_000;
    // Longer than this test takes.
    const SLACK_NS: u64 = HOUR_NS / 2;
    let Some(rig) = Rig::new() else {
        return;
    };
    let outputs = ["first", "second"].map(|name| rig.folder.path().join(name));
    let mut first = rig.booted(&outputs[0]);
    wait_for_bytes(&outputs[0], 50);
    first.pause().unwrap();
    let state = first.state().unwrap();
    let passed = |later: &PcState| Passed::between(&rig.kvm, &state, later);
    // Saving took longer than the difference that is permitted.
    first.resume();
    first.pause().unwrap();
    let again = passed(&first.state().unwrap());
    assert!(again.clock_ns > 0);
    again.expect_the_same();

    let restored = |state: &PcState| {
        let mut pc = rig.restored(&first, state, &outputs[1], true);
        pc.resume();
        pc.pause().unwrap();
        passed(&pc.state().unwrap())
    };
    let later = restored(&saved_earlier(&state, Some(HOUR_NS)));
    let hour = HOUR_NS..HOUR_NS + SLACK_NS;
    assert!(hour.contains(&later.clock_ns), "{}", later.clock_ns);
    later.expect_the_same();
    let later = restored(&saved_earlier(&state, None));
    assert!(later.clock_ns < SLACK_NS, "{}", later.clock_ns);
    later.expect_the_same();
}

/// The guest's interrupt for events has arrived and is not taken yet.
fn event_is_pending(state: &PcState) -> bool {
    let vcpus: VcpusState = state.vcpus.read().unwrap();
    let vcpu: VcpuState = vcpus.vcpus[0].state.read().unwrap();
    // Interrupt request register: 32 bits every 16 bytes.
    let byte = vcpu.lapic.0[0x200 + EVENT_VECTOR / 32 * 16 + EVENT_VECTOR % 32 / 8];
    byte & 1 << (EVENT_VECTOR % 8) != 0
}

fn generation_id(pc: &Pc) -> [u8; 16] {
    let ram = pc.memory().ram().memory();
    ram.read_obj(GuestAddress(GENERATION_ID_START)).unwrap()
}

#[test]
fn guest_restored_twice_has_two_new_generations_and_is_notified() {
    let Some(rig) = Rig::new() else {
        return;
    };
    let outputs = ["first", "second"].map(|name| rig.folder.path().join(name));
    let mut first = rig.booted(&outputs[0]);
    wait_for_bytes(&outputs[0], 50);
    first.pause().unwrap();
    let state = through_text(&first.state().unwrap());
    let mut seen = vec![generation_id(&first)];
    assert_ne!(seen[0], [0; 16]);
    assert!(!event_is_pending(&state));
    let restored = |state: &PcState| {
        let pc = rig.restored(&first, state, &outputs[1], false);
        let id = generation_id(&pc);
        let state = pc.state().unwrap();
        let events: GedState = state.ged.read().unwrap();
        (id, events.pending, event_is_pending(&state), state)
    };
    for _ in 0..2 {
        let (id, events, interrupted, again) = restored(&state);
        assert!(!seen.contains(&id), "{id:?} of {seen:?}");
        assert_eq!(events, GED_GENERATION);
        assert!(interrupted);
        assert!(again.has_generation_id);
        seen.push(id);
    }

    // The tables of a guest of then lack the device: its RAM stays as it is.
    let mut text = serde_json::to_value(Saved::of(&state)).unwrap();
    let fields = text.as_object_mut().unwrap();
    fields.insert("version".to_owned(), 2.into());
    fields.remove("has_generation_id");
    let old: Saved = serde_json::from_value(text).unwrap();
    let (id, events, interrupted, again) = restored(&old.read().unwrap());
    assert_eq!((id, events), (seen[0], 0));
    assert!(!interrupted && !again.has_generation_id);
}

/// The memory that a debugger finds by the program headers.
#[test]
fn core_file_has_the_ram_that_is_there_and_the_registers() {
    let Some(rig) = Rig::new() else {
        return;
    };
    let output = rig.folder.path().join("serial");
    let mut pc = rig.booted(&output);
    wait_for_bytes(&output, 50);
    let core = File::create_new(rig.folder.path().join("core")).unwrap();
    assert!(pc.write_core(&core).is_err(), "not paused");
    pc.pause().unwrap();
    pc.write_core(&core).unwrap();

    let path = rig.folder.path().join("core");
    let bytes = std::fs::read(&path).unwrap();
    let number = |at: usize, count: usize| {
        let mut value = [0; 8];
        value[..count].copy_from_slice(&bytes[at..at + count]);
        u64::from_le_bytes(value) as usize
    };
    assert_eq!(bytes[..6], *b"\x7fELF\x02\x01");
    // A core file of x86-64, with program headers of 56 bytes.
    assert_eq!([16, 18, 54, 56].map(|at| number(at, 2)), [4, 62, 56, 2]);
    let header = |index: usize| {
        let at = number(32, 8) + index * 56;
        [
            number(at, 4),
            number(at + 8, 8),
            number(at + 24, 8),
            number(at + 40, 8),
        ]
    };
    let [kind, notes, _, notes_bytes] = header(0);
    assert_eq!((kind, notes_bytes), (4, 20 + 336 + 20 + 440));
    let [kind, ram, address, ram_bytes] = header(1);
    assert_eq!((kind, address, ram_bytes), (1, 0, 64 << 20));
    assert_eq!(bytes.len(), ram + ram_bytes);
    let count: u32 = pc
        .memory()
        .ram()
        .memory()
        .read_obj(vm_memory::GuestAddress(0x20_0000))
        .unwrap();
    assert_eq!(number(ram + 0x20_0000, 4), count as usize);
    assert!(count >= 50);

    let name = |at: usize| String::from_utf8_lossy(&bytes[at + 12..at + 16]).into_owned();
    let qemu = notes + 20 + 336;
    assert_eq!((name(notes), number(notes + 8, 4)), ("CORE".to_owned(), 1));
    assert_eq!((name(qemu), number(qemu + 8, 4)), ("QEMU".to_owned(), 0));
    // The guest's loop: 32-bit code, without paging.
    let code = LOAD_ADDRESS as usize..LOAD_ADDRESS as usize + 0x1000;
    let (prstatus, state) = (notes + 20, qemu + 20);
    let (rip, qemu_rip) = (
        number(prstatus + 112 + 16 * 8, 8),
        number(state + 8 + 16 * 8, 8),
    );
    assert!(
        code.contains(&rip) && rip == qemu_rip,
        "{rip:#x} {qemu_rip:#x}"
    );
    assert_eq!(number(state, 4), 1);
    assert_eq!(number(state + 4, 4), 440);
    assert_eq!(number(state + 392, 8) & 1, 1, "protected mode");

    use std::os::unix::fs::MetadataExt;
    let allocated = std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(
        allocated < 4 << 20,
        "{allocated} bytes of a guest that touched little"
    );
    pc.resume();
}

#[test]
fn nmi_requested_in_a_pause_is_saved_with_the_guest() {
    let Some(rig) = Rig::new() else {
        return;
    };
    let outputs = ["first", "second"].map(|name| rig.folder.path().join(name));
    let pending = |state: &PcState| {
        let vcpus: VcpusState = state.vcpus.read().unwrap();
        let vcpu: VcpuState = vcpus.vcpus[0].state.read().unwrap();
        vcpu.events.nmi.pending
    };
    let mut first = rig.booted(&outputs[0]);
    wait_for_bytes(&outputs[0], 50);
    first.pause().unwrap();
    assert_eq!(pending(&first.state().unwrap()), 0);
    first.nmi();
    let state = through_text(&first.state().unwrap());
    assert_eq!(pending(&state), 1);
    let memory = rig.memory();
    copy(first.memory(), &memory);
    drop(first);

    let mut second = rig.pc(memory, &outputs[1]);
    second.plug_restored(rng("_rng", 0, None), &state).unwrap();
    second
        .plug_restored(rng("_other", 0, None), &state)
        .unwrap();
    second.restore_pvpanic(&state).unwrap();
    second.restore(&state, false).unwrap();
    assert_eq!(pending(&second.state().unwrap()), 1);
}

#[test]
fn vcpus_that_this_host_cannot_continue_are_refused_with_what_it_lacks() {
    let Some(rig) = Rig::new() else {
        return;
    };
    let output = rig.folder.path().join("serial");
    let mut pc = rig.booted(&output);
    wait_for_bytes(&output, 50);
    pc.pause().unwrap();
    let state = pc.state().unwrap();
    let new = rig.pc(rig.memory(), &rig.folder.path().join("unused"));
    let new = BarePc::new(&rig.kvm, new).unwrap();
    new.check(&state).unwrap();

    let mut vcpus: VcpusState = state.vcpus.read().unwrap();
    let mut vcpu: VcpuState = vcpus.vcpus[0].state.read().unwrap();
    for leaf in &mut vcpu.cpuid {
        match leaf.function {
            0 => leaf.ebx ^= 1,
            // A reserved bit that no processor sets.
            1 => leaf.edx |= 1 << 10,
            _ => {}
        }
    }
    vcpus.vcpus[0].state = Saved::of(&vcpu);
    let other = PcState {
        vcpus: Saved::of(&vcpus),
        ..state
    };
    let told = new.check(&other).unwrap_err().to_string();
    for expected in ["CPUID 0x0.0 ebx", "CPUID 0x1.0 edx: bits 0x400 are missing"] {
        assert!(told.contains(expected), "{told}");
    }
}

#[test]
fn state_of_a_machine_with_other_devices_is_refused_by_name() {
    let Some(rig) = Rig::new() else {
        return;
    };
    let output = rig.folder.path().join("serial");
    let mut pc = rig.booted(&output);
    pc.pause().unwrap();
    let state = pc.state().unwrap();
    let told = |error: PcError| api::error_line(&error);

    let mut other = rig.pc(rig.memory(), &output);
    let unknown = other
        .plug_restored(rng("_third", 0, None), &state)
        .unwrap_err();
    assert!(told(unknown).contains("_third"));
    other.plug_restored(rng("_rng", 0, None), &state).unwrap();
    let twice = other
        .plug_restored(rng("_rng", 0, None), &state)
        .unwrap_err();
    assert!(told(twice).contains("slot 3"));
    other.restore_pvpanic(&state).unwrap();
    let missing = other.restore(&state, false).unwrap_err();
    assert!(told(missing).contains("_other"));

    let leaving = pc.devices()[0].clone();
    pc.request_removal(&leaving).unwrap();
    let refused = pc.state().unwrap_err();
    assert!(told(refused).contains("_rng is being removed"));
}

/// Environment variable: write a sample of the current versions if there is none yet.
const WRITE_SAMPLES: &str = "WRITE_STATE_SAMPLES";

fn sample(ordinal: u32) -> PathBuf {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/samples");
    samples.join(format!("pc-{ordinal}.json"))
}

/// A part's state in a sample.
struct Sampled {
    part: Part,
    version: u32,
    /// This version would write the same.
    is_current: bool,
}

impl Sampled {
    fn read<S: State>(saved: &Saved) -> (Self, S) {
        let version = &serde_json::to_value(saved).unwrap()["version"];
        let state: S = saved.read().unwrap();
        let sampled = Self {
            part: S::PART,
            version: version.as_u64().unwrap() as u32,
            is_current: Saved::of(&state) == *saved,
        };
        (sampled, state)
    }

    fn of<S: State>(saved: &Saved) -> Self {
        Self::read::<S>(saved).0
    }
}

/// Every part of a machine, in each of its envelopes.
fn sampled(saved: &Saved) -> Vec<Sampled> {
    let (whole, pc) = Sampled::read::<PcState>(saved);
    let (all_vcpus, vcpus) = Sampled::read::<VcpusState>(&pc.vcpus);
    let mut parts = vec![
        whole,
        all_vcpus,
        Sampled::of::<ClockState>(&vcpus.clock),
        Sampled::of::<VcpuState>(&vcpus.vcpus[0].state),
        Sampled::of::<MemoryState>(&pc.memory),
        Sampled::of::<IoapicState>(&pc.ioapic),
        Sampled::of::<PciBusState>(&pc.pci_bus),
        Sampled::of::<HotplugState>(&pc.pci_hotplug),
        Sampled::of::<UartState>(pc.serial.as_ref().unwrap()),
        Sampled::of::<CmosState>(&pc.cmos),
        Sampled::of::<PmTimerState>(&pc.pm_timer),
        Sampled::of::<GedState>(&pc.ged),
    ];
    parts.extend(pc.devices.values().map(Sampled::of::<VirtioPciState>));
    parts.extend(pc.cpu_hotplug.as_ref().map(Sampled::of::<CpuHotplugState>));
    let memory_hotplug = pc.memory_hotplug.as_ref();
    parts.extend(memory_hotplug.map(Sampled::of::<MemoryHotplugState>));
    parts
}

/// The state of a machine that has every part.
fn state_of_each_part() -> Option<PcState> {
    let rig = Rig::new()?;
    let config = MemoryConfig {
        size: 64 << 20,
        hotplug_method: HotplugMethod::Acpi,
        hotplug_size: Some(128 << 20),
        ..MemoryConfig::default()
    };
    let bits = guest_phys_bits(&rig.kvm, CpusConfig::default().max_phys_bits).unwrap();
    let memory = GuestMemory::new(&config, bits).unwrap();
    let mut pc = rig.pc(memory, &rig.folder.path().join("serial"));
    pc.plug(rng("_rng", 0, Some(3))).unwrap();
    pc.plug_pvpanic().unwrap();
    pc.pause().unwrap();
    Some(pc.state().unwrap())
}

#[test]
fn committed_samples_have_each_part_in_its_oldest_and_newest_version() {
    let mut ordinal = 1;
    let mut newest = Vec::new();
    while let Ok(text) = std::fs::read_to_string(sample(ordinal)) {
        newest = sampled(&serde_json::from_str(&text).unwrap());
        if ordinal == 1 {
            let older = newest.iter().find(|it| it.version != it.part.oldest);
            assert!(older.is_none(), "{:?}", older.map(|it| it.part));
        }
        ordinal += 1;
    }
    let other = newest.iter().filter(|it| !it.is_current);
    let other: Vec<_> = other.map(|it| it.part.name).collect();
    if other.is_empty() && !newest.is_empty() {
        return;
    }
    assert!(
        std::env::var_os(WRITE_SAMPLES).is_some(),
        "no sample has the shape that is written today: give {other:?} another version, then add a sample with \
         {WRITE_SAMPLES}=1"
    );
    let state = state_of_each_part().unwrap();
    let text = serde_json::to_string(&Saved::of(&state)).unwrap();
    std::fs::write(sample(ordinal), text + "\n").unwrap();
}
