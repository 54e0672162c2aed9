//! Tests assigned devices behind the IOMMU, with a mock of the host's IOMMU.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, Permissions};

use super::super::Iommu;
use super::{Harness, attach, detach, iommu, map, probe, send, start, status, unmap};
use crate::device::VirtioDevice;
use crate::dma::DmaEndpoint;
use crate::reclaim::{DiscardEngine, Expected, GuestRange, SkipReason};
use crate::testing::{HostMapped, MockHostIommu, Segment, TestRam, wait_until};

const ENDPOINT: u32 = 0x18;
/// A device of the VMM.
const OTHER: u32 = 0x20;
const OK: u8 = 0;
const UNSUPP: u8 = 2;
const DEVERR: u8 = 3;
const INVAL: u8 = 4;
const RANGE: u8 = 5;
const NOENT: u8 = 6;
const NOMEM: u8 = 8;

const ENTRIES_MAX: usize = 8;
const PAGE: u64 = 4096;
/// RAM is two regions without a gap, and one behind a gap.
const REGIONS: [(u64, usize); 3] = [(0, 0x8000), (0x8000, 0x8000), (0x10_0000, 0x4000)];

struct Rig {
    device: Iommu,
    host: Arc<MockHostIommu>,
    endpoint: Option<Arc<DmaEndpoint>>,
    other: Arc<DmaEndpoint>,
    ram: TestRam,
    engine: DiscardEngine,
    harness: Harness,
}

impl Rig {
    fn new() -> Self {
        let (mut device, handle) = iommu(64);
        let ram = TestRam::from_regions(&REGIONS);
        let host = Arc::new(MockHostIommu::new(ENTRIES_MAX));
        let endpoint = handle.endpoint_of_host(host.clone(), ram.mem());
        endpoint.place(ENDPOINT);
        let other = handle.endpoint();
        other.place(OTHER);
        let harness = start(&mut device);
        Self {
            device,
            host,
            endpoint: Some(endpoint),
            other,
            ram,
            engine: DiscardEngine::new(Arc::default()),
            harness,
        }
    }

    fn send(&mut self, bytes: &[u8], writable: u32) -> Vec<u8> {
        send(&mut self.harness, bytes, writable)
    }

    fn status(&mut self, bytes: &[u8]) -> u8 {
        status(&mut self.harness, bytes)
    }

    /// Memory that the device can access: input address, guest address, bytes.
    fn accessible(&self) -> Vec<(u64, u64, u64)> {
        let ram = self.ram.mem().memory();
        let guest = |it: &HostMapped| {
            let mut regions = REGIONS.iter();
            regions.find_map(|(start, bytes)| {
                let slice = ram.get_slice(GuestAddress(*start), *bytes).unwrap();
                let first = slice.ptr_guard_mut().as_ptr() as usize;
                let offset = it.address.checked_sub(first)? as u64;
                (offset + it.bytes <= *bytes as u64).then_some(start + offset)
            })
        };
        let mapped = self.host.mapped();
        let mapped = mapped.iter();
        mapped
            .map(|(input, it)| (*input, guest(it).unwrap(), it.bytes))
            .collect()
    }

    /// Bytes of RAM that cannot be discarded. RAM is discarded by this.
    fn pinned_bytes(&mut self) -> u64 {
        let mut all = REGIONS.map(|(start, bytes)| GuestRange {
            start,
            bytes: bytes as u64,
        });
        let outcome = self
            .engine
            .discard(&self.ram.mem(), &mut all, Expected::Anything);
        let skipped = outcome.skipped.get(SkipReason::DmaMapped);
        assert_eq!(outcome.discarded.bytes + skipped, outcome.requested.bytes);
        skipped
    }
}

