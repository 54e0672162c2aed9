//! Measures the balloon's cost beyond the unavoidable system calls.
//!
//! Each `device` figure has a `bare` counterpart over the same ranges: the minimum number of system calls that free
//! them, and nothing else. `kick` includes reading the ring, validating, merging, discarding, completing and
//! accounting.
//!
//! * `report`: 32 ranges of 2 or 4 MiB, no two adjacent, on each backing.
//! * `report-absent`: the same ranges with nothing left to free, which shows the device's own time.
//! * `inflate`: 256 scattered pages, compared with one `madvise` per page as in other devices. The process is otherwise
//!   idle, or has a busy thread in place of vCPUs.
//! * `inflate-contiguous`: 256 adjacent pages, compared with one `madvise` over all.
//! * `residency`: a sample over 1 GiB, touched and untouched.
//!
//! The bench `rates` compares these rates with each other, measured in turns.
//!
//! `cargo bench -p virtio-devices --features test-utils --bench balloon`
#![allow(unsafe_code)]
// UNSAFETY: the benchmark touches memory and measures what is resident.

mod rig;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rig::{Backing, Bench, BusyThread, FREE_START, INFLATE, MIB, PAGE, REPORTING, map};
use virtio_devices::reclaim::ResidencyProbe;
use virtio_devices::testing::Segment;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

/// 32 ranges, each followed by a gap of its size.
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
    for &backing in Backing::ALL {
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
    for &backing in Backing::ALL {
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

fn inflation(c: &mut Criterion) {
    // 256 pages, none adjacent, in a plausible free-list order.
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
                bench.discard_each(&ranges)
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
    for &backing in Backing::ALL {
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
