//! Simulates vCPUs that move BARs and eject functions, while the host plugs functions in and requests their removal.
//!
//! Afterwards the bus must be consistent:
//!
//! * a decoded BAR is mapped, unless it is outside the windows or at the place of another one;
//! * nothing else is mapped, and there are no other doorbells;
//! * the guest has ejected only functions whose removal was requested;
//! * a saved state can be restored;
//! * removed functions leave no address, doorbell or interrupt behind.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use ::state::Saved;
use virtio_devices::Unpoisoned;
use virtio_devices::pci::PciFunction;
use virtio_devices::rng::Rng;
use virtio_devices::testing::TestRam;
use virtio_devices::testing::fuzz_input::Input;
use virtio_devices::transport::{VirtioPciFunction, VirtioPciParams, vectors_needed};
use virtio_devices::{GuestRam, VirtioDevice};

use super::plain_function::{NARROW_BYTES, PlainFunction, WIDE_BYTES};
use crate::bus::{Bus, BusDevice};
use crate::interrupt::fake::FakeBackend;
use crate::interrupt::{FunctionVectors, GsiRouter};
use crate::pc::{PVPANIC_ID, PvpanicFunction};
use crate::pci::fake_doorbells::FakeDoorbells;
use crate::pci::{
    Bdf, CONFIG_PORT_BASE, CONFIG_PORT_BYTES, ConfigPorts, DoorbellBackend, ECAM_BYTES, Ecam,
    EjectSink, HOTPLUG_BYTES, HotplugController, PciSegments, Place, SLOT_COUNT, SegmentWeights,
};

/// Maximum number of steps of each vCPU and of the host; further bytes are ignored.
const STEPS_MAX: usize = 64;
const VCPUS: usize = 2;
const SEGMENTS: u16 = 2;
/// Few slots and few places for BARs, so that steps meet.
const SLOTS: u8 = 6;
const PLACES: u8 = 8;
const MMIO32: Range<u64> = 0xc000_0000..0xc010_0000;
const MMIO64: Range<u64> = 0x1_0000_0000..0x1_0100_0000;
const ECAM: [u64; SEGMENTS as usize] = [0xe800_0000, 0xe810_0000];
const HOTPLUG: u64 = 0xf000_0000;
const RAM_BYTES: usize = 1 << 20;
const COMMAND: u64 = 4;
const BAR_REGISTERS: u64 = 0x10;

/// Figures of a run, for checks that the bytes reach what they should.
#[derive(Debug, Default, Clone, Copy)]
pub struct Seen {
    /// BARs that could not be mapped.
    pub unmapped_bars: u64,
    /// Functions that the guest ejected.
    pub ejected: usize,
    /// Ejections without a request.
    pub refused_ejects: u64,
    /// Times that the host plugged pvpanic.
    pub pvpanics: usize,
}

/// Runs the steps that the bytes describe.
///
/// # Panics
/// The bus is inconsistent.
pub fn run(bytes: &[u8]) -> Seen {
    thread_local! {
        static RAM: TestRam = TestRam::new(RAM_BYTES);
    }
    let mut input = Input(bytes);
    let mode = input.byte();
    let rig = Rig::new(RAM.with(TestRam::mem));
    let mut host = Host::default();
    for _ in 0..mode >> 6 {
        rig.host_step(&mut host, &mut input);
    }
    // One part for each vCPU and one for the host.
    let share = input.0.len().div_ceil(VCPUS + 1).max(1);
    let mut parts = input.0.chunks(share);
    let mut host_part = Input(parts.next().unwrap_or_default());
    let mut vcpus: Vec<_> = parts.map(Input).collect();
    if mode.is_multiple_of(4) {
        std::thread::scope(|scope| {
            for input in vcpus {
                let rig = &rig;
                scope.spawn(move || rig.vcpu_steps(input));
            }
            for _ in 0..STEPS_MAX {
                rig.host_step(&mut host, &mut host_part);
            }
        });
    } else {
        // In turns, which is faster, and repeats exactly.
        for _ in 0..STEPS_MAX {
            vcpus.iter_mut().for_each(|input| rig.vcpu_step(input));
            rig.host_step(&mut host, &mut host_part);
        }
    }
    rig.check(&host);
    rig.check_restore();
    let seen = Seen {
        unmapped_bars: rig
            .segments
            .buses()
            .iter()
            .map(|bus| bus.unmapped_bars())
            .sum(),
        ejected: host.ejected,
        refused_ejects: rig.hotplug.refused_ejects(),
        pvpanics: host.pvpanics,
    };
    rig.remove_all(host);
    seen
}

