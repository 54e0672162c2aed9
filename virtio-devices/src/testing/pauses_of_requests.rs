//! Rings of valid requests, of which each is as much work as its device accepts. Part of the benchmark `pause`: rings of
//! arbitrary descriptors ([`super::turns`]) contain few valid requests.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use vm_memory::GuestAddress;

use super::any_device::{self, NAMES};
use super::driver::MockPciDriver;
use super::pauses::{Pause, longest};
use super::queue::Segment;
use super::ram::TestRam;
use super::turns::RAM_BYTES;
use super::{MockHostIommu, TestBlocks, wait_until};
use crate::dma::{DmaEndpoint, MAPPINGS_MAX};
use crate::iommu::{Iommu, IommuParams};
use crate::mem::{Mem, MemParams, MemRegion};

const PAGE: u64 = 4096;
/// Requests are written here; rings and other buffers are below.
const REQUESTS_AT: u64 = 16 << 20;
/// Memory that requests name.
const NAMED_AT: u64 = 32 << 20;
/// Maximum number of pages in a chain of the balloon.
const PFNS: u64 = 4096;
/// Of virtio-mem.
const REGION_AT: u64 = 1 << 32;
const REGION_BYTES: u64 = 256 << 20;
const BLOCK_BYTES: u64 = 2 << 20;
/// Maximum number of mappings that VFIO accepts by default (`dma_entry_limit`).
const HOST_MAPPINGS: usize = 65_535;
const ENDPOINT: u32 = 0x18;
/// A device of the VMM in the same domain, so that the domain exists without the other one.
const OTHER: u32 = 0x20;

/// Measures them as [`super::pauses::measure`] does, and calls `report` for each ring.
///
/// # Panics
/// A device cannot be made.
pub fn measure(rounds: u32, mut report: impl FnMut(Pause)) {
    let mut report = |device: &str, ring, longest: Duration| {
        report(Pause {
            device: device.to_owned(),
            ring,
            longest,
        });
    };
    let pause = inflations(rounds);
    report("balloon", "inflations of scattered pages", pause);
    let pause = blocks(rounds);
    report("mem", "256 MiB plugged and unplugged", pause);
    for (name, ring) in [
        ("net", "frames of 64 KiB"),
        ("pmem", "flushes"),
        ("watchdog", "pings"),
    ] {
        report(name, ring, simple(rounds, name));
    }
    let pause = mappings(rounds, MAPPINGS_MAX - 1, false);
    report("iommu", "unmapping of 262,143 mappings", pause);
    let pause = mappings(rounds, HOST_MAPPINGS, true);
    let ring = "attachments and unmappings, 65,535 mappings of an assigned device";
    report("iommu", ring, pause);
}

fn made(name: &str, ram: &TestRam) -> any_device::Made {
    let mut choices = (0..).zip(NAMES);
    let choice = choices.find(|(_, it)| *it == name).map(|(at, _)| at);
    any_device::make(choice.expect("a known device"), ram)
}

fn inflations(rounds: u32) -> Duration {
    let ram = TestRam::new(RAM_BYTES);
    // No two pages can be discarded together.
    let pages = (0..PFNS).map(|at| NAMED_AT + 2 * at * PAGE);
    let pfns = pages
        .clone()
        .flat_map(|page| ((page / PAGE) as u32).to_le_bytes());
    ram.write(GuestAddress(REQUESTS_AT), &pfns.collect::<Vec<u8>>());
    let made = made("balloon", &ram);
    let driver = MockPciDriver::new(made.device.clone(), &ram);
    longest(rounds, driver, |driver| {
        pages
            .clone()
            .for_each(|page| ram.write(GuestAddress(page), &[1]));
        let queue = driver.queue(0);
        for _ in 0..queue.size() {
            queue.push(&[Segment::ReadableAt(
                GuestAddress(REQUESTS_AT),
                4 * PFNS as u32,
            )]);
        }
    })
}

fn blocks(rounds: u32) -> Duration {
    let ram = TestRam::from_regions(&[(0, RAM_BYTES), (REGION_AT, REGION_BYTES as usize)]);
    let (device, _handle) = Mem::new(MemParams {
        id: "mem0".into(),
        region: MemRegion::new(REGION_AT, REGION_BYTES, BLOCK_BYTES).expect("aligned"),
        ram: ram.mem(),
        access: Arc::new(TestBlocks::new(BLOCK_BYTES)),
        requested_bytes: REGION_BYTES,
        node: None,
    })
    .expect("descriptors");
    let driver = MockPciDriver::new(Arc::new(Mutex::new(device)), &ram);
    let request = |kind: u16| {
        let mut bytes = u64::from(kind).to_le_bytes().to_vec();
        bytes.extend(REGION_AT.to_le_bytes());
        bytes.extend((REGION_BYTES / BLOCK_BYTES).to_le_bytes());
        bytes
    };
    // Plug, unplug.
    let requests = [request(0), request(1)];
    longest(rounds, driver, |driver| {
        for page in 0..REGION_BYTES / PAGE {
            ram.write(GuestAddress(REGION_AT + page * PAGE), &[1]);
        }
        let queue = driver.queue(0);
        for at in 0..usize::from(queue.size()) / 2 {
            queue.push(&[Segment::Readable(&requests[at % 2]), Segment::Writable(10)]);
        }
    })
}

