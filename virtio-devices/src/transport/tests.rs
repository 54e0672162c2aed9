//! Tests of the transport's guarantees, with a device that completes every chain.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use ::state::{Part, Saved, State, StateError};
use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddressSpace;

use super::{LifecycleListener, TransportError, VirtioPciFunction, VirtioPciParams};
use crate::device::{
    Activation, ActiveQueue, GuestRam, HandlerState, Interrupt, QueueHandler, VirtioDevice,
    WorkerError,
};
use crate::dma::DmaEndpoint;
use crate::pci::{PciFunction, pause_all};
use crate::queue::DmaMemory;
use crate::testing::{
    MockPciDriver, MockVectors, Segment, TestRam, common, conformance, wait_until,
};
use crate::worker::{EventSources, Turn};

const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 5 | 1 << 3;
const RAM_BYTES: usize = 4 << 20;
const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Debug, Default)]
struct Seen {
    acked: AtomicU64,
    resets: AtomicU64,
    config: AtomicU32,
    fail: AtomicBool,
    /// Makes the handler panic at a head outside of the table.
    fragile: AtomicBool,
    entered: AtomicU64,
    /// While a test holds this lock, the handler blocks.
    slow: Mutex<()>,
    /// Where the handlers meet in a pause.
    pauses: OnceLock<Arc<Meeting>>,
    /// Where they meet at their end.
    ends: OnceLock<Arc<Meeting>>,
}

/// Handlers that wait for each other.
#[derive(Debug, Default)]
struct Meeting {
    missing: Mutex<usize>,
    complete: Condvar,
}

impl Meeting {
    fn of(count: usize) -> Arc<Self> {
        let missing = Mutex::new(count);
        let complete = Condvar::new();
        Arc::new(Self { missing, complete })
    }

    /// Waits for the others, but not longer than the deadline of a test.
    fn attend(&self) {
        let mut missing = self.missing.lock().unwrap();
        *missing -= 1;
        self.complete.notify_all();
        let wait = self
            .complete
            .wait_timeout_while(missing, DEADLINE, |missing| *missing > 0);
        drop(wait.unwrap());
    }

    fn is_complete(&self) -> bool {
        *self.missing.lock().unwrap() == 0
    }
}

struct Device {
    seen: Arc<Seen>,
    sizes: Vec<u16>,
    features: u64,
    interrupt: Arc<Mutex<Option<Arc<dyn Interrupt>>>>,
}

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        4
    }
    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn ack_features(&mut self, features: u64) {
        self.seen.acked.store(features, Ordering::SeqCst);
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.seen.config.load(Ordering::SeqCst).to_le_bytes();
        crate::device::read_config_space(&config, offset, data);
    }
    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        let handler = |name| Handler {
            name,
            seen: Arc::clone(&self.seen),
            mem: None,
            queues: Vec::new(),
            interrupt: None,
        };
        vec![Box::new(handler("_even")), Box::new(handler("_odd"))]
    }
    fn handler_of_queue(&self, queue_index: u16, _: u64) -> Option<usize> {
        match queue_index {
            2 => None,
            index => Some(usize::from(index % 2)),
        }
    }
    fn set_interrupt(&mut self, interrupt: Arc<dyn Interrupt>) {
        *self.interrupt.lock().unwrap() = Some(interrupt);
    }
    fn reset(&mut self) {
        self.seen.resets.fetch_add(1, Ordering::SeqCst);
    }
    fn state(&self) -> Saved {
        Saved::of(&DeviceState {
            config: self.seen.config.load(Ordering::SeqCst).into(),
        })
    }
    fn restore(&mut self, state: &Saved) -> Result<(), StateError> {
        let DeviceState { config } = state.read()?;
        self.seen.config.store(config as _, Ordering::SeqCst);
        Ok(())
    }
}

