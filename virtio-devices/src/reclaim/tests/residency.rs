//! Tests the residency probe on mappings of known state.
#![allow(unsafe_code)]
// UNSAFETY: `madvise` prevents huge pages in a mapping whose pages are counted.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

use crate::device::GuestRam;
use crate::reclaim::guarded_ram::{GuardedRam, Kind, PAGE, RamArea};
use crate::reclaim::pagemap::Pagemap;
use crate::reclaim::{DiscardEngine, Expected, GuestRange, ResidencyMethod, ResidencyProbe};

const PAGE_BYTES: u64 = PAGE as u64;

/// A probe for each method of reading page tables that this kernel supports.
fn probes(guarded: &GuardedRam) -> Vec<ResidencyProbe> {
    let scan = Pagemap::open().unwrap();
    let read = Pagemap::open_without_scan().unwrap();
    if !scan.scans() {
        eprintln!("partly skipped: this kernel has no PAGEMAP_SCAN");
    }
    [scan, read]
        .into_iter()
        .map(|pagemap| ResidencyProbe::with_pagemap(guarded.ram.clone(), pagemap))
        .collect()
}

fn guarded(kind: Kind) -> GuardedRam {
    GuardedRam::new(&[
        RamArea {
            guest_page: 0,
            pages: 40,
            kind,
        },
        RamArea {
            guest_page: 64,
            pages: 24,
            kind: Kind::Anonymous,
        },
    ])
}

#[test]
fn probe_follows_discards_page_by_page() {
    let guarded = guarded(Kind::Anonymous);
    let mut engine = DiscardEngine::new(Arc::default());
    for probe in probes(&guarded) {
        let before = probe.measure().unwrap();
        assert_eq!(before.configured_bytes, 64 * PAGE_BYTES);
        let mut claims = [GuestRange {
            start: 3 * PAGE_BYTES,
            bytes: PAGE_BYTES,
        }];
        let outcome = engine.discard(&guarded.ram, &mut claims, Expected::Zeros);
        assert_eq!(outcome.discarded.bytes, PAGE_BYTES);
        let after = probe.measure().unwrap();
        // The second probe finds the page already discarded.
        let fresh = before.resident_bytes == 64 * PAGE_BYTES;
        assert_eq!(
            before.resident_bytes - after.resident_bytes,
            u64::from(fresh) * PAGE_BYTES
        );
        assert_eq!(after.reclaimed_bytes(), PAGE_BYTES);
        assert_eq!(after.swapped_bytes, 0);
    }
}

#[test]
fn scattered_pages_are_counted_beyond_one_window_of_either_method() {
    // More ranges than one scan returns and more pages than one read covers.
    let pages = 5000;
    let area = RamArea {
        guest_page: 0,
        pages,
        kind: Kind::Anonymous,
    };
    let guarded = GuardedRam::new(&[area]);
    let mut claims: Vec<_> = (0..pages as u64)
        .step_by(2)
        .map(|page| GuestRange {
            start: page * PAGE_BYTES,
            bytes: PAGE_BYTES,
        })
        .collect();
    DiscardEngine::new(Arc::default()).discard(&guarded.ram, &mut claims, Expected::Zeros);
    for probe in probes(&guarded) {
        assert_eq!(probe.measure().unwrap().resident_bytes, 2500 * PAGE_BYTES);
    }
}

#[test]
fn page_only_ever_read_costs_nothing() {
    let guarded = guarded(Kind::Anonymous);
    let mut claims = [GuestRange {
        start: 0,
        bytes: 40 * PAGE_BYTES,
    }];
    DiscardEngine::new(Arc::default()).discard(&guarded.ram, &mut claims, Expected::Zeros);
    assert_eq!(guarded.touch_for_reading(0, 7), 0);
    let probe = &probes(&guarded)[0];
    let sample = probe.measure().unwrap();
    if sample.method == ResidencyMethod::PagemapScan {
        assert_eq!(sample.resident_bytes, 24 * PAGE_BYTES);
    }
}

#[test]
fn memory_file_is_measured_by_its_own_pages() {
    let guarded = guarded(Kind::Memfd);
    for probe in probes(&guarded) {
        // The file includes guard pages around the region.
        let before = probe.measure().unwrap();
        let mut claims = [GuestRange {
            start: 0,
            bytes: 16 * PAGE_BYTES,
        }];
        DiscardEngine::new(Arc::default()).discard(&guarded.ram, &mut claims, Expected::Zeros);
        let after = probe.measure().unwrap();
        let gone = before.resident_bytes - after.resident_bytes;
        assert!(gone == 8 * PAGE_BYTES || gone == 0, "gone {gone}");
        assert_eq!(after.resident_bytes, (32 + 24) * PAGE_BYTES);
    }
}

#[test]
fn sample_is_shared_while_it_is_young() {
    let probe = ResidencyProbe::new(guarded(Kind::Anonymous).ram).unwrap();
    let first = probe.sample().unwrap();
    let second = probe.sample().unwrap();
    assert_eq!(first.taken, second.taken);
}

const RAM_BYTES: u64 = 64 << 30;

/// 64 GiB of guest RAM of which one 4 KiB page per `stride` bytes is resident.
fn sparse(stride: u64) -> (GuestRam, u64) {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).unwrap();
    let start = mem.get_host_address(GuestAddress(0)).unwrap();
    // SAFETY: the mapping is ours and exists as long as `mem`; the advice changes no content.
    let advised = unsafe { libc::madvise(start.cast(), RAM_BYTES as usize, libc::MADV_NOHUGEPAGE) };
    // A kernel without huge pages does not support this advice, and does not need it.
    assert!(advised == 0 || !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists());
    let pages = RAM_BYTES / stride;
    for page in 0..pages {
        mem.write_obj(1_u8, GuestAddress(page * stride)).unwrap();
    }
    (GuestRam::new(mem), pages)
}

/// The cost of a sample is proportional to the existing page tables. It walks them in short calls, so vCPUs do not wait
/// behind it.
#[test]
fn sample_of_a_sparse_large_guest_takes_a_call_a_window() {
    let scan = Pagemap::open().unwrap();
    if !scan.scans() {
        test_skip::skip("this kernel has no PAGEMAP_SCAN");
        return;
    }
    let (ram, pages) = sparse(64 << 20);
    let start = ram.memory().get_host_address(GuestAddress(0)).unwrap() as u64;
    let held = scan.mapped(start, start + RAM_BYTES).unwrap();
    assert_eq!(held.present, pages * PAGE_BYTES);
    // 256 MiB per window, each with four pages.
    assert_eq!(held.calls, 64 * 4);
    let sample = ResidencyProbe::with_pagemap(ram, scan).measure().unwrap();
    assert_eq!(sample.resident_bytes, pages * PAGE_BYTES);
}

/// Figures for docs/balloon.md, measured manually: `-- --ignored --nocapture cost_of_a_sample`.
#[test]
#[ignore = "measures, and takes gigabytes"]
fn cost_of_a_sample() {
    for stride in [64 << 20, 2 << 20] {
        let (ram, _) = sparse(stride);
        let probe = ResidencyProbe::with_pagemap(ram, Pagemap::open().unwrap());
        let mut costs: Vec<_> = (0..21).map(|_| probe.measure().unwrap().cost_us).collect();
        costs.sort_unstable();
        println!(
            "64 GiB, 1 page in {} MiB: median {} us",
            stride >> 20,
            costs[10]
        );
    }
}