/// A function as the thread that owns the machine knows it.
struct Plugged {
    bdf: Bdf,
    function: Arc<dyn PciFunction>,
    /// Its removal was requested.
    leaves: bool,
}

/// The state that that thread keeps.
#[derive(Default)]
struct Host {
    added: u64,
    ejected: usize,
    pvpanics: usize,
    plugged: Vec<Plugged>,
}

struct Rig {
    mmio: Arc<Bus>,
    ports: Bus,
    config_ports: Arc<ConfigPorts>,
    segments: PciSegments,
    hotplug: Arc<HotplugController>,
    doorbells: Arc<FakeDoorbells>,
    router: Arc<GsiRouter>,
    interrupts: Arc<FakeBackend>,
    ram: GuestRam,
    /// The functions with only a configuration space, by id.
    plain: Mutex<BTreeMap<String, Arc<PlainFunction>>>,
    /// The latest one, of which the bus has at most one.
    pvpanic: Mutex<Option<Arc<PvpanicFunction>>>,
}

impl Rig {
    fn new(ram: GuestRam) -> Self {
        let mmio = Arc::new(Bus::new());
        let ports = Bus::new();
        let doorbells = Arc::new(FakeDoorbells::default());
        let backend = Arc::clone(&doorbells) as Arc<dyn DoorbellBackend>;
        let weights = [SegmentWeights::default(); SEGMENTS as usize];
        let segments = PciSegments::new(&weights, &mmio, &MMIO32, &MMIO64, &backend);
        let segments = segments.expect("the windows have room");
        let sink: EjectSink = Arc::new(|| {});
        let hotplug = Arc::new(HotplugController::new(&segments, sink));
        let place = |base, bytes, device: Arc<dyn BusDevice>| {
            mmio.insert(base, bytes, device).expect("fixed places");
        };
        for (base, bus) in ECAM.into_iter().zip(segments.buses()) {
            place(base, ECAM_BYTES, Arc::new(Ecam::new(bus)));
        }
        place(HOTPLUG, HOTPLUG_BYTES, Arc::clone(&hotplug) as _);
        let config_ports = Arc::new(ConfigPorts::new(Arc::clone(&segments.buses()[0])));
        let device = Arc::clone(&config_ports) as Arc<dyn BusDevice>;
        ports
            .insert(CONFIG_PORT_BASE, CONFIG_PORT_BYTES, device)
            .expect("an empty bus");
        let interrupts = Arc::new(FakeBackend::default());
        Self {
            mmio,
            ports,
            config_ports,
            segments,
            hotplug,
            doorbells,
            router: Arc::new(GsiRouter::new(Arc::clone(&interrupts) as _)),
            interrupts,
            ram,
            plain: Mutex::default(),
            pvpanic: Mutex::default(),
        }
    }

    fn vcpu_steps(&self, mut input: Input<'_>) {
        for _ in 0..STEPS_MAX {
            self.vcpu_step(&mut input);
        }
    }

