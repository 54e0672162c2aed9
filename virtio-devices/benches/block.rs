//! Compares the two I/O engines of the disk on a real file, from the ring and back to it. If `qemu-img` is installed,
//! it also measures a qcow2 image with the same content.
//!
//! Reports requests and bytes per second for each workload and engine, and the processor time of the whole process per
//! request. This time includes the kernel, and the mock driver, whose part is the same for both engines. The file is
//! created in the current directory, or in `BENCH_DIR`.
//!
//! `cargo bench -p virtio-devices --features test-utils --bench block`
#![allow(unsafe_code)]
// UNSAFETY: `getrusage` for the processor time, `posix_fadvise` to empty the cache.

use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use virtio_devices::block::{Block, BlockParams, EngineChoice, ImageFormat, SECTOR_BYTES};
use virtio_devices::testing::{HandlerHarness, Segment};
use virtio_devices::{QueueHandler, VirtioDevice};
use vm_memory::GuestAddress;

const FILE_BYTES: u64 = 512 << 20;
const QUEUE_SIZE: u16 = 128;
const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;
/// Number of runs per figure. The figure is their median.
const RUNS: usize = 3;
const RUN: Duration = Duration::from_millis(700);

#[derive(Clone, Copy)]
struct Workload {
    name: &'static str,
    write: bool,
    random: bool,
    bytes: u32,
    depth: usize,
}

const WORKLOADS: [Workload; 7] = [
    workload("4k random read, depth 1", false, true, 4 << 10, 1),
    workload("4k random read, depth 32", false, true, 4 << 10, 32),
    workload("4k random write, depth 1", true, true, 4 << 10, 1),
    workload("4k random write, depth 32", true, true, 4 << 10, 32),
    workload("1M sequential read, depth 1", false, false, 1 << 20, 1),
    workload("1M sequential read, depth 8", false, false, 1 << 20, 8),
    workload("1M sequential write, depth 8", true, false, 1 << 20, 8),
];

const fn workload(
    name: &'static str,
    write: bool,
    random: bool,
    bytes: u32,
    depth: usize,
) -> Workload {
    Workload {
        name,
        write,
        random,
        bytes,
        depth,
    }
}

/// One request slot: header, data and status, reused for every request.
struct Slot {
    header: GuestAddress,
    data: GuestAddress,
    status: GuestAddress,
}

struct Bench {
    harness: HandlerHarness<Box<dyn QueueHandler>>,
    /// Keeps the counters and the image.
    _block: Block,
    seed: u64,
    next: u64,
}

/// An image, and how it is served.
#[derive(Clone, Copy)]
struct Subject<'a> {
    name: &'a str,
    file: &'a NamedTempFile,
    format: ImageFormat,
    engine: EngineChoice,
}

impl Bench {
    fn new(subject: Subject<'_>, direct: bool) -> Self {
        let mut block = Block::new(BlockParams {
            id: "bench".into(),
            path: subject.file.path().into(),
            direct,
            num_queues: 1,
            queue_size: QUEUE_SIZE,
            sparse: true,
            format: Some(subject.format),
            engine: subject.engine,
            ..BlockParams::default()
        })
        .expect("the file can be opened that way");
        // The mock driver does not set `used_event`.
        let features = block.features() & !VIRTIO_RING_F_EVENT_IDX;
        let mut harness = HandlerHarness::new(block.take_handlers().remove(0), features);
        harness.add_queue(0, QUEUE_SIZE);
        harness.activate().expect("the device activates");
        Self {
            harness,
            _block: block,
            seed: 0x9e37_79b9_7f4a_7c15,
            next: 0,
        }
    }

    /// Number of requests completed in [`RUN`], and the actual duration.
    fn run(&mut self, workload: Workload) -> (u64, Duration, Duration) {
        let slots = self.slots(workload);
        let mut free: Vec<usize> = (0..slots.len()).collect();
        let mut slot_of_head = vec![0; usize::from(QUEUE_SIZE)];
        let (start, cpu) = (Instant::now(), cpu_time());
        let mut done = 0;
        while start.elapsed() < RUN {
            while let Some(slot) = free.pop() {
                let head = self.push(&slots[slot], workload);
                slot_of_head[usize::from(head)] = slot;
            }
            self.harness.kick(0).expect("the device continues");
            loop {
                while let Some(used) = self.harness.queue(0).pop_used() {
                    free.push(slot_of_head[used.head as usize]);
                    done += 1;
                }
                if !free.is_empty() {
                    break;
                }
                self.harness
                    .serve_sources(1000)
                    .expect("the device continues");
            }
        }
        let figures = (done, start.elapsed(), cpu_time() - cpu);
        self.harness.reset();
        self.harness.activate().expect("the device activates");
        figures
    }

    fn slots(&self, workload: Workload) -> Vec<Slot> {
        let ram = &self.harness.ram;
        (0..workload.depth)
            .map(|_| Slot {
                header: ram.alloc(16, 16),
                data: ram.alloc(u64::from(workload.bytes), 4096),
                status: ram.alloc(1, 1),
            })
            .collect()
    }