struct Handler {
    name: &'static str,
    seen: Arc<Seen>,
    mem: Option<GuestRam>,
    queues: Vec<ActiveQueue>,
    interrupt: Option<Arc<dyn Interrupt>>,
}

impl QueueHandler for Handler {
    fn name(&self) -> String {
        self.name.into()
    }
    fn activate(
        &mut self,
        activation: Activation,
        _: &mut EventSources,
    ) -> Result<(), WorkerError> {
        self.mem = Some(activation.mem);
        self.queues = activation.queues;
        self.interrupt = Some(activation.interrupt);
        Ok(())
    }
    fn queue_ready(&mut self, index: u16, _: &mut Turn) -> Result<(), WorkerError> {
        if self.seen.fail.load(Ordering::SeqCst) {
            return Err(WorkerError::Queue {
                index,
                reason: "the test says so".into(),
            });
        }
        self.seen.entered.fetch_add(1, Ordering::SeqCst);
        drop(self.seen.slow.lock().unwrap());
        let mem = self.mem.as_ref().unwrap().memory();
        let mut queues = self.queues.iter_mut();
        let active = queues.find(|active| active.index == index).unwrap();
        let queue: &mut Queue = &mut active.queue;
        let broken = |error: virtio_queue::Error| WorkerError::Queue {
            index,
            reason: error.to_string(),
        };
        loop {
            let memory = DmaMemory {
                ram: &mem,
                access: active.dma.as_ref().map(DmaEndpoint::access),
            };
            let chain = queue.iter(&memory).map_err(broken)?.next();
            let Some(head) = chain.map(|chain| chain.head_index()) else {
                break;
            };
            if self.seen.fragile.load(Ordering::SeqCst) {
                assert!(head < queue.size(), "garbage");
            }
            if head < queue.size() {
                queue.add_used(&memory, head, 0).map_err(broken)?;
            }
        }
        self.interrupt.as_ref().unwrap().signal_queue(index);
        Ok(())
    }
    fn pause(&mut self) {
        if let Some(meeting) = self.seen.pauses.get() {
            meeting.attend();
        }
    }
    fn reset(&mut self) {
        if let Some(meeting) = self.seen.ends.get() {
            meeting.attend();
        }
        self.queues.clear();
    }
    fn state(&self) -> HandlerState {
        HandlerState::of_queues(self.queues.iter().map(ActiveQueue::position))
    }
}

/// The device's configuration: one field.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceState {
    config: u64,
}

impl State for DeviceState {
    const PART: Part = Part {
        name: "test device",
        oldest: 1,
        newest: 1,
    };
}

fn device(sizes: &[u16]) -> (Arc<Mutex<dyn VirtioDevice>>, Arc<Seen>, Signal) {
    let seen = Arc::new(Seen::default());
    let interrupt = Signal::default();
    let device = Device {
        seen: Arc::clone(&seen),
        sizes: sizes.to_vec(),
        features: FEATURES,
        interrupt: Arc::clone(&interrupt),
    };
    (Arc::new(Mutex::new(device)), seen, interrupt)
}

type Signal = Arc<Mutex<Option<Arc<dyn Interrupt>>>>;

fn rig() -> (MockPciDriver, Arc<Seen>, Signal) {
    let (device, seen, interrupt) = device(&[16, 64, 8, 256]);
    let ram = TestRam::new(RAM_BYTES);
    (MockPciDriver::new(device, &ram), seen, interrupt)
}

fn count(driver: &MockPciDriver, counter: &str) -> u64 {
    driver.function.counters()[counter]
}

#[test]
fn stub_device_conforms() {
    conformance("test-device", |_| device(&[16, 64, 8, 256]).0);
}

#[test]
#[should_panic(expected = "device refused to start")]
fn conformance_catches_a_device_that_garbage_kills() {
    conformance("test-device-1", |_| {
        let (device, seen, _) = device(&[16]);
        seen.fragile.store(true, Ordering::SeqCst);
        device
    });
}