    fn vcpu_step(&self, input: &mut Input<'_>) {
        if input.is_empty() {
            return;
        }
        let choice = input.byte();
        let segment = usize::from(choice >> 7);
        let slot = u64::from(choice >> 4) % u64::from(SLOTS);
        let config = ECAM[segment] + (slot << 15);
        match choice % 16 {
            // A command that decodes memory, or not.
            0 | 1 => self.write(config + COMMAND, u64::from(input.byte() & 7), 2),
            2..=6 => {
                let register = BAR_REGISTERS + u64::from(input.byte() % 4) * 4;
                let value = self.place(input);
                // The high half of a BAR, or the low one.
                let value = if register == 0x1c { value >> 32 } else { value };
                self.write(config + register, value, 4);
            }
            7 => {
                let offset = input.number(2) % 0x1000;
                let bytes = usize::from(input.byte() % 9);
                self.write(config + offset, input.number(8), bytes);
                self.mmio.read(config + offset, &mut [0; 8][..bytes]);
            }
            8 => {
                let address = u64::from(input.byte()) << 24 | input.number(3);
                self.ports
                    .write(CONFIG_PORT_BASE, &(address as u32).to_le_bytes());
                let port = CONFIG_PORT_BASE + u64::from(input.byte() % 8);
                let mut data = input.number(8).to_le_bytes();
                let data = &mut data[..usize::from(choice >> 4) % 9];
                self.ports.write(port, data);
                self.ports.read(port, data);
            }
            9 => {
                let mut data = [0; 8];
                let port = CONFIG_PORT_BASE + u64::from(input.byte() % 8);
                self.ports
                    .read(port, &mut data[..usize::from(choice >> 4) % 9]);
            }
            10 | 11 => {
                let address = self.place(input).wrapping_add(input.number(2) % WIDE_BYTES);
                self.write(address, input.number(8), usize::from(choice >> 4) % 9);
            }
            12 => {
                let mut data = [0; 8];
                let address = self.place(input).wrapping_add(input.number(2) % WIDE_BYTES);
                self.mmio
                    .read(address, &mut data[..usize::from(choice >> 4) % 9]);
            }
            13 => {
                let mut data = [0; 4];
                let register = u64::from(input.byte() % 4) * 4;
                self.mmio.read(HOTPLUG + register, &mut data);
            }
            14 => {
                self.write(HOTPLUG + 0xc, u64::from(choice >> 7), 4);
                // Slots of those that there are, and more.
                self.write(HOTPLUG + 8, input.number(2), 4);
            }
            _ => {
                let register = input.number(1) % HOTPLUG_BYTES;
                let bytes = usize::from(choice >> 4) % 9;
                self.write(HOTPLUG + register, input.number(4), bytes);
            }
        }
    }

    fn write(&self, address: u64, value: u64, bytes: usize) {
        self.mmio.write(address, &value.to_le_bytes()[..bytes]);
    }

    /// An address where a BAR may be, and sometimes any other.
    fn place(&self, input: &mut Input<'_>) -> u64 {
        let choice = input.byte();
        let place = u64::from(choice % PLACES);
        match choice >> 5 {
            0..=2 => MMIO32.start + place * u64::from(NARROW_BYTES),
            3..=5 => MMIO64.start + place * WIDE_BYTES,
            6 => MMIO32.end - WIDE_BYTES + place * u64::from(NARROW_BYTES),
            _ => input.number(8),
        }
    }

    fn host_step(&self, host: &mut Host, input: &mut Input<'_>) {
        if input.is_empty() {
            return;
        }
        let choice = input.byte();
        let segment = u16::from(choice >> 7);
        match choice % 8 {
            0..=2 => {
                let slot = (choice & 0x40 != 0).then(|| input.byte() % (SLOTS + 1));
                self.add(host, Place { segment, slot }, choice >> 3 & 7);
            }
            3 | 4 => {
                let at = usize::from(input.byte()) % host.plugged.len().max(1);
                if let Some(plugged) = host.plugged.get_mut(at)
                    && self.is_on_bus(plugged)
                {
                    self.hotplug.request_removal(plugged.bdf);
                    plugged.leaves = true;
                }
            }
            5 => self.take_ejected(host),
            6 => {
                for (_, function) in self.segments.functions() {
                    function.pause();
                    function.resume();
                }
            }
            _ => {
                // The part that a snapshot includes; the ports' register is any number.
                let state = self.segments.state(input.number(4) as u32);
                let read: Result<crate::pci::PciBusState, _> = Saved::of(&state).read();
                assert_eq!(read.expect("just written"), state);
            }
        }
    }

    fn is_on_bus(&self, plugged: &Plugged) -> bool {
        let functions = self.segments.functions();
        let mut functions = functions.iter();
        functions.any(|(_, function)| Arc::ptr_eq(function, &plugged.function))
    }