#[test]
fn device_of_the_host_can_access_exactly_what_the_guest_maps() {
    let mut rig = Rig::new();
    assert_eq!(rig.accessible(), [], "neither with bypass");
    assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(rig.pinned_bytes(), 0);
    // In one region, in two of them, and without access.
    assert_eq!(rig.status(&map(1, 0x1000, 0x2fff, 0x4000, 1)), OK);
    assert_eq!(rig.status(&map(1, 0x9000, 0xbfff, 0x7000, 3)), OK);
    assert_eq!(rig.status(&map(1, 0x5000, 0x5fff, 0x1000, 0)), OK);
    let both = [
        (0x1000, 0x4000, 0x2000),
        (0x9000, 0x7000, 0x1000),
        (0xa000, 0x8000, 0x2000),
    ];
    assert_eq!(rig.accessible(), both);
    let allows: Vec<_> = rig.host.mapped().values().map(|it| it.allows).collect();
    let expected = [
        Permissions::Read,
        Permissions::ReadWrite,
        Permissions::ReadWrite,
    ];
    assert_eq!(allows, expected);
    assert_eq!(rig.pinned_bytes(), 5 * PAGE);
    assert_eq!(rig.device.counters()["host_mapped_bytes"], 5 * PAGE);
    // Twice mapped: pinned until both are gone.
    assert_eq!(rig.status(&map(1, 0x7000, 0x7fff, 0x4000, 2)), OK);
    assert_eq!(rig.pinned_bytes(), 5 * PAGE);
    assert_eq!(rig.status(&unmap(1, 0, 0x5fff)), OK);
    assert_eq!(rig.pinned_bytes(), 4 * PAGE);
    assert_eq!(rig.status(&unmap(1, 0, 0xffff)), OK);
    assert_eq!((rig.accessible(), rig.pinned_bytes()), (vec![], 0));
}

/// Sends a request with a command at the given check. `inspect` sees what is done then. Afterwards, the request is done.
fn interrupt(rig: &mut Rig, look: u64, bytes: &[u8], inspect: impl FnOnce(&mut Rig)) {
    let segments = [Segment::Readable(bytes), Segment::Writable(4)];
    let chain = rig.harness.queue(0).push(&segments);
    let before = rig.harness.queue(0).used_idx();
    rig.harness.turn.call_after(look);
    rig.harness.kick(0).unwrap();
    let in_spite = rig.harness.turn.done_in_spite();
    assert!(in_spite.chains == 0 && in_spite.calls == 0, "{in_spite:?}");
    assert_eq!(rig.harness.queue(0).used_idx(), before, "look {look}");
    inspect(rig);
    rig.harness.turn.set_called(false);
    rig.harness.kick(0).unwrap();
    assert_eq!(
        rig.harness.queue(0).pop_used().map(|used| used.len),
        Some(4)
    );
    let result = rig.harness.queue(0).read_buffer(chain.buffers[1]);
    assert_eq!(result, [OK, 0, 0, 0]);
}

#[test]
fn command_interrupts_requests_that_need_many_calls_to_the_host() {
    const MAPPINGS: u64 = 6;
    // The first checks are before the request.
    for look in 2..2 + MAPPINGS - 1 {
        let mut rig = Rig::new();
        assert_eq!(rig.status(&attach(1, OTHER, 0)), OK);
        for at in 0..MAPPINGS {
            let first = 2 * at * PAGE;
            assert_eq!(
                rig.status(&map(1, first, first + PAGE - 1, at * PAGE, 3)),
                OK
            );
        }
        interrupt(&mut rig, look, &attach(1, ENDPOINT, 0), |rig| {
            assert_eq!((rig.accessible(), rig.pinned_bytes()), (vec![], 0));
        });
        assert_eq!(rig.accessible().len() as u64, MAPPINGS);
        interrupt(&mut rig, look, &unmap(1, 0, 0xffff), |rig| {
            let left = rig.accessible().len() as u64;
            assert!((1..MAPPINGS).contains(&left), "{left}");
            assert_eq!(rig.device.counters()["mappings"], left);
            assert_eq!(rig.pinned_bytes(), left * PAGE);
        });
        assert_eq!((rig.accessible(), rig.pinned_bytes()), (vec![], 0));
        let most = rig.harness.turn.most_between_looks();
        assert!(most.calls <= 1, "{most:?}");
        let requests = rig.device.counters()["requests"];
        assert_eq!(requests, 1 + MAPPINGS + 2, "each is counted once");
    }
}