#[test]
fn windows_lie_where_cloud_hypervisor_has_them() {
    let (driver, ..) = rig();
    let windows = driver.windows;
    assert_eq!(
        [
            windows.common,
            windows.isr,
            windows.device,
            windows.notify,
            windows.notify_multiplier,
            windows.msix_table,
            windows.msix_pending
        ],
        [0, 0x2000, 0x4000, 0x6000, 4, 0x8000, 0x48000]
    );
    assert_eq!(driver.pci_read_u16(windows.msix + 2) & 0x7ff, 4);
    assert_eq!(driver.pci_read_u32(8), 0xffff_0001);
    let mut offsets = Vec::new();
    driver
        .function
        .with_doorbells(&mut |doorbell| offsets.push(doorbell.offset));
    assert_eq!(offsets, [0x6000, 0x6004, 0x6008, 0x600c]);
}

/// One after the other, each function would wait for one that is asked later.
#[test]
fn functions_pause_and_end_at_the_same_time() {
    const WORKERS: usize = 2;
    let rigs = [rig(), rig(), rig()];
    let (pauses, ends) = (
        Meeting::of(rigs.len() * WORKERS),
        Meeting::of(rigs.len() * WORKERS),
    );
    for (_, seen, _) in &rigs {
        seen.pauses.set(Arc::clone(&pauses)).unwrap();
        seen.ends.set(Arc::clone(&ends)).unwrap();
    }
    let started = Instant::now();
    pause_all(rigs.iter().map(|(driver, ..)| &*driver.function as _));
    assert!(pauses.is_complete());
    for (driver, ..) in &rigs {
        driver.function.begin_stop();
    }
    drop(rigs);
    assert!(ends.is_complete());
    assert!(started.elapsed() < DEADLINE, "no worker has given up");
}

#[test]
fn bus_master_switched_off_stops_the_device_until_its_reset() {
    const COMMAND: u16 = 4;
    let (mut driver, ..) = rig();
    driver.start(0);

    // Often: the workers accept a bounded number of commands.
    for _ in 0..100 {
        driver.pci_write(COMMAND, &2_u16.to_le_bytes());
        driver.pci_write(COMMAND, &6_u16.to_le_bytes());
    }
    assert!(driver.needs_reset());
    assert_eq!(driver.vectors.triggered(0), 0, "an interrupt is an access");
    driver.queue(0).push(&[Segment::Writable(4)]);
    driver.kick(0);
    driver.function.pause();
    driver.function.resume();
    assert_eq!(driver.queue(0).used_idx(), 0);
    // Also in a state that was saved in the meantime.
    let (saved, moving) = driver.save();
    let mut driver = moving.restore(device(&[16, 64, 8, 256]).0, &saved).unwrap();
    driver.function.resume();
    driver.kick(0);
    driver.function.pause();
    driver.function.resume();
    assert_eq!(driver.queue(0).used_idx(), 0);
    assert!(driver.needs_reset());

    driver.start(0);
    let chain = driver.queue(0).push(&[Segment::Writable(4)]);
    driver.kick(0);
    assert_eq!(driver.queue(0).wait_used().head, u32::from(chain.head));
    // A driver that never switches it on.
    driver.pci_write(COMMAND, &2_u16.to_le_bytes());
    driver.start(0);
    driver.queue(0).push(&[Segment::Writable(4)]);
    driver.kick(0);
    driver.queue(0).wait_used();
}

#[test]
fn queue_kicked_is_answered_on_its_own_vector() {
    let (mut driver, seen, _) = rig();
    assert_eq!(driver.start(1 << 5), 1 << 32 | 1 << 5);
    assert_eq!(seen.acked.load(Ordering::SeqCst), 1 << 32 | 1 << 5);
    for index in [0, 1, 3] {
        let chain = driver.queue(index).push(&[Segment::Writable(4)]);
        driver.kick(index);
        assert_eq!(driver.queue(index).wait_used().head, u32::from(chain.head));
        driver.vectors.wait_triggered(index + 1, 1);
    }
    // No handler serves queue 2.
    driver.queue(2).push(&[Segment::Writable(4)]);
    driver.kick(2);
    driver.kick(1);
    driver.vectors.wait_triggered(2, 2);
    assert_eq!(driver.queue(2).used_idx(), 0);
    assert_eq!(count(&driver, "activations"), 1);
}

