//! Tests the device with a mock driver.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use state::Saved;
use vm_memory::Permissions;

use super::super::{Iommu, IommuHandle, IommuState};
use super::{Harness, attach, detach, iommu, map, probe, request, send, start, status, unmap};
use crate::device::VirtioDevice;
use crate::dma::{DmaEndpoint, DmaError, FAULTS_MAX, Piece};
use crate::testing::{HandlerHarness, Segment, conformance, wait_until};

const ENDPOINT: u32 = 0x18;
const OK: u8 = 0;
const INVAL: u8 = 4;
const RANGE: u8 = 5;
const NOENT: u8 = 6;

struct Rig {
    device: Iommu,
    handle: IommuHandle,
    endpoint: Arc<DmaEndpoint>,
    harness: Harness,
}

impl Rig {
    fn new() -> Self {
        let (mut device, handle) = iommu(64);
        let endpoint = handle.endpoint();
        endpoint.place(ENDPOINT);
        let harness = start(&mut device);
        Self {
            device,
            handle,
            endpoint,
            harness,
        }
    }

    fn send(&mut self, bytes: &[u8], writable: u32) -> Vec<u8> {
        send(&mut self.harness, bytes, writable)
    }

    fn status(&mut self, bytes: &[u8]) -> u8 {
        status(&mut self.harness, bytes)
    }

    fn translate(&self, input: u64, access: Permissions) -> Result<u64, DmaError> {
        let pieces = self.endpoint.access().translate(input, 1, access, 8);
        pieces.map(|pieces: Vec<Piece>| pieces[0].address)
    }

    fn counter(&self, name: &str) -> u64 {
        self.device.counters()[name]
    }
}

#[test]
fn iommu_conforms() {
    conformance("iommu", |_| Arc::new(Mutex::new(iommu(48).0)));
}

