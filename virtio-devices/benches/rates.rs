//! Compares the rate at which the balloon returns memory with other ways to return the same memory.
//!
//! All ways are measured in each round, a small batch each, in an order that changes from round to round. Other load on
//! the machine therefore affects them equally, and the medians are comparable. Every batch is touched again before it
//! is returned.
//!
//! | Way | Meaning |
//! | --- | --- |
//! | `device` | a kick of the queue: ring, checks, discard, completion, accounting |
//! | `device joined` | the same with several chains available at the kick |
//! | `bare` | the minimum number of system calls that free the same ranges, nothing else |
//! | `one call` | one `madvise` over everything, gaps included |
//! | `one each` | one `madvise` per page, as in other devices |
//!
//! `cargo bench -p virtio-devices --features test-utils --bench rates`

mod rig;

use std::time::Duration;

use rig::{Backing, Bench, BusyThread, FREE_START, INFLATE, MIB, PAGE, REPORTING};
use virtio_devices::testing::Segment;
use vm_memory::GuestAddress;

/// Page frame numbers in a chain sent by Linux.
const CHAIN_PFNS: u64 = 256;
const CHAINS_JOINED: u64 = 16;
/// The memory touched and returned in one turn: every other page of twice as much. It exceeds the free pages that the
/// host kernel caches for the next allocation, as in an inflation of 1 GiB.
const SCATTERED_BYTES: u64 = 64 << 20;
/// Every way returns 1 GiB in total.
const INFLATE_ROUNDS: u64 = (1 << 30) / SCATTERED_BYTES;
/// Number of rounds, for lists of 1 MiB and of 16 MiB.
const ADJACENT_ROUNDS: u64 = 128;
const REPORT_ROUNDS: u64 = 60;

fn main() {
    // `cargo test --bench` runs each way once.
    let measuring = std::env::args().any(|argument| argument == "--bench");
    let rounds = |rounds| if measuring { rounds } else { 1 };
    println!("kernel {}", kernel());
    for mib in [2, 4] {
        for &backing in Backing::ALL {
            report(backing, mib * MIB, rounds(REPORT_ROUNDS));
        }
    }
    for busy in [None, Some(BusyThread::start())] {
        let beside = if busy.is_some() { "busy" } else { "alone" };
        inflate_scattered(beside, rounds(INFLATE_ROUNDS));
        inflate_contiguous(beside, rounds(ADJACENT_ROUNDS));
    }
}

fn kernel() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    release.unwrap_or_default().trim().to_owned()
}

/// 32 ranges, none adjacent, and the same with nothing left to free.
fn report(backing: Backing, bytes: u64, rounds: u64) {
    let ranges: Vec<_> = (0..32)
        .map(|at| (FREE_START + at * 2 * bytes, bytes))
        .collect();
    let segments: Vec<_> = ranges
        .iter()
        .map(|(at, bytes)| Segment::WritableAt(GuestAddress(*at), *bytes as u32))
        .collect();
    let mut bench = Bench::new(backing, FREE_START + 64 * bytes);
    let mut ways = [Way::new("device"), Way::new("bare")];
    let mut absent = [Way::new("device"), Way::new("bare")];
    for round in 0..rounds {
        for turn in 0..2 {
            let way = ((round + turn) % 2) as usize;
            bench.touch(&ranges);
            for times in [&mut ways, &mut absent] {
                times[way].times.push(match way {
                    0 => bench.device(REPORTING, &segments),
                    _ => bench.bare(&ranges),
                });
            }
        }
    }
    let mib = bytes / MIB;
    show(&format!("report 32x{mib}MiB {}", backing.name()), &ways);
    show(
        &format!("report 32x{mib}MiB {}, absent", backing.name()),
        &absent,
    );
}

