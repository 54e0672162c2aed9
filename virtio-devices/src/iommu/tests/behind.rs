//! Tests a device behind the IOMMU: it can access what the guest maps, and nothing else.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex};

use vm_memory::{GuestAddress, Permissions};

use super::super::IommuHandle;
use super::iommu;
use crate::device::{QueueHandler, VirtioDevice, WorkerError};
use crate::dma::{DmaEndpoint, Shared};
use crate::pci::PciFunction;
use crate::rng::Rng;
use crate::testing::{Desc, HandlerHarness, MockPciDriver, NEXT, Segment, TestRam, WRITE};

const ENDPOINT: u32 = 0x18;
const DOMAIN: u32 = 1;
const ACCESS_PLATFORM: u64 = 1 << 33;
/// The queue's rings are below, at the same addresses for the device.
const RINGS: u64 = 1 << 20;
/// The device's address of a buffer, and the guest's.
const INPUT: u64 = 0x7000_0000_0000;
const BUFFER: u64 = 0x20_0000;
const READ: Permissions = Permissions::Read;
const BOTH: Permissions = Permissions::ReadWrite;

struct Rig {
    shared: Arc<Shared>,
    _handle: IommuHandle,
    rng: Rng,
    harness: HandlerHarness<Box<dyn QueueHandler>>,
}

impl Rig {
    /// An entropy device whose source is `bytes`, with mapped rings.
    fn new(bytes: &[u8]) -> Self {
        let (iommu, handle) = iommu(64);
        let endpoint = handle.endpoint();
        endpoint.place(ENDPOINT);
        let shared = Arc::clone(iommu.shared());
        shared.change(|tables| {
            tables.attach(DOMAIN, ENDPOINT, false).unwrap();
            tables.map(DOMAIN, 0..=RINGS - 1, 0, BOTH).unwrap();
        });
        let mut source = tempfile::tempfile().unwrap();
        source.write_all(bytes).unwrap();
        std::io::Seek::rewind(&mut source).unwrap();
        let mut rng = Rng::new("__rng", source);
        let mut harness = HandlerHarness::new(rng.take_handlers().remove(0), rng.features());
        harness.add_queues(1);
        harness.dma = Some(endpoint);
        harness.activate().unwrap();
        Self {
            shared,
            _handle: handle,
            rng,
            harness,
        }
    }

    fn map(&self, page: u64, to: u64, allows: Permissions) {
        let first = INPUT + page * 0x1000;
        self.shared.change(|tables| {
            let mapped = tables.map(DOMAIN, first..=first + 0xfff, to, allows);
            mapped.unwrap();
        });
    }

    /// Offers device-writable buffers as (device address, bytes), and returns the number of bytes written.
    fn fill(&mut self, buffers: &[(u64, u32)]) -> Result<u32, WorkerError> {
        let descs: Vec<Desc> = (1..)
            .zip(buffers)
            .map(|(next, (addr, len))| Desc {
                addr: *addr,
                len: *len,
                flags: WRITE | if next < buffers.len() { NEXT } else { 0 },
                next: next as u16,
            })
            .collect();
        self.harness.queue(0).push_raw(&descs);
        self.harness.kick(0)?;
        Ok(self.harness.queue(0).pop_used().unwrap().len)
    }

    fn faults(&self) -> u64 {
        self.shared.stats.faults.get()
    }
}

#[test]
fn buffer_is_where_the_guest_mapped_it() {
    let mut rig = Rig::new(b"0123456789");
    // Two pages that are adjacent for the device and in reverse order for the guest.
    rig.map(0, BUFFER + 0x1000, BOTH);
    rig.map(1, BUFFER, Permissions::Write);
    assert_eq!(rig.fill(&[(INPUT + 0xffc, 8)]).unwrap(), 8);
    let ram = &rig.harness.ram;
    assert_eq!(ram.read(GuestAddress(BUFFER + 0x1ffc), 4), b"0123");
    assert_eq!(ram.read(GuestAddress(BUFFER), 5), b"4567\0");
    assert_eq!(rig.faults(), 0);
}

#[test]
fn buffer_that_is_not_mapped_is_not_touched() {
    let mut rig = Rig::new(b"0123456789");
    rig.map(0, BUFFER, READ);
    rig.map(2, 1 << 50, BOTH);
    let touched = [
        // Read-only; not mapped; a guest address; mapped to something that is not RAM; partly mapped.
        vec![(INPUT, 8)],
        vec![(INPUT + 0x1000, 8)],
        vec![(BUFFER, 8)],
        vec![(INPUT + 0x2000, 8)],
        vec![(RINGS - 4, 8)],
        vec![(RINGS - 8, 8), (u64::MAX - 3, 8)],
    ];
    for buffers in &touched {
        assert_eq!(rig.fill(buffers).unwrap(), 0, "{buffers:x?}");
    }
    assert_eq!(rig.rng.counters()["bad_requests"], 6);
    assert_eq!(rig.rng.counters()["bytes"], 0);
    assert_eq!(rig.faults(), 5, "outside of RAM is no fault of the IOMMU");
    assert_eq!(rig.harness.ram.read(GuestAddress(BUFFER), 8), [0; 8]);
    // It works on, once the guest does it right.
    rig.map(1, BUFFER, BOTH);
    assert_eq!(rig.fill(&[(INPUT + 0x1000, 4)]).unwrap(), 4);
}