#[test]
fn configuration_has_page_sizes_range_and_probe_size() {
    let mut space = [0; 40];
    let (narrow, _) = iommu(40);
    narrow.read_config(0, &mut space);
    assert_eq!(space[0..8], 0x4020_1000_u64.to_le_bytes());
    assert_eq!(space[8..16], [0; 8]);
    assert_eq!(space[16..24], ((1_u64 << 40) - 1).to_le_bytes());
    assert_eq!(space[24..32], [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(space[32..36], 192_u32.to_le_bytes());
    assert_eq!(space[36..40], [1, 0, 0, 0]);
    assert_eq!(narrow.features() & 0x7f, 0b101_0101);
    assert_eq!(iommu(64).0.features() & 0x7f, 0b101_0100);
}

#[test]
fn requests_attach_map_unmap_and_detach() {
    let mut rig = Rig::new();
    assert_eq!(
        rig.translate(0x5000, Permissions::Write),
        Ok(0x5000),
        "bypass"
    );
    assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(
        rig.translate(0x5000, Permissions::Write),
        Err(DmaError::Fault)
    );
    assert_eq!(rig.status(&map(1, 0x5000, 0x5fff, 0x9000, 1)), OK);
    assert_eq!(rig.translate(0x5010, Permissions::Read), Ok(0x9010));
    assert_eq!(
        rig.translate(0x5010, Permissions::Write),
        Err(DmaError::Fault)
    );
    assert_eq!(rig.status(&unmap(1, 0x5000, 0x5fff)), OK);
    assert_eq!(
        rig.translate(0x5010, Permissions::Read),
        Err(DmaError::Fault)
    );
    assert_eq!(rig.status(&detach(1, ENDPOINT)), OK);
    // A domain that translates nothing.
    assert_eq!(rig.status(&attach(2, ENDPOINT, 1)), OK);
    assert_eq!(rig.translate(0x5010, Permissions::Read), Ok(0x5010));
    assert_eq!(rig.status(&map(2, 0, 0xfff, 0, 1)), INVAL);

    rig.harness.reset();
    rig.device.reset();
    rig.device.write_config(36, &[0]);
    assert_eq!(rig.counter("bad_requests"), 1, "before the features");
    rig.device.ack_features(rig.device.features());
    rig.device.write_config(36, &[0]);
    assert_eq!(
        rig.translate(0x5010, Permissions::Read),
        Err(DmaError::Fault),
        "no bypass"
    );
    rig.device.reset();
    let mut bypass = [1];
    rig.device.read_config(36, &mut bypass);
    assert_eq!(bypass, [0], "a reset does not change it");
    drop(rig.endpoint);
    rig.harness.activate().unwrap();
    let gone = rig.handle.endpoint();
    assert_eq!(
        gone.access().translate(0, 1, Permissions::Read, 1),
        Err(DmaError::Fault),
        "not on the bus"
    );
}

#[test]
fn requests_that_are_wrong_get_the_status_of_their_fault() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(&attach(1, 0x99, 0)), NOENT);
    assert_eq!(rig.status(&attach(1, ENDPOINT, 2)), INVAL);
    assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(rig.status(&map(1, 0x800, 0xfff, 0, 1)), RANGE);
    assert_eq!(
        rig.status(&map(1, 0, 0xfff, 0, 4)),
        INVAL,
        "MMIO is not offered"
    );
    assert_eq!(rig.status(&unmap(9, 0, 0xfff)), NOENT);
    let mut reserved = attach(1, ENDPOINT, 0);
    reserved[17] = 1;
    assert_eq!(rig.status(&reserved), INVAL);
    assert_eq!(rig.counter("refused_requests"), 6);

    // Requests without a result: of an unknown type, too short, too long, with another room for the result.
    assert_eq!(rig.counter("bad_requests"), 0);
    for bytes in [
        request(6, &[&[0; 16]]),
        request(0, &[]),
        vec![1],
        attach(1, ENDPOINT, 0)[..19].to_vec(),
        request(2, &[&[0; 17]]),
        request(3, &[&[0; 500]]),
    ] {
        assert!(rig.send(&bytes, 4).is_empty());
    }
    for room in [0, 3, 5] {
        assert!(rig.send(&attach(1, ENDPOINT, 0), room).is_empty());
    }
    assert!(rig.send(&probe(ENDPOINT), 197).is_empty());
    assert_eq!(rig.counter("bad_requests"), 10);
}

#[test]
fn reserved_bytes_mean_nothing_except_in_an_attachment() {
    let mut rig = Rig::new();
    let dirty = |mut bytes: Vec<u8>, reserved: std::ops::Range<usize>| {
        bytes[1..4].fill(0xff);
        bytes[reserved].fill(0xff);
        bytes
    };
    assert_eq!(rig.status(&dirty(attach(1, ENDPOINT, 0), 0..0)), OK);
    assert_eq!(rig.status(&dirty(map(1, 0, 0xfff, 0, 1), 0..0)), OK);
    assert_eq!(rig.status(&dirty(unmap(1, 0, 0xfff), 24..28)), OK);
    assert_eq!(rig.counter("mappings"), 0);
    let probed = rig.send(&dirty(probe(ENDPOINT), 8..72), 28);
    assert_eq!(probed[24], OK);
    assert_eq!(rig.status(&dirty(detach(1, ENDPOINT), 12..20)), OK);
    assert_eq!(rig.counter("refused_requests"), 0);
}

#[test]
fn driver_can_use_only_what_it_has_negotiated() {
    let (mut device, _handle) = iommu(64);
    let handler = device.take_handlers().remove(0);
    let (map_unmap, bypass_config) = (1 << 2, 1 << 6);
    let mut harness = HandlerHarness::new(handler, device.features() & !map_unmap & !bypass_config);
    harness.add_queues(2);
    harness.activate().unwrap();
    let mut send = |bytes: &[u8]| {
        let segments = [Segment::Readable(bytes), Segment::Writable(4)];
        let (chain, used) = harness.request(0, &segments).unwrap();
        let status = harness.queue(0).read_buffer(chain.buffers[1])[0];
        (used.unwrap().len == 4).then_some(status)
    };
    assert_eq!(send(&attach(1, ENDPOINT, 1)), Some(INVAL));
    assert_eq!(send(&map(1, 0, 0xfff, 0, 1)), None);
    assert_eq!(send(&unmap(1, 0, 0xfff)), None);
    assert_eq!(device.counters()["bad_requests"], 2);
}

