//! Compares saving guest RAM to a plain write of the same bytes, in turns.
//!
//! `cargo bench -p machine --bench save`. `TMPDIR` is the folder of the files: in memory (`/dev/shm`), the work of the
//! processor is compared, on a disk mostly that of the disk.

#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use api::config::MemoryConfig;
use machine::memory::{ContentError, ContentFiles, GuestMemory, Pages};
use vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Which pages of RAM hold data.
#[derive(Debug, Clone, Copy)]
enum Data {
    /// All.
    Everywhere,
    /// Runs of fifteen pages behind one that the guest has never touched, as in a busy guest.
    WithGaps,
    /// Every second one; the others are resident and zero.
    EverySecond,
}

impl Data {
    fn is_data(self, page: u64) -> bool {
        match self {
            Self::Everywhere => true,
            Self::WithGaps => !page.is_multiple_of(16),
            Self::EverySecond => page.is_multiple_of(2),
        }
    }

    fn bytes(self, ram: u64) -> u64 {
        (0..ram / PAGE).filter(|page| self.is_data(*page)).count() as u64 * PAGE
    }
}

fn filled(data: Data, size: u64, shared: bool) -> GuestMemory {
    let config = MemoryConfig {
        size,
        shared,
        ..MemoryConfig::default()
    };
    let memory = GuestMemory::new(&config, 46).unwrap();
    let ram = memory.ram().memory();
    for page in 0..size / PAGE {
        let address = GuestAddress(page * PAGE);
        if data.is_data(page) {
            let byte = page as u8 | 1;
            ram.write_slice(&[byte; PAGE as usize], address).unwrap();
        } else if matches!(data, Data::EverySecond) {
            ram.write_slice(&[0], address).unwrap();
        }
    }
    drop(ram);
    memory
}

fn save(memory: &GuestMemory, file: &File) -> Duration {
    let began = Instant::now();
    let copy = file.try_clone().unwrap();
    let content = RefCell::new(ContentFiles::new(memory, [copy], false).unwrap());
    let send = |pages: Pages<'_>| content.borrow_mut().write(pages);
    memory
        .send_content::<ContentError>(None, send, |_| Ok(()))
        .unwrap();
    content.into_inner().finish().unwrap();
    began.elapsed()
}

fn write(bytes: &[u8], file: &File) -> Duration {
    let began = Instant::now();
    for (at, piece) in (0_u64..)
        .step_by(MIB as usize)
        .zip(bytes.chunks(MIB as usize))
    {
        file.write_all_at(piece, at).unwrap();
    }
    file.sync_all().unwrap();
    began.elapsed()
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}

fn main() {
    // Without the option, this is a test of the benchmark.
    let is_measured = std::env::args().any(|it| it == "--bench");
    let (size, rounds) = if is_measured {
        (512 * MIB, 15)
    } else {
        (16 * MIB, 1)
    };
    for (data, shared) in [
        (Data::Everywhere, false),
        (Data::WithGaps, false),
        (Data::EverySecond, false),
        (Data::Everywhere, true),
    ] {
        let memory = filled(data, size, shared);
        let bytes: Vec<u8> = (0..data.bytes(size))
            .map(|at| (at / PAGE) as u8 | 1)
            .collect();
        let (mut saves, mut writes) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            writes.push(write(&bytes, &tempfile::tempfile().unwrap()));
            saves.push(save(&memory, &tempfile::tempfile().unwrap()));
        }
        let (saved, written) = (median(saves), median(writes));
        let kind = if shared { "shared" } else { "private" };
        println!(
            "{kind}, {data:?}: {} MiB saved in {saved:.0} ms, written in {written:.0} ms: {:.2}",
            data.bytes(size) / MIB,
            saved / written
        );
    }
}