#[test]
fn device_of_the_host_loses_access_whichever_way_its_domain_ends() {
    type End = fn(&mut Rig);
    let ends: [End; 4] = [
        |rig| assert_eq!(rig.status(&detach(1, ENDPOINT)), OK),
        |rig| assert_eq!(rig.status(&attach(2, ENDPOINT, 0)), OK),
        |rig| rig.harness.reset(),
        |rig| drop(rig.endpoint.take()),
    ];
    for end in ends {
        let mut rig = Rig::new();
        assert_eq!(rig.status(&attach(1, OTHER, 0)), OK);
        // The domain had a mapping before the device.
        assert_eq!(rig.status(&map(1, 0x1000, 0x1fff, 0x4000, 3)), OK);
        assert_eq!(rig.accessible(), []);
        assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
        assert_eq!(rig.accessible(), [(0x1000, 0x4000, PAGE)]);
        assert_eq!(rig.status(&map(1, 0x2000, 0x2fff, 0x5000, 3)), OK);
        assert_eq!(rig.pinned_bytes(), 2 * PAGE);
        end(&mut rig);
        assert_eq!((rig.accessible(), rig.pinned_bytes()), (vec![], 0));
    }
}

#[test]
fn mapping_that_a_device_of_the_host_cannot_have_is_refused_and_leaves_nothing() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(&attach(1, ENDPOINT, 1)), UNSUPP, "bypass");
    assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
    let gib = 1 << 30;
    for (first, last, to, status) in [
        // MMIO, behind RAM, across a gap, across the end of RAM.
        (0, 0xfff, 0xfec0_0000, INVAL),
        (0, 0xfff, 1 << 40, INVAL),
        (0, 0xf_ffff, 0x8000, INVAL),
        (0, 0x1fff, 0x10_3000, INVAL),
        (0, 0xfff, u64::MAX - 0xfff, INVAL),
        (0, 511 * gib - 1, 0, INVAL),
        // Ranges that the host cannot map, and ranges beyond the end of the address space.
        (1 << 39, (1 << 39) + 0xfff, 0, RANGE),
        ((1 << 39) - PAGE, (1 << 39) + 0xfff, 0, RANGE),
        (u64::MAX - 0xfff, u64::MAX, 0, RANGE),
        (0x1000, 0x1fff, u64::MAX - 0xffe, RANGE),
        (0xfee0_0000, 0xfee0_0fff, 0, INVAL),
    ] {
        let got = rig.status(&map(1, first, last, to, 3));
        assert_eq!(got, status, "{first:#x} to {last:#x} at {to:#x}");
    }
    assert_eq!((rig.accessible(), rig.pinned_bytes()), (vec![], 0));
    // Overlapping.
    assert_eq!(rig.status(&map(1, 0x1000, 0x2fff, 0, 3)), OK);
    assert_eq!(rig.status(&map(1, 0x2000, 0x3fff, 0x4000, 3)), INVAL);
    assert_eq!(rig.accessible(), [(0x1000, 0, 0x2000)]);
    assert_eq!(rig.pinned_bytes(), 2 * PAGE);
    assert_eq!(rig.device.counters()["mappings"], 1);
}

#[test]
fn limit_of_the_host_bounds_mappings() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
    for at in 0..1000 {
        let first = at * PAGE;
        let status = rig.status(&map(1, first, first + PAGE - 1, 0, 3));
        assert_eq!(status, if at < ENTRIES_MAX as u64 { OK } else { NOMEM });
    }
    assert_eq!(rig.host.mapped().len(), ENTRIES_MAX);
    assert_eq!(rig.pinned_bytes(), PAGE);
    // A mapping of two parts with space for one leaves neither.
    assert_eq!(rig.status(&unmap(1, 0, PAGE - 1)), OK);
    assert_eq!(
        rig.status(&map(1, 1 << 30, (1 << 30) + 0x1fff, 0x7000, 3)),
        NOMEM
    );
    assert_eq!(rig.host.mapped().len(), ENTRIES_MAX - 1);
    // A domain with more mappings than the host accepts.
    assert_eq!(rig.status(&attach(2, OTHER, 0)), OK);
    for at in 0..=ENTRIES_MAX as u64 {
        assert_eq!(
            rig.status(&map(2, at * PAGE, at * PAGE + 0xfff, 0x2000, 3)),
            OK
        );
    }
    assert_eq!(rig.status(&attach(2, ENDPOINT, 0)), NOMEM);
    assert_eq!((rig.accessible(), rig.pinned_bytes()), (vec![], 0));
    assert_eq!(
        rig.status(&map(1, 0, 0xfff, 0, 3)),
        NOENT,
        "it has no domain now"
    );
    assert_eq!(rig.status(&attach(3, ENDPOINT, 0)), OK);
}