#[test]
fn request_that_takes_memory_away_is_answered_after_the_last_access() {
    let removals = [
        unmap(1, 0, u64::MAX),
        detach(1, ENDPOINT),
        attach(2, ENDPOINT, 0),
    ];
    for removal in removals {
        let mut rig = Rig::new();
        let bypassing = rig.endpoint.access();
        let is_over = Arc::new(AtomicBool::new(false));
        // The access before the attachment is one to all of RAM.
        let over = Arc::clone(&is_over);
        let ending = thread::spawn(move || {
            over.store(true, Ordering::SeqCst);
            drop(bypassing);
        });
        assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
        assert!(is_over.load(Ordering::SeqCst));
        ending.join().unwrap();

        rig.device.write_config(36, &[0]);
        assert_eq!(rig.status(&map(1, 0, 0xfff, 0, 3)), OK);
        let access = rig.endpoint.access();
        assert!(access.translate(0, 8, Permissions::Write, 1).is_ok());
        // Neither a new mapping nor the removal of none takes anything away.
        assert_eq!(rig.status(&map(1, 0x2000, 0x2fff, 0, 3)), OK);
        assert_eq!(rig.status(&unmap(1, 0x8000, 0xffff)), OK);
        let endpoint = Arc::clone(&rig.endpoint);
        let over = Arc::new(AtomicBool::new(false));
        let ending = thread::spawn({
            let over = Arc::clone(&over);
            move || {
                let refused = || {
                    endpoint
                        .access()
                        .translate(0, 8, Permissions::Write, 1)
                        .is_err()
                };
                wait_until("the change of the tables", refused);
                over.store(true, Ordering::SeqCst);
                drop(access);
            }
        });
        assert_eq!(rig.status(&removal), OK);
        assert!(over.load(Ordering::SeqCst), "{removal:x?}");
        ending.join().unwrap();
    }
}

#[test]
fn probe_reserves_the_addresses_of_interrupts() {
    let mut rig = Rig::new();
    let mut expected = vec![1, 0, 20, 0, 1, 0, 0, 0];
    expected.extend(0xfee0_0000_u64.to_le_bytes());
    expected.extend(0xfeef_ffff_u64.to_le_bytes());
    expected.extend([OK, 0, 0, 0]);
    assert_eq!(rig.send(&probe(ENDPOINT), 28), expected);
    let unknown = rig.send(&probe(0x99), 28);
    assert_eq!(unknown[..24], [0; 24]);
    assert_eq!(unknown[24..], [NOENT, 0, 0, 0]);
    // Without space for the property.
    for room in [4, 27] {
        let short = rig.send(&probe(ENDPOINT), room);
        let (properties, tail) = short.split_at(short.len() - 4);
        assert_eq!(properties, vec![0; room as usize - 4]);
        assert_eq!(tail, [INVAL, 0, 0, 0]);
    }
}