#[test]
fn buffer_with_too_many_mappings_is_refused() {
    let mut rig = Rig::new(&[7; 8192]);
    for page in 0..2000 {
        rig.map(page, BUFFER, BOTH);
    }
    assert_eq!(rig.fill(&[(INPUT, 1000 * 0x1000)]).unwrap(), 8192);
    assert_eq!(rig.fill(&[(INPUT, 1100 * 0x1000)]).unwrap(), 0);
    let half = 600 * 0x1000;
    assert_eq!(rig.fill(&[(INPUT, half), (INPUT, half)]).unwrap(), 0);
    assert_eq!(rig.rng.counters()["bad_requests"], 2);
    assert_eq!(rig.faults(), 0);
}

#[test]
fn ring_that_is_unmapped_stops_the_device() {
    let mut rig = Rig::new(b"0123");
    rig.map(0, BUFFER, BOTH);
    rig.shared
        .change(|tables| tables.unmap(DOMAIN, 0..=RINGS - 1).unwrap());
    let stopped = rig.fill(&[(INPUT, 4)]).unwrap_err();
    assert!(matches!(stopped, WorkerError::Queue { index: 0, .. }));
    assert_eq!(rig.harness.ram.read(GuestAddress(BUFFER), 4), [0; 4]);
    assert!(rig.faults() > 0);
    // A table that the device can only read suffices; a used ring does not.
    let mut rig = Rig::new(b"0123");
    rig.map(0, BUFFER, BOTH);
    rig.shared.change(|tables| {
        tables.unmap(DOMAIN, 0..=RINGS - 1).unwrap();
        tables.map(DOMAIN, 0..=RINGS - 1, 0, READ).unwrap();
    });
    rig.fill(&[(INPUT, 4)]).unwrap_err();
    assert_eq!(rig.harness.queue(0).used_idx(), 0);
}

/// A driver of an entropy device behind an IOMMU.
fn driver() -> (Arc<Shared>, MockPciDriver) {
    let (iommu, handle) = iommu(64);
    let endpoint: Arc<DmaEndpoint> = handle.endpoint();
    endpoint.place(ENDPOINT);
    let rng = Rng::new("__rng", File::open("/dev/zero").unwrap());
    let ram = TestRam::new(16 << 20);
    let driver = MockPciDriver::behind(Some(endpoint), Arc::new(Mutex::new(rng)), &ram);
    (Arc::clone(iommu.shared()), driver)
}

#[test]
fn function_offers_access_platform_and_checks_rings_as_the_device_sees_them() {
    let (shared, mut driver) = driver();
    driver.reset();
    assert_eq!(driver.offered() & ACCESS_PLATFORM, ACCESS_PLATFORM);
    // Bypass: as without an IOMMU.
    driver.start(u64::MAX);
    assert!(!driver.needs_reset());
    let bad_rings = |driver: &MockPciDriver| driver.function.counters()["bad_queue_rings"];
    assert_eq!(bad_rings(&driver), 0);
    // A domain without mappings: the rings are nowhere.
    shared.change(|tables| tables.attach(DOMAIN, ENDPOINT, false).unwrap());
    driver.reset();
    driver.negotiate(u64::MAX);
    driver.set_up_queue(0, None);
    driver.driver_ok();
    assert!(driver.needs_reset());
    assert_eq!(bad_rings(&driver), 1);
    shared.change(|tables| tables.map(DOMAIN, 0..=0xff_ffff, 0, BOTH).unwrap());
    driver.start(u64::MAX);
    assert!(!driver.needs_reset());
    driver.queue(0).push(&[Segment::Writable(8)]);
    driver.kick(0);
    crate::testing::wait_until("the request", || driver.queue(0).pop_used().is_some());
}

#[test]
fn device_that_is_dropped_leaves_no_endpoint() {
    let (shared, driver) = driver();
    assert!(shared.read(|tables| tables.has_endpoint(ENDPOINT)));
    drop(driver);
    assert!(!shared.read(|tables| tables.has_endpoint(ENDPOINT)));
}

#[test]
fn device_whose_ring_is_unmapped_can_be_saved_and_restored() {
    let (shared, mut driver) = driver();
    shared.change(|tables| {
        tables.attach(DOMAIN, ENDPOINT, false).unwrap();
        tables.map(DOMAIN, 0..=0xff_ffff, 0, BOTH).unwrap();
    });
    driver.start(u64::MAX);
    // Idle: it does not notice.
    shared.change(|tables| tables.unmap(DOMAIN, 0..=u64::MAX).unwrap());
    assert!(!driver.needs_reset());
    let (saved, moving) = driver.save();
    let endpoint = Arc::new(DmaEndpoint::new(Arc::clone(&shared), None));
    endpoint.place(ENDPOINT);
    shared.change(|tables| tables.attach(DOMAIN, ENDPOINT, false).unwrap());
    let rng = Rng::new("__rng", File::open("/dev/zero").unwrap());
    let restored = moving.restore_behind(Some(endpoint), Arc::new(Mutex::new(rng)), &saved);
    let mut driver = restored.unwrap();
    driver.function.resume();
    assert!(driver.needs_reset());
    shared.change(|tables| tables.map(DOMAIN, 0..=0xff_ffff, 0, BOTH).unwrap());
    driver.start(u64::MAX);
    driver.queue(0).push(&[Segment::Writable(8)]);
    driver.kick(0);
    crate::testing::wait_until("the request", || driver.queue(0).pop_used().is_some());
}