#[test]
fn memory_that_the_host_does_not_unmap_is_not_discarded_until_the_device_is_closed() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(rig.status(&map(1, 0x1000, 0x2fff, 0x7000, 3)), OK);
    rig.host.fail_to_unmap(true);
    assert_eq!(rig.status(&unmap(1, 0x1000, 0x2fff)), DEVERR);
    assert_eq!(rig.device.counters()["mappings"], 0);
    rig.host.fail_to_unmap(false);
    assert_eq!(rig.pinned_bytes(), 2 * PAGE);
    assert_eq!(rig.status(&detach(1, ENDPOINT)), OK);
    assert_eq!(rig.pinned_bytes(), 2 * PAGE);
    // A mapping that it does not unmap when the device goes.
    assert_eq!(rig.status(&attach(2, ENDPOINT, 0)), OK);
    assert_eq!(rig.status(&map(2, 0x8000, 0x8fff, 0, 3)), OK);
    rig.host.fail_to_unmap(true);
    drop(rig.endpoint.take());
    assert_eq!(rig.pinned_bytes(), 3 * PAGE);
    rig.host.close();
    assert_eq!(rig.pinned_bytes(), 0);
}

#[test]
fn other_devices_translate_while_the_host_is_busy() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(rig.status(&attach(2, OTHER, 0)), OK);
    assert_eq!(rig.status(&map(2, 0x1000, 0x1fff, 0x4000, 3)), OK);
    let (host, other) = (Arc::clone(&rig.host), Arc::clone(&rig.other));
    let shared = Arc::clone(rig.device.shared());
    let translates = || {
        let translated = other.access().translate(0x1000, 8, Permissions::Read, 1);
        translated.unwrap();
    };
    let mut while_busy = |request: &[u8], mappings: u64| {
        std::thread::scope(|scope| {
            let busy = host.busy();
            let answer = scope.spawn(|| rig.status(request));
            wait_until("the request", || shared.mappings() == mappings);
            translates();
            assert!(!answer.is_finished(), "before the host is");
            drop(busy);
            assert_eq!(answer.join().unwrap(), OK);
        });
    };
    while_busy(&map(1, 0x2000, 0x2fff, 0, 3), 2);
    while_busy(&unmap(1, 0x2000, 0x2fff), 1);
    while_busy(&map(1, 0x2000, 0x2fff, 0, 3), 2);
    while_busy(&detach(1, ENDPOINT), 1);
}

#[test]
fn memory_that_was_plugged_out_cannot_be_mapped() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(rig.status(&map(1, 0, 0xfff, 0x10_0000, 3)), OK);
    assert_eq!(rig.status(&unmap(1, 0, 0xfff)), OK);
    let (fewer, _) = REGIONS.split_at(2);
    let fewer = TestRam::from_regions(fewer).mem().memory().into_inner();
    rig.ram.mem().lock().unwrap().replace((*fewer).clone());
    assert_eq!(rig.status(&map(1, 0, 0xfff, 0x10_0000, 3)), INVAL);
}

#[test]
fn probe_reserves_what_the_host_cannot_map() {
    let mut rig = Rig::new();
    let property = |kind: u8, range: RangeInclusive<u64>| {
        let mut bytes = vec![1, 0, 20, 0, kind, 0, 0, 0];
        bytes.extend(range.start().to_le_bytes());
        bytes.extend(range.end().to_le_bytes());
        bytes
    };
    let mut expected = property(1, 0xfee0_0000..=0xfeef_ffff);
    expected.extend(property(0, 1 << 39..=u64::MAX));
    expected.resize(192, 0);
    expected.extend([OK, 0, 0, 0]);
    assert_eq!(rig.send(&probe(ENDPOINT), 196), expected);
    // A driver that has less space, as earlier versions of the device announced.
    let mut expected = property(1, 0xfee0_0000..=0xfeef_ffff);
    expected.extend([OK, 0, 0, 0]);
    assert_eq!(rig.send(&probe(ENDPOINT), 28), expected);
    assert_eq!(rig.send(&probe(OTHER), 28), expected);
    assert_eq!(rig.send(&probe(OTHER), 27)[23], INVAL, "no space");
}

