//! Measures the pauses of each device with the worst rings that it accepts, for the benchmark `pause`.
//!
//! The tests count work instead of time ([`super::turns`]). This benchmark shows the cost of that work on a host.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use vm_memory::GuestAddress;

use super::any_device::{self, NAMES};
use super::driver::MockPciDriver;
use super::qcow2::Qcow2;
use super::queue::Segment;
use super::ram::TestRam;
use super::turns::{DATA_AT, RAM_BYTES, RINGS, TABLE_ENTRIES, push_table, write_table};
use crate::block::{Block, BlockParams, EngineChoice, ImageFormat};
use crate::pci::PciFunction as _;

const LATER: Duration = Duration::from_millis(2);
const DISK_BYTES: u64 = 1 << 30;
const DISK_DATA_BYTES: u32 = 16 << 20;
const DISK_QUEUE_SIZE: u16 = 256;

/// The longest pause behind a ring.
#[derive(Debug)]
pub struct Pause {
    /// The device, and what is special about it.
    pub device: String,
    /// The content of its rings.
    pub ring: &'static str,
    /// The longest pause.
    pub longest: Duration,
}

/// Measures every device with this number of rounds per ring, each with a pause a little later, and calls `report` for
/// each ring.
///
/// # Panics
/// A device cannot be made.
pub fn measure(rounds: u32, mut report: impl FnMut(Pause)) {
    for (choice, name) in (0..).zip(NAMES) {
        for ring in RINGS {
            let ram = TestRam::new(RAM_BYTES);
            write_table(&ram, ring, TABLE_ENTRIES);
            let made = any_device::make(choice, &ram);
            let driver = MockPciDriver::new(made.device.clone(), &ram);
            let longest = longest(rounds, driver, |driver| {
                for index in 0..driver.num_queues() {
                    for _ in 0..driver.queue(index).size() {
                        push_table(driver.queue(index), TABLE_ENTRIES);
                    }
                }
            });
            report(Pause {
                device: name.to_owned(),
                ring: ring.name,
                longest,
            });
        }
    }
    disks(rounds, &mut report);
}

fn disks(rounds: u32, report: &mut impl FnMut(Pause)) {
    let subjects = [
        ("raw disk, system calls", EngineChoice::Sync, None),
        ("raw disk, best engine", EngineChoice::Auto, None),
        ("qcow2, clusters of 64 KiB", EngineChoice::Auto, Some(16)),
        ("qcow2, clusters of 512 bytes", EngineChoice::Auto, Some(9)),
    ];
    let sectors = (DISK_BYTES >> 9) as u32;
    let requests = [
        ("writes of 16 MiB", 1, None),
        ("reads of 16 MiB", 0, None),
        ("zeroes, 16 MiB", 13, Some(1 << 15)),
        ("discards of the whole disk", 11, Some(sectors)),
        ("flushes", 4, Some(0)),
    ];
    for (device, engine, cluster_bits) in subjects {
        let file = NamedTempFile::new().expect("files can be made");
        make_image(file.path(), cluster_bits);
        for (ring, kind, range) in requests {
            let ram = TestRam::new(RAM_BYTES);
            let driver = MockPciDriver::new(open(file.path(), engine, cluster_bits), &ram);
            let longest = longest(rounds, driver, |driver| fill(driver, kind, range));
            report(Pause {
                device: device.to_owned(),
                ring,
                longest,
            });
        }
    }
}

fn make_image(path: &Path, cluster_bits: Option<u32>) {
    let content = cluster_bits.map(|cluster_bits| {
        let image = Qcow2 {
            version: 3,
            cluster_bits,
            refcount_order: 4,
            disk_bytes: DISK_BYTES,
            backing: None,
            clusters: &[],
        };
        image.file()
    });
    let file = std::fs::File::options().write(true).open(path);
    let file = file.expect("it was just made");
    match content {
        Some(content) => std::fs::write(path, content).expect("the file system has room"),
        None => file.set_len(DISK_BYTES).expect("files can grow"),
    }
}

fn open(path: &Path, engine: EngineChoice, cluster_bits: Option<u32>) -> Arc<Mutex<Block>> {
    let format = cluster_bits.map_or(ImageFormat::Raw, |_| ImageFormat::Qcow2);
    let block = Block::new(BlockParams {
        id: "_disk0".into(),
        path: path.into(),
        num_queues: 1,
        queue_size: DISK_QUEUE_SIZE,
        sparse: true,
        format: Some(format),
        engine,
        ..BlockParams::default()
    });
    Arc::new(Mutex::new(block.expect("a sound image")))
}

/// Fills the ring with requests of this kind, whose data is in RAM, or with this many sectors.
fn fill(driver: &mut MockPciDriver, kind: u32, range: Option<u32>) {
    let queue = driver.queue(0);
    let chains = u64::from(queue.size()) / 3;
    for at in 0..chains {
        let sector = at * u64::from(DISK_DATA_BYTES >> 9) % (DISK_BYTES >> 9);
        let mut header = kind.to_le_bytes().to_vec();
        header.extend(0_u32.to_le_bytes());
        header.extend(if range.is_none() { sector } else { 0 }.to_le_bytes());
        let mut body = if kind == 11 { 0 } else { sector }.to_le_bytes().to_vec();
        body.extend(range.unwrap_or(0).to_le_bytes());
        body.extend(0_u32.to_le_bytes());
        let data = match (kind, range) {
            (1, _) => Segment::ReadableAt(GuestAddress(DATA_AT), DISK_DATA_BYTES),
            (0, _) => Segment::WritableAt(GuestAddress(DATA_AT), DISK_DATA_BYTES),
            (_, Some(0)) => Segment::Readable(&[]),
            _ => Segment::Readable(&body),
        };
        match (kind, range) {
            (_, Some(0)) => queue.push(&[Segment::Readable(&header), Segment::Writable(1)]),
            _ => queue.push(&[Segment::Readable(&header), data, Segment::Writable(1)]),
        };
    }
}

/// Pauses several times while the device serves full rings; returns the longest pause.
pub(super) fn longest(
    rounds: u32,
    mut driver: MockPciDriver,
    mut fill: impl FnMut(&mut MockPciDriver),
) -> Duration {
    let mut longest = Duration::ZERO;
    for round in 0..rounds {
        driver.start(u64::MAX);
        fill(&mut driver);
        for index in 0..driver.num_queues() {
            driver.kick(index);
        }
        let start = Instant::now();
        while start.elapsed() < LATER * round {
            std::thread::yield_now();
        }
        let start = Instant::now();
        driver.function.pause();
        longest = longest.max(start.elapsed());
        driver.function.resume();
    }
    longest
}
