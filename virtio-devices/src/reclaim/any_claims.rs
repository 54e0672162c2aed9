//! Arbitrary claims on memory of mixed kinds, for ordinary tests and for a fuzzer.
//!
//! The bytes describe the regions of guest RAM, and then batches of claims. After each batch:
//!
//! * exactly the pages that the rule selects are discarded ([`discard_and_check_on`]), and none that a device can access;
//! * the resident memory of each region has fallen by what the engine has discarded there;
//! * the pages that would be saved are those that are resident.
//!
//! While discarding is disabled, no page is discarded.

use std::sync::{Arc, OnceLock};

use vm_memory::{GuestAddress, GuestAddressSpace as _, GuestMemoryBackend as _};

use super::guarded_ram::{GuardedRam, HUGE_PAGE_PAGES, Kind, PAGE, RamArea, discard_and_check_on};
use super::pagemap::Pagemap;
use super::{
    DiscardEngine, DiscardSwitch, Expected, GuestRange, InhibitReason, ResidencyProbe,
    SkippedBytes, smallest_reclaimable_page_bytes,
};
use crate::testing::fuzz_input::Input;

const AREAS_MAX: u8 = 4;
const CLAIMS_MAX: u8 = 24;
const BATCHES_MAX: usize = 3;
/// Pages of small areas and between areas.
const SMALL_PAGES: u8 = 24;
/// Huge pages of large areas.
const HUGE_PAGES: u8 = 2;
/// Pages where areas of huge pages can begin and end, or nearly.
const NEAR: u64 = 4;

/// Figures of a run, for checks that the bytes reach what they should.
#[derive(Debug, Default, Clone, Copy)]
pub struct Seen {
    /// Bytes discarded.
    pub discarded: u64,
    /// Bytes discarded in parts of huge pages, which the kernel has split.
    pub partial: u64,
    /// Bytes left in place for a reason.
    pub skipped: u64,
    /// Bytes that the kernel refused to discard.
    pub failed: u64,
}

/// Runs the batches that the bytes describe.
///
/// # Panics
/// A wrong page is discarded, a page is not discarded, or a report or a measurement is wrong.
pub fn run(bytes: &[u8]) -> Seen {
    let mut input = Input(bytes);
    let options = input.byte();
    let areas = areas(&mut input);
    let guarded = GuardedRam::try_new(&areas).expect("memory can be mapped");
    let switch = Arc::<DiscardSwitch>::default();
    let mut engine = if options & 1 == 0 {
        DiscardEngine::new(Arc::clone(&switch))
    } else {
        DiscardEngine::without_vectors(Arc::clone(&switch))
    };
    let open = if options & 2 == 0 {
        Pagemap::open
    } else {
        Pagemap::open_without_scan
    };
    let pagemap = || open().expect("every process has a page map");
    let probe = ResidencyProbe::with_pagemap(guarded.ram.clone(), pagemap());
    let pages_end = areas
        .last()
        .map_or(0, |area| area.guest_page + area.pages as u64);
    let mapped: Vec<_> = (0..options >> 3 & 3)
        .map(|_| claim(&mut input, pages_end))
        .map(|it| it.start..it.start.saturating_add(it.bytes))
        .filter(|range| !range.is_empty())
        .collect();
    let book = guarded.ram.dma_mapped();
    mapped.iter().for_each(|range| book.hold(range));
    let mut seen = Seen::default();
    let mut skipped = SkippedBytes::default();
    for _ in 0..BATCHES_MAX {
        if input.is_empty() {
            break;
        }
        let expected = match input.byte() % 2 {
            0 => Expected::Zeros,
            _ => Expected::Anything,
        };
        let claims: Vec<_> = (0..input.byte() % CLAIMS_MAX)
            .map(|_| claim(&mut input, pages_end))
            .collect();
        let smallest = smallest_reclaimable_page_bytes(&guarded.ram.memory(), expected);
        assert!(smallest.is_none_or(|bytes| bytes >= PAGE as u64));
        let before = held(&probe);
        if options & 4 != 0 {
            let _guard = switch.inhibit(InhibitReason::AssignedDevice);
            let outcome = engine.discard(&guarded.ram, &mut claims.clone(), expected);
            assert_eq!(outcome.skipped.total(), outcome.requested.bytes);
            assert_eq!(before, held(&probe));
        }
        let check = |engine: &DiscardEngine| {
            check_residency(&areas, &before, &held(&probe), engine);
            check_held(&guarded, &areas, &held(&probe), &pagemap());
        };
        let outcome =
            discard_and_check_on(&guarded, &mut engine, &claims, expected, &mapped, check);
        skipped.add_all(&outcome.skipped);
        seen.discarded += outcome.discarded.bytes;
        seen.partial += outcome.partial_bytes;
        seen.skipped += outcome.skipped.total();
        seen.failed += outcome.failed.bytes;
        guarded.refill();
    }
    mapped.iter().for_each(|range| book.release(range));
    let by_reason: u64 = skipped.iter().map(|(_, bytes)| bytes).sum();
    assert_eq!(by_reason, seen.skipped);
    // The second one may be the first one again.
    let samples = [probe.sample(), probe.sample()].map(|it| it.expect("the page map can be read"));
    for sample in samples {
        let in_ram = sample.configured_bytes - sample.reclaimed_bytes();
        assert_eq!(in_ram, sample.resident_bytes);
    }
    seen
}

/// Bytes of each region in RAM or in swap.
fn held(probe: &ResidencyProbe) -> Vec<u64> {
    let sample = probe.measure().expect("the page map can be read");
    let bytes = |it: &super::RegionResidency| it.resident_bytes + it.swapped_bytes;
    sample.regions.iter().map(bytes).collect()
}

