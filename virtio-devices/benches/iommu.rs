//! Measures requests of the virtual IOMMU, and their cost for a device behind it.
//!
//! | Line | Meaning |
//! | --- | --- |
//! | `map and unmap` | two requests through the queue, as Linux sends them for a DMA buffer, among this number of mappings |
//! | `request` | a request of 64 bytes to the entropy device: in front of the IOMMU, and behind it |
//!
//! `cargo bench -p virtio-devices --features test-utils --bench iommu`

use std::fs::File;
use std::time::{Duration, Instant};

use virtio_devices::iommu::{Iommu, IommuHandle, IommuParams};
use virtio_devices::rng::Rng;
use virtio_devices::testing::{HandlerHarness, Segment};
use virtio_devices::{QueueHandler, VirtioDevice};

const ENDPOINT: u32 = 0x18;
const DOMAIN: u32 = 1;
const PAGE: u64 = 4096;
/// Rings and buffers of the entropy device are below.
const RAM_BYTES: u64 = 64 << 20;
/// Input addresses of other mappings start here.
const OTHERS: u64 = 1 << 40;
/// Pairs, or requests, per measurement. The median of the rounds counts.
const BATCH: u32 = 1000;
const ROUNDS: usize = 31;

type Harness = HandlerHarness<Box<dyn QueueHandler>>;

fn main() {
    // `cargo test --bench` runs each way once.
    let measuring = std::env::args().any(|argument| argument == "--bench");
    let rounds = if measuring { ROUNDS } else { 1 };
    for others in [0, 1000, 100_000] {
        let (handle, mut iommu) = iommu();
        let endpoint = handle.endpoint();
        endpoint.place(ENDPOINT);
        send(&mut iommu, &attach());
        for number in 0..others {
            send(&mut iommu, &map(OTHERS + 2 * number * PAGE, PAGE));
        }
        // In the middle of the others: at their edge, a lookup or a removal can be cheaper.
        let between = OTHERS + (others | 1) * PAGE;
        let time = median(rounds, || {
            send(&mut iommu, &map(between, PAGE));
            send(&mut iommu, &unmap(between, PAGE));
        });
        println!("map and unmap, {others} other mappings: {time:?}");
    }
    let times = [false, true].map(|is_behind| {
        let (handle, mut iommu) = iommu();
        let mut rng = rng();
        if is_behind {
            let endpoint = handle.endpoint();
            endpoint.place(ENDPOINT);
            rng.dma = Some(endpoint);
            send(&mut iommu, &attach());
            // In pages, as for a driver that maps each buffer: a lookup among many.
            for page in 0..RAM_BYTES / PAGE {
                send(&mut iommu, &map(page * PAGE, PAGE));
            }
        }
        rng.activate().expect("rings in RAM");
        let buffer = rng.ram.alloc(64, 64);
        median(rounds, || {
            let segments = [Segment::WritableAt(buffer, 64)];
            let (_, used) = rng.request(0, &segments).expect("mapped");
            assert_eq!(used.map(|used| used.len), Some(64));
        })
    });
    let [in_front, behind] = times;
    let ratio = behind.as_secs_f64() / in_front.as_secs_f64();
    println!("request in front of the IOMMU: {in_front:?}, behind it: {behind:?} ({ratio:.2})");
}

/// The median time of one call.
fn median(rounds: usize, mut call: impl FnMut()) -> Duration {
    let mut times: Vec<Duration> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            (0..BATCH).for_each(|_| call());
            start.elapsed() / BATCH
        })
        .collect();
    times.sort_unstable();
    times[rounds / 2]
}

fn iommu() -> (IommuHandle, Harness) {
    let params = IommuParams {
        id: "__iommu",
        address_width_bits: 64,
    };
    let (mut iommu, handle) = Iommu::new(params).expect("descriptors");
    let mut harness = harness(&mut iommu, 2);
    harness.activate().expect("rings in RAM");
    (handle, harness)
}

fn rng() -> Harness {
    let source = File::open("/dev/zero").expect("always there");
    harness(&mut Rng::new("__rng", source), 1)
}

fn harness(device: &mut dyn VirtioDevice, queues: u16) -> Harness {
    let handler = device.take_handlers().remove(0);
    let mut harness = HandlerHarness::new(handler, device.features());
    harness.add_queues(queues);
    harness
}

/// Sends a request, which must succeed. It is always at the same place in RAM.
fn send(iommu: &mut Harness, request: &[u8]) {
    const REQUEST: u64 = 32 << 20;
    let at = |address| vm_memory::GuestAddress(address);
    iommu.ram.write(at(REQUEST), request);
    let segments = [
        Segment::ReadableAt(at(REQUEST), request.len() as u32),
        Segment::WritableAt(at(REQUEST + 1024), 4),
    ];
    iommu.request(0, &segments).expect("rings in RAM");
    assert_eq!(iommu.ram.read(at(REQUEST + 1024), 1), [0]);
}

fn attach() -> Vec<u8> {
    let mut bytes = vec![1, 0, 0, 0];
    bytes.extend(DOMAIN.to_le_bytes());
    bytes.extend(ENDPOINT.to_le_bytes());
    bytes.extend([0; 8]);
    bytes
}

/// An identity mapping for both directions.
fn map(first: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![3, 0, 0, 0];
    bytes.extend(DOMAIN.to_le_bytes());
    for address in [first, first + length - 1, first] {
        bytes.extend(address.to_le_bytes());
    }
    bytes.extend(3_u32.to_le_bytes());
    bytes
}

fn unmap(first: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![4, 0, 0, 0];
    bytes.extend(DOMAIN.to_le_bytes());
    for address in [first, first + length - 1] {
        bytes.extend(address.to_le_bytes());
    }
    bytes.extend([0; 4]);
    bytes
}