    fn add(&self, host: &mut Host, place: Place, kind: u8) {
        host.added += 1;
        let id = format!("_f{}", host.added);
        let functions = self.segments.functions();
        let has_pvpanic = functions.iter().any(|(_, it)| it.id() == PVPANIC_ID);
        let function: Arc<dyn PciFunction> = match kind {
            7 => self.device(&id),
            6 if !has_pvpanic => {
                let function = Arc::new(PvpanicFunction::unheard());
                *self.pvpanic.lock().unpoisoned() = Some(Arc::clone(&function));
                host.pvpanics += 1;
                function
            }
            _ => {
                let function = Arc::new(PlainFunction::new(&id));
                self.plain
                    .lock()
                    .unpoisoned()
                    .insert(id, Arc::clone(&function));
                function
            }
        };
        if let Ok(bdf) = self.segments.add(Arc::clone(&function), place) {
            self.hotplug.announce(bdf);
            host.plugged.push(Plugged {
                bdf,
                function,
                leaves: false,
            });
        }
    }

    fn device(&self, id: &str) -> Arc<VirtioPciFunction> {
        let source = File::open("/dev/zero").expect("always there");
        let device: Arc<Mutex<dyn VirtioDevice>> = Arc::new(Mutex::new(Rng::new(id, source)));
        let count = vectors_needed(&*device.lock().unpoisoned());
        let function = VirtioPciFunction::new(VirtioPciParams {
            id: id.into(),
            device,
            mem: self.ram.clone(),
            dma: None,
            vectors: Arc::new(FunctionVectors::new(Arc::clone(&self.router), count)),
            thread_start: Arc::new(|_| ()),
            listener: None,
        });
        function.expect("threads and descriptors")
    }

    fn take_ejected(&self, host: &mut Host) {
        let ejected = self.hotplug.take_ejected();
        host.plugged.retain(|it| {
            let stays = !ejected.contains(&it.bdf) || self.is_on_bus(it);
            assert!(stays || it.leaves, "{} was not to leave", it.function.id());
            host.ejected += usize::from(!stays);
            stays
        });
    }

    /// Checks the bus, at which nothing happens now.
    fn check(&self, host: &Host) {
        // The guest may have accessed places without devices.
        let _missed = self.mmio.missed() + self.ports.missed();
        let mapped: BTreeSet<(u64, u64)> = self.mmio.ranges().into_iter().collect();
        let mut explained: BTreeSet<(u64, u64)> =
            ECAM.iter().map(|base| (*base, ECAM_BYTES)).collect();
        explained.insert((HOTPLUG, HOTPLUG_BYTES));
        let mut doorbells = BTreeSet::new();
        for (bdf, function) in self.segments.functions() {
            let [number, endpoint] = [u32::from(bdf.routing_id()), bdf.endpoint()];
            assert_eq!(endpoint & 0xffff, number, "{bdf} at an IOMMU");
            let windows = self.segments.buses()[usize::from(bdf.segment)].windows();
            for bar in function.bars().into_iter().filter(|bar| bar.decoded) {
                let (start, bytes) = (bar.address, bar.size_bytes);
                let Some(end) = start.checked_add(bytes) else {
                    continue;
                };
                let inside = [&windows.mmio32, &windows.mmio64]
                    .iter()
                    .any(|window| window.start <= start && end <= window.end);
                if !inside {
                    continue;
                }
                let taken = |(base, size): &(u64, u64)| *base < end && start < base + size;
                assert!(mapped.iter().any(taken), "BAR {start:#x} of {bdf} is lost");
                explained.insert((start, bytes));
                function.with_doorbells(&mut |doorbell| {
                    if doorbell.bar_index == bar.index {
                        doorbells.insert(start + doorbell.offset);
                    }
                });
            }
        }
        let unexplained: Vec<_> = mapped.difference(&explained).collect();
        assert!(
            unexplained.is_empty(),
            "{unexplained:#x?} belong to nothing"
        );
        for address in self.doorbells.addresses.lock().unpoisoned().iter() {
            assert!(doorbells.contains(address), "doorbell {address:#x}");
        }
        let slots = self.hotplug.state();
        for plugged in &host.plugged {
            let (id, bdf) = (plugged.function.id(), plugged.bdf);
            let segment = &slots.segments[usize::from(bdf.segment)];
            let has = |bitmap: u32| bitmap & 1 << bdf.slot != 0;
            if self.is_on_bus(plugged) {
                assert_eq!(has(segment.leaving), plugged.leaves, "{id}");
                assert!(plugged.leaves || !has(segment.down), "{id}");
            } else {
                assert!(plugged.leaves && has(segment.ejected), "{id} is lost");
            }
        }
    }

