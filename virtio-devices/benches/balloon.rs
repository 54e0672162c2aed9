//! What the balloon costs beside the system calls it cannot do without.
//!
//! Every `device` figure has a `bare` one over the same ranges: the fewest system
//! calls that free them, with nothing around. `kick` includes reading the ring,
//! validating, merging, discarding, answering and accounting.
//!
//! * `report`: 32 ranges of 2 or 4 MiB, no two adjacent, on each backing.
//! * `report-absent`: the same with nothing left to free, which leaves the
//!   device's own time bare.
//! * `inflate`: 256 scattered pages, against one `madvise` for each as other
//!   devices do it, with the process otherwise idle and with a busy thread,
//!   which is what vCPUs are.
//! * `inflate-contiguous`: 256 adjacent pages against one `madvise` over all.
//! * `residency`: a sample over 1 GiB, touched and untouched.
//!
//! `cargo bench -p virtio-devices --features test-utils --bench balloon`
#![allow(unsafe_code)]
// UNSAFETY: the bare system calls are what is compared with.

use std::fs::File;
use std::hint::black_box;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use virtio_devices::balloon::spec::{
    VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_F_VERSION_1,
};
use virtio_devices::balloon::{Balloon, BalloonParams};
use virtio_devices::reclaim::ResidencyProbe;
use virtio_devices::testing::{HandlerHarness, Segment, TestRam};
use virtio_devices::{GuestRam, QueueHandler, VirtioDevice};
use vm_memory::{FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Rings and lists lie below, what is given away above.
const FREE_START: u64 = 16 * MIB;
const INFLATE: u16 = 0;
const REPORTING: u16 = 3;

#[derive(Clone, Copy)]
enum Backing {
    Private,
    PrivateHuge,
    Memfd,
}

impl Backing {
    const ALL: [Self; 3] = [Self::Private, Self::PrivateHuge, Self::Memfd];

    fn name(self) -> &'static str {
        match self {
            Self::Private => "private",
            Self::PrivateHuge => "private-thp",
            Self::Memfd => "memfd",
        }
    }
}

/// A balloon over fresh RAM, and the same RAM as plain memory of this process.
struct Bench {
    harness: HandlerHarness<Box<dyn QueueHandler>>,
    /// Keeps the device alive.
    _balloon: Balloon,
    host_start: *mut u8,
    file: Option<File>,
    pidfd: i32,
}

impl Bench {
    fn new(backing: Backing, bytes: u64) -> Self {
        let ram = map(backing, bytes);
        let params = BalloonParams {
            ram: ram.mem(),
            size_bytes: 0,
            deflate_on_oom: false,
            free_page_reporting: true,
            free_page_hinting: false,
            reporting_policy: false,
        };
        let (mut balloon, _) = Balloon::new(params).expect("descriptors are to be had");
        let handler = balloon.take_handlers().remove(0);
        let features = VIRTIO_F_VERSION_1 | VIRTIO_BALLOON_F_STATS_VQ | VIRTIO_BALLOON_F_REPORTING;
        let mut harness = HandlerHarness::with_ram(handler, features, ram);
        for (index, size) in [(0, 128), (1, 128), (2, 64), (3, 32)] {
            harness.add_queue(index, size);
        }
        harness.activate().expect("queues are sound");
        let mem = harness.ram.mem().memory().into_inner();
        let region = mem.iter().next().expect("there is one region");
        // SAFETY: a plain system call; the descriptor lives as long as the process.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
        Self {
            host_start: region.as_ptr(),
            file: region
                .file_offset()
                .map(|file| file.file().try_clone().expect("descriptors are to be had")),
            harness,
            _balloon: balloon,
            pidfd: i32::try_from(pidfd).expect("a descriptor"),
        }
    }

    fn touch(&self, ranges: &[(u64, u64)]) {
        for (start, bytes) in ranges {
            for at in (*start..start + bytes).step_by(PAGE as usize) {
                // SAFETY: inside the region, which is writable.
                unsafe { self.host_start.add(at as usize).write_volatile(1) };
            }
        }
    }