#[test]
fn features_wrong_or_late_are_refused_and_counted() {
    let (mut driver, seen, _) = rig();
    assert!(!driver.try_features(FEATURES & !(1 << 32)));
    assert!(!driver.try_features(1 << 32 | 1 << 7));
    assert_eq!(count(&driver, "bad_features"), 2);
    assert_eq!(seen.acked.load(Ordering::SeqCst), 0);
    assert!(driver.try_features(1 << 32 | 1 << 3));
    driver.common_write(common::DRIVER_FEATURE, &[0xff; 4]);
    driver.common_write(common::DRIVER_FEATURE_SELECT, &2u32.to_le_bytes());
    driver.common_write(common::DRIVER_FEATURE, &1u32.to_le_bytes());
    assert_eq!(count(&driver, "bad_features"), 4);
    assert_eq!(driver.common_u32(common::DRIVER_FEATURE), 0);
    driver.common_write(common::DEVICE_FEATURE_SELECT, &2u32.to_le_bytes());
    assert_eq!(driver.common_u32(common::DEVICE_FEATURE), 0);
}

#[test]
fn status_steps_skipped_or_taken_back_are_refused_and_counted() {
    let (mut driver, ..) = rig();
    driver.set_status(4);
    assert_eq!(driver.status(), 0, "DRIVER_OK without FEATURES_OK");
    driver.set_status(1 << 4);
    assert_eq!(driver.status(), 0, "a bit that does not exist");
    driver.set_status(0x40);
    assert_eq!(driver.status(), 0, "NEEDS_RESET is the device's");
    driver.negotiate(0);
    driver.set_status(1);
    assert_eq!(driver.status(), 0b1011, "bits cannot be taken back");
    assert_eq!(count(&driver, "bad_status_writes"), 4);
    driver.set_status(driver.status() | 0x80);
    assert_eq!(driver.status(), 0b1000_1011);
}

#[test]
fn queue_registers_wrong_or_late_are_refused_and_counted() {
    let (mut driver, ..) = rig();
    driver.negotiate(0);
    driver.select_queue(0);
    for size in [0u16, 3, 32, u16::MAX] {
        driver.common_write(common::QUEUE_SIZE, &size.to_le_bytes());
    }
    driver.common_write(common::QUEUE_ENABLE, &2u16.to_le_bytes());
    assert_eq!(count(&driver, "bad_queue_writes"), 5);
    assert_eq!(driver.common_u16(common::QUEUE_SIZE), 16);
    assert_eq!(driver.common_u16(common::QUEUE_ENABLE), 0);

    driver.set_up_queue(0, Some(8));
    let table = driver.common_u32(common::QUEUE_DESC);
    driver.common_write(common::QUEUE_DESC, &[0; 4]);
    driver.common_write(common::QUEUE_SIZE, &4u16.to_le_bytes());
    driver.common_write(common::QUEUE_ENABLE, &0u16.to_le_bytes());
    assert_eq!(driver.common_u32(common::QUEUE_DESC), table);
    assert_eq!(driver.common_u16(common::QUEUE_SIZE), 8);
    assert_eq!(driver.common_u16(common::QUEUE_ENABLE), 1);
    assert_eq!(count(&driver, "bad_queue_writes"), 8);

    driver.driver_ok();
    driver.select_queue(1);
    driver.common_write(common::QUEUE_ENABLE, &1u16.to_le_bytes());
    assert_eq!(driver.common_u16(common::QUEUE_ENABLE), 0);
    assert_eq!(count(&driver, "bad_queue_writes"), 9);
}