/// Non-adjacent pages, as many at a time as a growing balloon returns.
fn inflate_scattered(beside: &str, rounds: u64) {
    let mut bench = Bench::new(Backing::Private, FREE_START + 2 * SCATTERED_BYTES);
    let mut lists = Lists::new(&mut bench);
    let mut ways = [
        Way::new("device"),
        Way::new("device joined"),
        Way::new("bare, 256"),
        Way::new("bare, 1024"),
        Way::new("one each"),
        Way::new("one call"),
    ];
    let chains = SCATTERED_BYTES / PAGE / CHAIN_PFNS;
    // The pages of a chain are adjacent except for the gaps, not in order; chains are apart.
    let pages: Vec<_> = (0..chains)
        .flat_map(|chain| {
            (0..CHAIN_PFNS).map(move |at| (chain * 29 % chains, at * 97 % CHAIN_PFNS))
        })
        .map(|(chain, at)| (FREE_START + (chain * CHAIN_PFNS + at) * 2 * PAGE, PAGE))
        .collect();
    for round in 0..rounds {
        for turn in 0..ways.len() {
            let way = (round as usize + turn) % ways.len();
            bench.touch(&pages);
            let each = |size: usize| pages.chunks(size);
            let took = match way {
                0 => each(256)
                    .map(|chain| lists.inflate(&mut bench, chain))
                    .sum(),
                1 => each(4096)
                    .map(|chains| lists.inflate(&mut bench, chains))
                    .sum(),
                2 => each(256).map(|vector| bench.bare(vector)).sum(),
                3 => each(1024).map(|vector| bench.bare(vector)).sum(),
                4 => bench.discard_each(&pages),
                // Discards the pages in between as well: the lower bound of the cost.
                _ => bench.discard_each(&[(FREE_START, 2 * SCATTERED_BYTES)]),
            };
            ways[way].times.push(took / chains as u32);
        }
    }
    show(&format!("inflate 256 scattered pages, {beside}"), &ways);
}

/// Lists of adjacent pages, one and sixteen per kick.
fn inflate_contiguous(beside: &str, rounds: u64) {
    for chains in [1, CHAINS_JOINED] {
        let bytes = chains * CHAIN_PFNS * PAGE;
        let mut bench = Bench::new(Backing::Private, FREE_START + bytes);
        let mut lists = Lists::new(&mut bench);
        let pages: Vec<_> = (0..bytes / PAGE)
            .map(|at| (FREE_START + at * PAGE, PAGE))
            .collect();
        let mut ways = [Way::new("device"), Way::new("one call")];
        for round in 0..rounds {
            for turn in 0..2 {
                let way = ((round + turn) % 2) as usize;
                bench.touch(&pages);
                ways[way].times.push(match way {
                    0 => lists.inflate(&mut bench, &pages),
                    _ => bench.discard_each(&[(FREE_START, bytes)]),
                });
            }
        }
        show(
            &format!("inflate {chains} x 256 adjacent pages, {beside}"),
            &ways,
        );
    }
}

/// Buffers for page frame numbers.
struct Lists(Vec<GuestAddress>);

impl Lists {
    fn new(bench: &mut Bench) -> Self {
        let buffer = |_| bench.harness.ram.alloc(CHAIN_PFNS * 4, 4);
        Self((0..CHAINS_JOINED).map(buffer).collect())
    }

    /// Time from one kick to the completion of all chains, with 256 pages per chain.
    fn inflate(&mut self, bench: &mut Bench, pages: &[(u64, u64)]) -> Duration {
        let mut chains = Vec::new();
        for (pages, buffer) in pages.chunks(CHAIN_PFNS as usize).zip(&self.0) {
            let list: Vec<u8> = pages
                .iter()
                .flat_map(|(at, _)| ((at / PAGE) as u32).to_le_bytes())
                .collect();
            bench.harness.ram.write(*buffer, &list);
            chains.push([Segment::ReadableAt(*buffer, list.len() as u32)]);
        }
        bench.device_chains(INFLATE, chains.iter().map(<[_; 1]>::as_slice))
    }
}

/// One way, and its time in each round.
struct Way {
    name: &'static str,
    times: Vec<Duration>,
}

impl Way {
    fn new(name: &'static str) -> Self {
        let times = Vec::new();
        Self { name, times }
    }

    fn median_us(&self) -> f64 {
        let mut times = self.times.clone();
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e6
    }
}

/// Prints the medians, and the rate of the first way as a multiple of each other way's.
fn show(what: &str, ways: &[Way]) {
    println!("{what}");
    let first = ways[0].median_us();
    for way in ways {
        let (median, name) = (way.median_us(), way.name);
        println!(
            "    {name:<14} {median:>10.1} us   device at {:>6.2} of its rate",
            median / first
        );
    }
}