    /// Time for one chain of these segments, from the kick to the answer.
    fn device(&mut self, queue: u16, segments: &[Segment<'_>]) -> Duration {
        self.harness.queue(queue).push(segments);
        let start = Instant::now();
        self.harness.kick(queue).expect("queues are sound");
        let took = start.elapsed();
        assert!(self.harness.queue(queue).pop_used().is_some());
        took
    }

    /// Time for the fewest system calls that free these ranges.
    fn bare(&self, ranges: &[(u64, u64)]) -> Duration {
        let start = Instant::now();
        if self.file.is_some() {
            self.punch_each(ranges);
        } else if !self.discard_vector(ranges) {
            self.discard_each(ranges);
        }
        start.elapsed()
    }

    fn punch_each(&self, ranges: &[(u64, u64)]) {
        let file = self.file.as_ref().expect("a memfd");
        for (at, bytes) in ranges {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: frees pages of the benchmark's own file.
            let ret = unsafe { libc::fallocate(file.as_raw_fd(), mode, *at as i64, *bytes as i64) };
            assert_eq!(ret, 0);
        }
    }

    fn discard_vector(&self, ranges: &[(u64, u64)]) -> bool {
        let spans: Vec<_> = ranges
            .iter()
            .map(|(at, bytes)| libc::iovec {
                iov_base: self.host_start.wrapping_add(*at as usize).cast(),
                iov_len: *bytes as usize,
            })
            .collect();
        // SAFETY: frees pages of the benchmark's own RAM.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                self.pidfd,
                spans.as_ptr(),
                spans.len(),
                libc::MADV_DONTNEED,
                0,
            )
        };
        ret > 0
    }

    fn discard_each(&self, ranges: &[(u64, u64)]) {
        for (at, bytes) in ranges {
            let start = self.host_start.wrapping_add(*at as usize).cast();
            // SAFETY: frees pages of the benchmark's own RAM.
            let ret = unsafe { libc::madvise(start, *bytes as usize, libc::MADV_DONTNEED) };
            assert_eq!(ret, 0);
        }
    }
}

fn map(backing: Backing, bytes: u64) -> TestRam {
    let file = match backing {
        Backing::Memfd => {
            // SAFETY: the name is a C string; the descriptor is ours alone.
            let file = unsafe { File::from_raw_fd(libc::memfd_create(c"bench".as_ptr(), 0)) };
            file.set_len(bytes).expect("memory files grow");
            Some(FileOffset::new(file, 0))
        }
        Backing::Private | Backing::PrivateHuge => None,
    };
    let regions = [(GuestAddress(0), bytes as usize, file)];
    let mem = GuestMemoryMmap::from_ranges_with_files(regions).expect("RAM can be mapped");
    let advice = match backing {
        Backing::PrivateHuge => libc::MADV_HUGEPAGE,
        Backing::Private | Backing::Memfd => libc::MADV_NOHUGEPAGE,
    };
    let region = mem.iter().next().expect("there is one region");
    // SAFETY: changes how the region is paged, not what is in it. A kernel
    // without huge pages refuses, and then there is nothing to ask for.
    unsafe { libc::madvise(region.as_ptr().cast(), bytes as usize, advice) };
    TestRam::around(GuestRam::new(mem), 0, FREE_START)
}

/// 32 ranges with a gap of their own size after each.
fn report_ranges(bytes: u64) -> Vec<(u64, u64)> {
    (0..32)
        .map(|at| (FREE_START + at * 2 * bytes, bytes))
        .collect()
}

fn segments(ranges: &[(u64, u64)]) -> Vec<Segment<'static>> {
    ranges
        .iter()
        .map(|(at, bytes)| Segment::WritableAt(GuestAddress(*at), *bytes as u32))
        .collect()
}

fn reports(c: &mut Criterion) {
    for backing in Backing::ALL {
        let mut group = c.benchmark_group(format!("report/{}", backing.name()));
        for mib in [2, 4] {
            let ranges = report_ranges(mib * MIB);
            let segments = segments(&ranges);
            let mut bench = Bench::new(backing, FREE_START + 64 * mib * MIB);
            group.throughput(Throughput::Bytes(32 * mib * MIB));
            group.bench_function(BenchmarkId::new("device", format!("32x{mib}MiB")), |b| {
                b.iter_custom(|rounds| {
                    total(rounds, || {
                        bench.touch(&ranges);
                        bench.device(REPORTING, &segments)
                    })
                });
            });
            group.bench_function(BenchmarkId::new("bare", format!("32x{mib}MiB")), |b| {
                b.iter_custom(|rounds| {
                    total(rounds, || {
                        bench.touch(&ranges);
                        bench.bare(&ranges)
                    })
                });
            });
        }
    }
}