#[test]
fn queue_selected_out_of_range_reads_zero() {
    let (driver, ..) = rig();
    driver.select_queue(4);
    let mut data = [0xaa; 32];
    driver.common_read(common::QUEUE_SIZE, &mut data);
    assert_eq!(data, [0; 32]);
    driver.common_write(common::QUEUE_ENABLE, &1u16.to_le_bytes());
    assert_eq!(count(&driver, "bad_queue_writes"), 1);
}

#[test]
fn vector_out_of_range_reads_back_as_none() {
    let (driver, ..) = rig();
    driver.common_write(common::CONFIG_MSIX_VECTOR, &4u16.to_le_bytes());
    assert_eq!(driver.common_u16(common::CONFIG_MSIX_VECTOR), 4);
    driver.common_write(common::CONFIG_MSIX_VECTOR, &5u16.to_le_bytes());
    assert_eq!(driver.common_u16(common::CONFIG_MSIX_VECTOR), 0xffff);
    driver.common_write(common::QUEUE_MSIX_VECTOR, &5u16.to_le_bytes());
    assert_eq!(driver.common_u16(common::QUEUE_MSIX_VECTOR), 0xffff);
}

#[test]
fn rings_outside_of_ram_or_misaligned_need_a_reset() {
    let (mut driver, ..) = rig();
    let ram = RAM_BYTES as u64;
    let wrong = [
        [0, 0, 0],
        [0x1000, 0x2000, ram],
        [0x1000, ram - 2, 0x3000],
        [ram - 64, 0x2000, 0x3000],
        [u64::MAX - 15, 0x2000, 0x3000],
        [0x1008, 0x2000, 0x3000],
        [0x1000, 0x2001, 0x3000],
        [0x1000, 0x2000, 0x3002],
    ];
    for (round, rings) in (1..).zip(wrong) {
        driver.reset();
        driver.negotiate(0);
        driver.program_queue(0, 16, rings);
        driver.driver_ok();
        assert!(driver.needs_reset(), "{rings:x?}");
        assert_eq!(count(&driver, "bad_queue_rings"), round);
        assert_eq!(driver.vectors.triggered(0), round, "the driver is told");
    }
    driver.start(0);
    assert_eq!(count(&driver, "activations"), 1);
}

#[test]
fn reset_of_a_busy_device_reads_back_late_but_returns_at_once() {
    let (mut driver, seen, _) = rig();
    driver.start(0);
    let busy = seen.slow.lock().unwrap();
    driver.queue(1).push(&[Segment::Writable(4)]);
    driver.kick(1);
    wait_until("the handler", || seen.entered.load(Ordering::SeqCst) > 0);
    let resets = count(&driver, "resets");
    driver.set_status(0);
    assert_eq!(driver.status(), 0b1111, "a worker is still at it");
    driver.set_status(1);
    driver.set_status(0);
    assert_eq!(driver.status(), 0b1111);
    assert_eq!(count(&driver, "bad_status_writes"), 1);
    assert_eq!(count(&driver, "resets"), resets + 1);
    drop(busy);
    wait_until("the reset", || driver.status() == 0);
    driver.start(0);
}

#[test]
fn handler_that_fails_sets_needs_reset_and_tells_the_driver() {
    let (mut driver, seen, _) = rig();
    driver.start(0);
    seen.fail.store(true, Ordering::SeqCst);
    driver.kick(0);
    driver.vectors.wait_triggered(0, 1);
    assert!(driver.needs_reset());
    assert_eq!(count(&driver, "worker_failures"), 1);
    seen.fail.store(false, Ordering::SeqCst);
    driver.start(0);
}