fn check_residency(areas: &[RamArea], before: &[u64], after: &[u64], engine: &DiscardEngine) {
    for (at, area) in areas.iter().enumerate() {
        let start = area.guest_page * PAGE as u64;
        let end = start + (area.pages * PAGE) as u64;
        let discarded: u64 = engine
            .discarded_ranges()
            .map(|range| {
                let (first, last) = (range.start.max(start), (range.start + range.bytes).min(end));
                last.saturating_sub(first)
            })
            .sum();
        let fallen = before[at].checked_sub(after[at]);
        match area.kind {
            // The kernel may join huge pages again at any time.
            Kind::Transparent => assert!(fallen.is_some(), "{area:?}"),
            _ => assert_eq!(fallen, Some(discarded), "{area:?}"),
        }
    }
}

/// Only pages in RAM or in swap would be saved.
fn check_held(guarded: &GuardedRam, areas: &[RamArea], held: &[u64], pagemap: &Pagemap) {
    let memory = guarded.ram.memory();
    for (area, held) in areas.iter().zip(held) {
        if !matches!(area.kind, Kind::Anonymous) {
            continue;
        }
        let start = GuestAddress(area.guest_page * PAGE as u64);
        let at = memory.get_host_address(start).expect("an area");
        let mut pages = vec![false; area.pages];
        let marked = pagemap.mark_held(at as u64, &mut pages);
        marked.expect("the page map can be read");
        let count = pages.iter().filter(|held| **held).count();
        assert_eq!((count * PAGE) as u64, *held, "{area:?}");
    }
}

fn areas(input: &mut Input<'_>) -> Vec<RamArea> {
    let mut guest_page = 0;
    let mut areas = Vec::new();
    for _ in 0..=input.byte() % AREAS_MAX {
        let small = usize::from(input.byte() % SMALL_PAGES) + 1;
        let shape = input.byte();
        let large = (usize::from(shape >> 7) % usize::from(HUGE_PAGES) + 1) * HUGE_PAGE_PAGES;
        let (kind, pages) = match shape % 16 {
            0..=5 => (Kind::Anonymous, small),
            6..=9 => (Kind::Memfd, small),
            10 | 11 => (Kind::PrivateFile, small),
            12 => (Kind::ReadOnlyMemfd, small),
            13 if has_huge_pages() => (Kind::Huge, large),
            _ => (Kind::Transparent, large + small),
        };
        guest_page += u64::from(input.byte() % SMALL_PAGES);
        areas.push(RamArea {
            guest_page,
            pages,
            kind,
        });
        guest_page += pages as u64;
    }
    areas
}

/// Whether the host has a pool from which the largest area and its guards can be taken.
fn has_huge_pages() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        let all = (0..AREAS_MAX).map(|at| RamArea {
            guest_page: u64::from(at) * (usize::from(HUGE_PAGES) * HUGE_PAGE_PAGES) as u64,
            pages: usize::from(HUGE_PAGES) * HUGE_PAGE_PAGES,
            kind: Kind::Huge,
        });
        GuardedRam::try_new(&all.collect::<Vec<_>>()).is_ok()
    })
}

fn claim(input: &mut Input<'_>, pages_end: u64) -> GuestRange {
    const BYTES: u64 = PAGE as u64;
    let shape = input.byte();
    let page = input.number(2) % (pages_end + NEAR);
    let (start, bytes) = match shape % 8 {
        0..=3 => (page * BYTES, (u64::from(shape >> 3) + 1) * BYTES),
        // Huge pages, or nearly.
        4 => (
            page * BYTES,
            (u64::from(shape >> 3) + HUGE_PAGE_PAGES as u64 - NEAR) * BYTES,
        ),
        5 => (page * BYTES + input.number(2) % BYTES, input.number(2)),
        6 => (
            page * BYTES,
            (pages_end + NEAR).saturating_sub(page) * BYTES,
        ),
        _ => (input.number(8), input.number(4)),
    };
    GuestRange { start, bytes }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    use super::*;

    #[test]
    fn empty_mapping_keeps_no_page() {
        // Found by the fuzzer: three mappings, one of them empty and inside a page.
        const FOUND: [u8; 63] = [
            0xf8, 0x79, 0x9c, 0x34, 0xa9, 0x59, 0x00, 0x00, 0xa5, 0x82, 0xdc, 0x05, 0x10, 0x00,
            0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x53, 0xd9, 0xc7, 0xfc, 0x4c, 0x25, 0xdd, 0x00,
            0x00, 0x00, 0x00, 0x53, 0x99, 0xc7, 0xfc, 0x4c, 0x25, 0xdd, 0xa9, 0x6b, 0x1f, 0x50,
            0x84, 0x46, 0xf3, 0xaf, 0x5d, 0x01, 0x7a, 0xb7, 0x8a, 0x05, 0x5e, 0x00, 0x2f, 0x34,
            0x44, 0x75, 0xe4, 0x0f, 0x38, 0x1a, 0x22,
        ];
        assert!(run(&FOUND).discarded > 0);
    }

    /// Without figures above zero, the checks of `run` would mean nothing.
    #[test]
    fn claims_of_random_bytes_discard_what_the_rule_says() {
        let mut runner = TestRunner::deterministic();
        let mut all = Seen::default();
        for _ in 0..100 {
            let bytes = prop::collection::vec(any::<u8>(), 0..400);
            let seen = run(&bytes.new_tree(&mut runner).expect("bytes").current());
            all.discarded += seen.discarded;
            all.partial += seen.partial;
            all.skipped += seen.skipped;
            all.failed += seen.failed;
        }
        assert!(
            all.discarded > 0 && all.skipped > 0 && all.failed > 0,
            "{all:?}"
        );
    }
}