    fn push(&mut self, slot: &Slot, workload: Workload) -> u16 {
        let blocks = FILE_BYTES / u64::from(workload.bytes);
        let block = if workload.random {
            // xorshift64
            self.seed ^= self.seed << 13;
            self.seed ^= self.seed >> 7;
            self.seed ^= self.seed << 17;
            self.seed % blocks
        } else {
            self.next = (self.next + 1) % blocks;
            self.next
        };
        let sector = block * u64::from(workload.bytes) / SECTOR_BYTES;
        let mut header = [0; 16];
        header[0] = u8::from(workload.write);
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.harness.ram.write(slot.header, &header);
        let data = if workload.write {
            Segment::ReadableAt(slot.data, workload.bytes)
        } else {
            Segment::WritableAt(slot.data, workload.bytes)
        };
        let chain = self.harness.queue(0).push(&[
            Segment::ReadableAt(slot.header, 16),
            data,
            Segment::WritableAt(slot.status, 1),
        ]);
        chain.head
    }
}

fn cpu_time() -> Duration {
    // SAFETY: `rusage` is plain data, and getrusage writes one.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let time = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec as u64) + Duration::from_micros(time.tv_usec as u64)
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Location of the data when a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cache {
    /// In the page cache.
    Hot,
    /// On the disk, read through the page cache.
    Cold,
    /// On the disk, bypassing the page cache.
    Direct,
}

impl Cache {
    fn prepare(self, file: &NamedTempFile) {
        let mut file = file.as_file();
        if self == Self::Hot {
            file.seek(SeekFrom::Start(0)).expect("files can be rewound");
            std::io::copy(&mut file, &mut std::io::sink()).expect("the disk works");
            return;
        }
        file.sync_all().expect("the disk works");
        // SAFETY: takes numbers only.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }
}

fn measure(subject: Subject<'_>, cache: Cache, workload: Workload) -> u64 {
    let mut figures: Vec<(u64, f64)> = (0..RUNS)
        .map(|_| {
            cache.prepare(subject.file);
            let mut bench = Bench::new(subject, cache == Cache::Direct);
            let (done, wall, cpu) = bench.run(workload);
            let per_second = done as f64 / wall.as_secs_f64();
            (per_second as u64, cpu.as_secs_f64() * 1e6 / done as f64)
        })
        .collect();
    figures.sort_by_key(|(per_second, _)| *per_second);
    let (per_second, cpu_us) = figures[RUNS / 2];
    println!(
        "{:30} {:9} {:8} {:>9} req/s {:>7} MB/s {:>8.1} us cpu/req",
        workload.name,
        format!("{cache:?}"),
        subject.name,
        per_second,
        per_second * u64::from(workload.bytes) / 1_000_000,
        cpu_us
    );
    per_second
}

/// A fully allocated qcow2 image with this content. `None` without `qemu-img`.
fn qcow2_of(file: &NamedTempFile) -> Option<NamedTempFile> {
    let folder = file.path().parent().expect("a file is in a folder");
    let image = NamedTempFile::new_in(folder).expect("the directory is writable");
    let made = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([file.path(), image.path()])
        .status();
    if let Err(error) = made {
        println!("no qcow2 image: qemu-img: {error}");
        return None;
    }
    image.as_file().sync_all().expect("the disk works");
    Some(image)
}

fn main() {
    // `cargo test --benches` runs this too, to check that it starts.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let dir = std::env::var("BENCH_DIR").unwrap_or_else(|_| ".".into());
    let mut file = NamedTempFile::new_in(dir).expect("the directory is writable");
    let chunk = vec![0xa5; 1 << 20];
    for _ in 0..FILE_BYTES >> 20 {
        file.write_all(&chunk).expect("the disk has room");
    }
    file.as_file().sync_all().expect("the disk works");
    let qcow2 = qcow2_of(&file);
    let raw = |name, engine| Subject {
        name,
        file: &file,
        format: ImageFormat::Raw,
        engine,
    };
    for cache in [Cache::Hot, Cache::Cold, Cache::Direct] {
        for workload in WORKLOADS {
            let sync = measure(raw("Sync", EngineChoice::Sync), cache, workload);
            let ring = measure(raw("IoUring", EngineChoice::IoUring), cache, workload);
            println!("{:>40} {:.2}", "IoUring / Sync", ring as f64 / sync as f64);
            let Some(file) = &qcow2 else {
                continue;
            };
            let subject = Subject {
                name: "qcow2",
                file,
                format: ImageFormat::Qcow2,
                engine: EngineChoice::Auto,
            };
            let qcow2 = measure(subject, cache, workload);
            println!(
                "{:>40} {:.2}",
                "qcow2 / IoUring",
                qcow2 as f64 / ring as f64
            );
        }
    }
}