#[test]
fn configuration_change_moves_generation_and_interrupts() {
    let (mut driver, seen, interrupt) = rig();
    driver.start(0);
    let generation = |driver: &MockPciDriver| {
        let mut data = [0];
        driver.common_read(common::CONFIG_GENERATION, &mut data);
        data[0]
    };
    let before = generation(&driver);
    seen.config.store(0x1234_5678, Ordering::SeqCst);
    interrupt.lock().unwrap().as_ref().unwrap().signal_config();
    assert_eq!(generation(&driver), before.wrapping_add(1));
    driver.vectors.wait_triggered(0, 1);
    let mut config = [0; 2];
    driver.device_config(1, &mut config);
    assert_eq!(config, [0x56, 0x34]);
    let mut isr = [0; 1];
    driver.read(driver.windows.isr, &mut isr);
    assert_eq!(isr, [2]);
    driver.read(driver.windows.isr, &mut isr);
    assert_eq!(isr, [0], "reading clears");
}

#[test]
fn needs_reset_signalled_on_an_idle_device_leaves_status_clean() {
    let (driver, _, interrupt) = rig();
    interrupt
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .signal_needs_reset();
    assert_eq!(driver.status(), 0);
}

#[test]
fn window_reaches_the_bar_through_configuration_space() {
    let (driver, ..) = rig();
    let window = driver.windows.window;
    let aim = |bar: u8, offset: u32, length: u32| {
        driver.pci_write(window + 4, &[bar]);
        driver.pci_write(window + 8, &offset.to_le_bytes());
        driver.pci_write(window + 12, &length.to_le_bytes());
    };
    aim(0, common::NUM_QUEUES as u32, 2);
    assert_eq!(driver.pci_read_u16(window + 16), 4);
    aim(0, common::QUEUE_SELECT as u32, 2);
    driver.pci_write(window + 16, &3u16.to_le_bytes());
    assert_eq!(driver.common_u16(common::QUEUE_SELECT), 3);

    for (bar, offset, length) in [
        (1, 0, 4),
        (0, 1, 2),
        (0, 0, 3),
        (0, u32::MAX - 3, 4),
        (0, 0, 0),
    ] {
        aim(bar, offset, length);
        assert_eq!(driver.pci_read_u32(window + 16), 0);
    }
    assert_eq!(count(&driver, "bad_window_accesses"), 5);
}

#[test]
fn notification_of_a_missing_queue_is_counted() {
    let (driver, ..) = rig();
    driver.write(driver.windows.notify + 16, &[0, 0]);
    driver.write(driver.windows.isr, &[1]);
    assert_eq!(count(&driver, "bad_notifications"), 1);
    assert_eq!(count(&driver, "bad_register_writes"), 1);
}

#[test]
fn vm_reset_clears_msix_and_decoding_but_keeps_the_bar() {
    let (mut driver, seen, _) = rig();
    driver.start(0);
    driver.function.reset();
    assert!(seen.resets.load(Ordering::SeqCst) >= 2);
    assert_eq!(driver.status(), 0);
    let bar = driver.function.bars()[0];
    assert_eq!((bar.address, bar.decoded), (0x10_0000_0000, false));
    assert_eq!(driver.pci_read_u16(driver.windows.msix + 2) & 0xc000, 0);
    assert_eq!(driver.vectors.message(0), None);
    driver.set_up_pci();
    driver.start(0);
}

#[test]
fn bar_moved_or_decoded_is_told_to_the_bus() {
    let (driver, ..) = rig();
    let function = &driver.function;
    assert!(!function.config_write(4, &6u16.to_le_bytes()), "as it was");
    assert!(function.config_write(4, &4u16.to_le_bytes()));
    assert!(function.config_write(0x10, &0x4000_0000u32.to_le_bytes()));
    assert!(!function.config_write(0x3c, &[11]));
    function.set_bar_address(0, 0x20_0000_0000);
    assert_eq!(function.bars()[0].address, 0x20_0000_0000);
}

#[derive(Debug, Default)]
struct Log(Mutex<Vec<String>>);