    /// Restores the functions and the controller on another bus.
    fn check_restore(&self) {
        let plain = self.plain.lock().unpoisoned();
        let pvpanic = self.pvpanic.lock().unpoisoned();
        let saved = self.segments.state(0);
        let has_state = |id: &String| plain.contains_key(id) || id == PVPANIC_ID;
        if !saved.slots().all(|(_, slot)| has_state(&slot.id)) {
            return;
        }
        let other = Self::new(self.ram.clone());
        let address = self.config_ports.address();
        other.config_ports.restore_address(address);
        assert_eq!(other.config_ports.address(), address);
        for (segment, slot) in saved.slots() {
            let found = saved.slot(&slot.id).expect("it is there");
            assert_eq!((found.0, &found.1.id), (segment, &slot.id));
        }
        other
            .segments
            .restore_reserved(&saved)
            .expect("its own state");
        for (segment, state) in saved.slots() {
            let function: Arc<dyn PciFunction> = match &*pvpanic {
                Some(pvpanic) if state.id == PVPANIC_ID => {
                    let function = PvpanicFunction::unheard();
                    function.restore(&pvpanic.state()).expect("its own state");
                    Arc::new(function)
                }
                _ => {
                    let function = PlainFunction::new(&state.id);
                    let state = plain[&state.id].state();
                    function.restore(&state).expect("its own state");
                    Arc::new(function)
                }
            };
            let added = other.segments.add_restored(function, segment, state);
            added.expect("its own state");
        }
        let controller = self.hotplug.state();
        other.hotplug.restore(&controller).expect("its own state");
        assert_eq!(other.segments.state(0), saved);
        assert_eq!(other.hotplug.state(), controller);
        other.check(&Host::default());
    }

    /// Removes all functions and checks that nothing of them is left.
    fn remove_all(self, host: Host) {
        for plugged in host.plugged {
            if self.is_on_bus(&plugged) {
                assert!(self.segments.remove(plugged.bdf).is_some());
            }
        }
        assert_eq!(self.mmio.ranges().len(), ECAM.len() + 1, "BARs are left");
        assert!(self.doorbells.addresses.lock().unpoisoned().is_empty());
        assert!(self.interrupts.notes().irqfds.is_empty());
        for bus in self.segments.buses() {
            assert!(bus.functions().len() <= 1);
            let windows = bus.windows();
            for window in [windows.mmio32, windows.mmio64] {
                let bytes = window.end - window.start;
                let all = bus.take_memory(window.start, bytes);
                assert!(all.is_some(), "addresses of {window:#x?} are still in use");
            }
        }
    }
}

const _: () = assert!(SLOTS < SLOT_COUNT);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    use super::*;

    /// Without figures above zero, the checks of `run` would mean nothing.
    #[test]
    fn vcpus_of_random_bytes_leave_the_bus_consistent() {
        let mut runner = TestRunner::deterministic();
        let mut all = Seen::default();
        for _ in 0..150 {
            let bytes = prop::collection::vec(any::<u8>(), 0..900);
            let seen = run(&bytes.new_tree(&mut runner).expect("bytes").current());
            all.unmapped_bars += seen.unmapped_bars;
            all.ejected += seen.ejected;
            all.refused_ejects += seen.refused_ejects;
            all.pvpanics += seen.pvpanics;
        }
        assert!(all.unmapped_bars > 0 && all.ejected > 0, "{all:?}");
        assert!(all.refused_ejects > 0 && all.pvpanics > 0, "{all:?}");
    }
}