/// A device whose valid requests differ only in their data.
fn simple(rounds: u32, name: &str) -> Duration {
    let ram = TestRam::new(RAM_BYTES);
    let made = made(name, &ram);
    let driver = MockPciDriver::new(made.device.clone(), &ram);
    let data = GuestAddress(NAMED_AT);
    let chain = match name {
        // Header, Ethernet, and the longest packet.
        "net" => vec![Segment::ReadableAt(data, 12 + 14 + 65_535)],
        "pmem" => vec![Segment::ReadableAt(data, 4), Segment::WritableAt(data, 4)],
        _ => vec![Segment::WritableAt(data, 1)],
    };
    let index = u16::from(name == "net");
    longest(rounds, driver, |driver| {
        let queue = driver.queue(index);
        for _ in 0..usize::from(queue.size()) / chain.len() {
            queue.push(&chain);
        }
    })
}

/// Requests that concern this number of mappings.
fn mappings(rounds: u32, count: usize, is_hosted: bool) -> Duration {
    let ram = TestRam::new(RAM_BYTES);
    let (device, handle) = Iommu::new(IommuParams {
        id: "__iommu",
        address_width_bits: 64,
    })
    .expect("descriptors");
    let endpoint: Arc<DmaEndpoint> = if is_hosted {
        handle.endpoint_of_host(Arc::new(MockHostIommu::new(count)), ram.mem())
    } else {
        handle.endpoint()
    };
    endpoint.place(ENDPOINT);
    let other = handle.endpoint();
    other.place(OTHER);
    let driver = MockPciDriver::new(Arc::new(Mutex::new(device)), &ram);
    longest(rounds, driver, |driver| {
        ask(driver, &ram, [attach(1, OTHER)]);
        ask(driver, &ram, (0..count as u64).map(map));
        let queue = driver.queue(0);
        for at in 0..usize::from(queue.size()) / 4 {
            // The second domain is empty. The mappings are in the first one until the end.
            let requests = match is_hosted {
                true if at % 2 == 0 => attach(1, ENDPOINT),
                true if at < 8 => attach(2, ENDPOINT),
                _ => unmap(),
            };
            queue.push(&[Segment::Readable(&requests), Segment::Writable(4)]);
        }
    })
}

/// Makes requests and waits for them.
fn ask(driver: &mut MockPciDriver, ram: &TestRam, requests: impl IntoIterator<Item = Vec<u8>>) {
    const BYTES: u64 = 64;
    let mut requests = requests.into_iter().peekable();
    while requests.peek().is_some() {
        let queue = driver.queue(0);
        let places = (0..u64::from(queue.size()) / 2).map(|at| REQUESTS_AT + at * BYTES);
        let mut asked = queue.used_idx();
        for (place, request) in places.zip(&mut requests) {
            ram.write(GuestAddress(place), &request);
            let status = GuestAddress(place + BYTES - 4);
            let bytes = request.len() as u32;
            queue.push(&[
                Segment::ReadableAt(GuestAddress(place), bytes),
                Segment::WritableAt(status, 4),
            ]);
            asked = asked.wrapping_add(1);
        }
        driver.kick(0);
        wait_until("the answers", || driver.queue(0).used_idx() == asked);
        while driver.queue(0).pop_used().is_some() {}
    }
}

fn request(kind: u8, ids: &[u32], addresses: &[u64], flags: u32) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
    bytes.extend(addresses.iter().flat_map(|at| at.to_le_bytes()));
    bytes.extend(flags.to_le_bytes());
    bytes
}

fn attach(domain: u32, endpoint: u32) -> Vec<u8> {
    request(1, &[domain, endpoint, 0], &[], 0)
}

/// A mapping apart from the others, of one of a few pages.
fn map(number: u64) -> Vec<u8> {
    let first = (1 << 32) + 2 * number * PAGE;
    let to = NAMED_AT + number % 64 * PAGE;
    request(3, &[1], &[first, first + PAGE - 1, to], 3)
}

fn unmap() -> Vec<u8> {
    request(4, &[1], &[0, u64::MAX], 0)
}