impl LifecycleListener for Log {
    fn device_activated(&self, id: &str) {
        self.0.lock().unwrap().push(format!("{id} activated"));
    }
    fn device_reset(&self, id: &str) {
        self.0.lock().unwrap().push(format!("{id} reset"));
    }
}

fn params(sizes: &[u16], ram: &TestRam, log: &Arc<Log>) -> (VirtioPciParams, Arc<MockVectors>) {
    let vectors = Arc::new(MockVectors::new(sizes.len() as u16 + 1));
    let params = VirtioPciParams {
        id: "_dev7".into(),
        device: device(sizes).0,
        mem: ram.mem(),
        dma: None,
        vectors: vectors.clone(),
        thread_start: Arc::new(|_: &str| {}),
        listener: Some(log.clone()),
    };
    (params, vectors)
}

#[test]
fn listener_hears_of_activation_and_of_resets_of_active_devices() {
    let ram = TestRam::new(RAM_BYTES);
    let log = Arc::new(Log::default());
    let (params, vectors) = params(&[16], &ram, &log);
    let mut driver = MockPciDriver::probe(VirtioPciFunction::new(params).unwrap(), vectors, &ram);
    driver.start(0);
    driver.reset();
    driver.reset();
    assert_eq!(*log.0.lock().unwrap(), ["_dev7 activated", "_dev7 reset"]);
}

#[test]
fn queues_that_make_no_sense_are_refused() {
    let ram = TestRam::new(RAM_BYTES);
    let log = Arc::new(Log::default());
    let error = |sizes: &[u16]| VirtioPciFunction::new(params(sizes, &ram, &log).0).unwrap_err();
    assert!(matches!(
        error(&[16, 5]),
        TransportError::QueueSize { index: 1, size: 5 }
    ));
    assert!(matches!(
        error(&[16; 1025]),
        TransportError::TooManyQueues { queues: 1025 }
    ));
}

#[derive(Debug, Clone)]
enum Access {
    ConfigRead(u16, usize),
    ConfigWrite(u16, Vec<u8>),
    BarRead(u64, usize),
    BarWrite(u64, Vec<u8>),
}

fn access() -> impl Strategy<Value = Access> {
    let bar = || {
        prop_oneof![
            4 => 0u64..64,
            1 => (0u64..16).prop_map(|at| 0x2000 + at),
            1 => (0u64..16).prop_map(|at| 0x4ff8 + at),
            2 => (0u64..64).prop_map(|at| 0x6000 + at),
            2 => (0u64..128).prop_map(|at| 0x8000 + at),
            1 => (0u64..16).prop_map(|at| 0x48000 + at),
            1 => any::<u64>(),
        ]
    };
    let bytes = || prop::collection::vec(any::<u8>(), 0..12);
    prop_oneof![
        (0u16..300, 0usize..12).prop_map(|(at, width)| Access::ConfigRead(at, width)),
        (0u16..300, bytes()).prop_map(|(at, data)| Access::ConfigWrite(at, data)),
        (bar(), 0usize..12).prop_map(|(at, width)| Access::BarRead(at, width)),
        (bar(), bytes()).prop_map(|(at, data)| Access::BarWrite(at, data)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn function_accessed_anyhow_still_serves_a_good_driver(
        accesses in prop::collection::vec(access(), 1..200)
    ) {
        let (mut driver, ..) = rig();
        let function = Arc::clone(&driver.function);
        for access in accesses {
            match access {
                Access::ConfigRead(at, width) => function.config_read(at, &mut vec![0; width]),
                Access::ConfigWrite(at, data) => { function.config_write(at, &data); }
                Access::BarRead(at, width) => function.bar_read(0, at, &mut vec![0; width]),
                Access::BarWrite(at, data) => function.bar_write(0, at, &data),
            }
        }
        driver.set_up_pci();
        driver.start(u64::MAX);
        driver.queue(0).push(&[Segment::Writable(4)]);
        driver.kick(0);
        driver.queue(0).wait_used();
    }
}