#[test]
fn faults_are_reported_once_the_driver_has_room_for_them() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
    rig.translate(0x1234_5678, Permissions::Write).unwrap_err();
    rig.harness.serve_sources(0).unwrap();
    assert_eq!(rig.harness.interrupt.queue_signals(1), 0);

    let (chain, used) = rig.harness.request(1, &[Segment::Writable(24)]).unwrap();
    assert_eq!(used.unwrap().len, 24);
    let report = rig.harness.queue(1).read_buffer(chain.buffers[0]);
    // No mapping; a write whose address is known.
    assert_eq!(report[0..8], [2, 0, 0, 0, 2, 1, 0, 0]);
    assert_eq!(report[8..16], [0x18, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(report[16..24], 0x1234_5678_u64.to_le_bytes());
    assert_eq!(rig.harness.interrupt.queue_signals(1), 1);

    // A buffer that waits gets the next fault, once; one that is too short gets none.
    rig.harness.queue(1).push(&[Segment::Writable(23)]);
    let waiting = rig.harness.queue(1).push(&[Segment::Writable(64)]);
    rig.harness.kick(1).unwrap();
    assert_eq!(rig.harness.queue(1).pop_used(), None);
    rig.translate(0, Permissions::Read).unwrap_err();
    assert_eq!(rig.harness.serve_sources(1000).unwrap(), 1);
    assert_eq!(rig.harness.queue(1).pop_used().unwrap().len, 0);
    assert_eq!(rig.harness.queue(1).pop_used().unwrap().len, 24);
    let report = rig.harness.queue(1).read_buffer(waiting.buffers[0]);
    assert_eq!(report[4..8], [1, 1, 0, 0]);

    // A driver without buffers loses all but the first.
    for _ in 0..FAULTS_MAX + 5 {
        rig.translate(0, Permissions::Read).unwrap_err();
    }
    rig.harness.serve_sources(1000).unwrap();
    assert_eq!(rig.counter("dropped_faults"), 5);
    assert_eq!(rig.counter("faults"), 2 + FAULTS_MAX as u64 + 5);
}

#[test]
fn state_keeps_domains_for_devices_that_are_plugged_in_later() {
    let mut rig = Rig::new();
    let other = rig.handle.endpoint();
    other.place(0x20);
    for bytes in [
        attach(1, ENDPOINT, 0),
        map(1, 0x5000, 0x6fff, 0x9000, 3),
        map(1, u64::MAX - 0xfff, u64::MAX, 0, 1),
        attach(2, 0x20, 1),
    ] {
        assert_eq!(rig.status(&bytes), OK);
    }
    rig.device.write_config(36, &[0]);
    let saved = rig.device.state();

    let (mut device, handle) = iommu(64);
    device.restore(&saved).unwrap();
    assert_eq!(device.state(), saved);
    let endpoint = handle.endpoint();
    endpoint.place(ENDPOINT);
    let found = endpoint
        .access()
        .translate(0x5ffe, 4, Permissions::ReadWrite, 8);
    let expected = Piece {
        address: 0x9ffe,
        bytes: 4,
    };
    assert_eq!(found, Ok(vec![expected]));
    assert_eq!(device.counters()["mappings"], 2);
    assert_eq!(device.state(), saved);
}

#[test]
fn states_that_no_iommu_has_are_refused() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(rig.status(&map(1, 0x5000, 0x6fff, 0x9000, 3)), OK);
    let state: IommuState = rig.device.state().read().unwrap();
    let damaged = |damage: fn(&mut IommuState)| {
        let mut state = state.clone();
        damage(&mut state);
        let refused = iommu(64).0.restore(&Saved::of(&state));
        refused.unwrap_err().to_string()
    };
    for damage in [
        (|state| state.domains[0].endpoints.clear()) as fn(&mut IommuState),
        |state| state.domains[0].endpoints.push(ENDPOINT),
        |state| state.domains.push(state.domains[0].clone()),
        |state| state.domains[0].mappings.0.push(0),
        |state| state.domains[0].mappings.0[24] = 4,
        |state| state.domains[0].mappings.0[0] = 1,
        |state| state.domains[0].bypass = true,
        |state| state.domains[0].mappings.0.extend_from_within(..),
    ] {
        let error = damaged(damage);
        assert!(error.contains("domain"), "{error}");
    }
    // Input addresses that a narrower IOMMU does not have.
    let mut wide = state.clone();
    wide.domains[0].mappings.0[5] = 1;
    wide.domains[0].mappings.0[13] = 1;
    iommu(64).0.restore(&Saved::of(&wide)).unwrap();
    iommu(40).0.restore(&Saved::of(&wide)).unwrap_err();
}