fn absent_reports(c: &mut Criterion) {
    for backing in Backing::ALL {
        let mut group = c.benchmark_group(format!("report-absent/{}", backing.name()));
        let ranges = report_ranges(2 * MIB);
        let segments = segments(&ranges);
        let mut bench = Bench::new(backing, FREE_START + 128 * MIB);
        group.bench_function("device", |b| {
            b.iter_custom(|rounds| total(rounds, || bench.device(REPORTING, &segments)));
        });
        group.bench_function("bare", |b| {
            b.iter_custom(|rounds| total(rounds, || bench.bare(&ranges)));
        });
    }
}

/// Keeps a second thread of this process running while it lives, so that the
/// kernel has somebody else's TLB to flush.
struct BusyThread(Arc<AtomicBool>, Option<std::thread::JoinHandle<()>>);

impl BusyThread {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                black_box(0);
            }
        });
        Self(stop, Some(thread))
    }
}

impl Drop for BusyThread {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        if let Some(thread) = self.1.take() {
            thread.join().expect("it only spins");
        }
    }
}

fn inflation(c: &mut Criterion) {
    // 256 pages, none adjacent, in an order a free list might have.
    let scattered: Vec<u64> = (0..256).map(|at| (at * 97 % 256) * 2).collect();
    let adjacent: Vec<u64> = (0..256).collect();
    inflate_group(c, "inflate/alone", &scattered, None);
    inflate_group(c, "inflate/busy", &scattered, Some(BusyThread::start()));
    inflate_group(c, "inflate-contiguous/alone", &adjacent, None);
}

fn inflate_group(c: &mut Criterion, name: &str, pages: &[u64], _busy: Option<BusyThread>) {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(256 * PAGE));
    let mut bench = Bench::new(Backing::Private, FREE_START + 4 * MIB);
    let ranges: Vec<_> = pages
        .iter()
        .map(|page| (FREE_START + page * PAGE, PAGE))
        .collect();
    let list: Vec<u8> = ranges
        .iter()
        .flat_map(|(at, _)| ((at / PAGE) as u32).to_le_bytes())
        .collect();
    let buffer = bench.harness.ram.alloc(list.len() as u64, 4);
    bench.harness.ram.write(buffer, &list);
    let list = [Segment::ReadableAt(buffer, list.len() as u32)];
    group.bench_function("device", |b| {
        b.iter_custom(|rounds| {
            total(rounds, || {
                bench.touch(&ranges);
                bench.device(INFLATE, &list)
            })
        });
    });
    group.bench_function("bare", |b| {
        b.iter_custom(|rounds| {
            total(rounds, || {
                bench.touch(&ranges);
                bench.bare(&ranges)
            })
        });
    });
    group.bench_function("madvise-per-page", |b| {
        b.iter_custom(|rounds| {
            total(rounds, || {
                bench.touch(&ranges);
                let start = Instant::now();
                bench.discard_each(&ranges);
                start.elapsed()
            })
        });
    });
    let first = ranges.iter().map(|(at, _)| *at).min().expect("256 of them");
    if ranges.iter().all(|(at, _)| at - first < 256 * PAGE) {
        group.bench_function("madvise-once", |b| {
            b.iter_custom(|rounds| {
                total(rounds, || {
                    bench.touch(&ranges);
                    bench.bare(&[(first, 256 * PAGE)])
                })
            });
        });
    }
}

fn residency(c: &mut Criterion) {
    let mut group = c.benchmark_group("residency/1GiB");
    for backing in Backing::ALL {
        let ram = map(backing, 1 << 30);
        let probe = ResidencyProbe::new(ram.mem()).expect("there is a page map");
        group.bench_function(BenchmarkId::new("untouched", backing.name()), |b| {
            b.iter(|| probe.measure().expect("it can be measured"));
        });
        let mem = ram.mem().memory().into_inner();
        let start = mem.iter().next().expect("there is one region").as_ptr();
        for at in (0..1_usize << 30).step_by(PAGE as usize) {
            // SAFETY: inside the region, which is writable.
            unsafe { start.add(at).write_volatile(1) };
        }
        group.bench_function(BenchmarkId::new("touched", backing.name()), |b| {
            b.iter(|| probe.measure().expect("it can be measured"));
        });
    }
}

fn total(rounds: u64, mut round: impl FnMut() -> Duration) -> Duration {
    (0..rounds).map(|_| round()).sum()
}

criterion_group! {
    name = balloon;
    config = Criterion::default()
        .sample_size(15)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .without_plots();
    targets = absent_reports, reports, inflation, residency
}
criterion_main!(balloon);