/// The device writes to each page as soon as it is mapped, and finds its own content until the page is unmapped. The
/// engine discards all of RAM in the meantime. A discard after the pinning would be a page of zeros.
#[test]
fn no_mapped_page_is_discarded_in_any_interleaving() {
    const ROUNDS: u64 = 40;
    let mut rig = Rig::new();
    assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
    let ram = rig.ram.mem();
    let is_over = AtomicBool::new(false);
    let (discarded, skipped) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut engine = DiscardEngine::new(Arc::default());
            while !is_over.load(Ordering::SeqCst) {
                let mut all = REGIONS.map(|(start, bytes)| GuestRange {
                    start,
                    bytes: bytes as u64,
                });
                let outcome = engine.discard(&ram, &mut all, Expected::Anything);
                discarded.fetch_add(outcome.discarded.bytes, Ordering::SeqCst);
                let bytes = outcome.skipped.get(SkipReason::DmaMapped);
                skipped.fetch_add(bytes, Ordering::SeqCst);
            }
        });
        let mut round = 0;
        // On one processor, the rounds could all fall between two discards.
        let has_met = || skipped.load(Ordering::SeqCst) > 0 && discarded.load(Ordering::SeqCst) > 0;
        while round < ROUNDS || !has_met() {
            let to = round % 16 * PAGE;
            assert_eq!(rig.status(&map(1, 0x1000, 0x1fff, to, 3)), OK);
            let memory = ram.memory();
            memory.write_obj(round + 1, GuestAddress(to)).unwrap();
            for _ in 0..round % 7 {
                std::thread::yield_now();
            }
            let found: u64 = memory.read_obj(GuestAddress(to)).unwrap();
            assert_eq!(found, round + 1, "page {to:#x} was discarded");
            assert_eq!(rig.status(&unmap(1, 0x1000, 0x1fff)), OK);
            round += 1;
        }
        is_over.store(true, Ordering::SeqCst);
    });
    assert_eq!(rig.pinned_bytes(), 0);
}

#[test]
fn mappings_of_a_device_are_bounded_in_bytes() {
    const MOST: u64 = 0x10000;
    let bytes: u64 = REGIONS.iter().map(|(_, bytes)| *bytes as u64).sum();
    let mut rig = Rig::new();
    assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
    let at = |index: u64| (index * MOST, (index + 1) * MOST - 1);
    for (index, status) in [(0, OK), (1, OK), (2, NOMEM)] {
        let (first, last) = at(index);
        assert_eq!(rig.status(&map(1, first, last, 0, 3)), status);
    }
    let rest = 2 * bytes - 2 * MOST;
    assert_eq!(rig.status(&map(1, 2 * MOST, 2 * MOST + rest - 1, 0, 3)), OK);
    assert_eq!(
        rig.status(&map(1, 8 * MOST, 8 * MOST + PAGE - 1, 0, 3)),
        NOMEM
    );
    assert_eq!(rig.device.counters()["host_mapped_bytes"], 2 * bytes);
    assert_eq!(rig.status(&unmap(1, 0, MOST - 1)), OK);
    assert_eq!(rig.status(&map(1, 8 * MOST, 8 * MOST + PAGE - 1, 0, 3)), OK);

    // A domain of emulated devices can have more, but then no assigned device joins it.
    assert_eq!(rig.status(&attach(2, OTHER, 0)), OK);
    for index in 0..3 {
        let (first, last) = at(index);
        assert_eq!(rig.status(&map(2, first, last, 0, 3)), OK);
    }
    assert_eq!(rig.status(&attach(2, ENDPOINT, 0)), NOMEM);
    assert_eq!(rig.accessible(), []);
    assert_eq!(rig.pinned_bytes(), 0);
    assert_eq!(rig.device.counters()["host_mapped_bytes"], 0);
}
