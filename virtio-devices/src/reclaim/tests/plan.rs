//! Tests the planner against a model that works on single bytes.

use proptest::collection::vec;
use proptest::prelude::*;

use device_facts::SkipReason;

use crate::dma_mapped::MappedRanges;
use crate::reclaim::backing::{Backing, Expected, RegionLayout};
use crate::reclaim::ranges::{GuestRange, Piece, SkippedBytes, leave_out, plan};

/// The granularity of the model; every generated address is a multiple of it.
const UNIT: u64 = 512;
const PAGE: u64 = 4096;
/// Replaces a huge page, so that the model stays small.
const LARGE_PAGE: u64 = 4 * PAGE;
/// End of the model's address space.
const WORLD: u64 = 512 * 1024;

/// The result of the rule, unit by unit.
fn model(
    regions: &[RegionLayout],
    claims: &[GuestRange],
    expected: Expected,
) -> (Vec<u64>, SkippedBytes) {
    let mut times = vec![0_u64; usize::try_from(WORLD / UNIT).unwrap()];
    let mut skipped = SkippedBytes::default();
    for claim in claims {
        for unit in 0..claim.bytes / UNIT {
            times[usize::try_from(claim.start / UNIT + unit).unwrap()] += 1;
        }
    }
    let claimed = |from: u64, to: u64| (from / UNIT..to / UNIT).all(|u| times[u as usize] > 0);
    let mut discarded = Vec::new();
    for (unit, times) in times.iter().enumerate().filter(|(_, times)| **times > 0) {
        let at = unit as u64 * UNIT;
        skipped.add(SkipReason::Duplicate, (times - 1) * UNIT);
        let region = regions
            .iter()
            .find(|r| (r.guest_start..r.guest_end()).contains(&at));
        let Some(region) = region else {
            skipped.add(SkipReason::OutsideRam, UNIT);
            continue;
        };
        // Whether the page of this size that contains the unit is inside the region and released.
        let whole = |page: u64| {
            let offset = at - region.guest_start;
            let first = region.guest_start + offset - offset % page;
            first + page <= region.guest_end() && claimed(first, first + page)
        };
        match region.backing {
            Backing::PrivateFile if expected == Expected::Zeros => {
                skipped.add(SkipReason::PrivateFile, UNIT);
            }
            Backing::Unsupported => skipped.add(SkipReason::UnsupportedBacking, UNIT),
            _ if !whole(PAGE) => skipped.add(SkipReason::Unaligned, UNIT),
            _ if !whole(region.page_bytes) => skipped.add(SkipReason::BackingPageLarger, UNIT),
            _ => discarded.push(at),
        }
    }
    (discarded, skipped)
}

fn units_of(regions: &[RegionLayout], pieces: &[Piece]) -> Vec<u64> {
    let mut units = Vec::new();
    for piece in pieces {
        let start = regions[piece.region].guest_start + piece.offset;
        units.extend((start..start + piece.bytes).step_by(UNIT as usize));
    }
    units
}

fn region(guest_start: u64, bytes: u64, page_bytes: u64, backing: Backing) -> RegionLayout {
    RegionLayout {
        guest_start,
        bytes,
        host_start: 0,
        page_bytes,
        backing,
    }
}

fn backings() -> impl Strategy<Value = Backing> {
    prop_oneof![
        4 => Just(Backing::AnonymousPrivate),
        3 => Just(Backing::SharedFile { fd: 3, file_start: 0 }),
        1 => Just(Backing::PrivateFile),
        1 => Just(Backing::Unsupported),
    ]
}

/// Up to six regions in ascending order, some adjacent and some not, some with partial pages.
fn layouts() -> impl Strategy<Value = Vec<RegionLayout>> {
    let one = (
        prop_oneof![Just(0), 1..20_u64],
        1..60_u64,
        any::<bool>(),
        backings(),
    );
    vec(one, 1..6).prop_map(|shapes| {
        let mut at = 0;
        let mut regions = Vec::new();
        for (gap, units, large, backing) in shapes {
            at += gap * UNIT;
            let page = if large { LARGE_PAGE } else { PAGE };
            regions.push(region(at, units * UNIT, page, backing));
            at += units * UNIT;
        }
        regions
    })
}

fn claim_lists() -> impl Strategy<Value = Vec<GuestRange>> {
    // Whole pages as drivers send them, or any unit.
    let pages = (0..48_u64, 0..24_u64).prop_map(|(at, len)| (at * PAGE, len * PAGE));
    let units = (0..384_u64, 0..64_u64).prop_map(|(at, len)| (at * UNIT, len * UNIT));
    let claim = prop_oneof![pages, units].prop_map(|(start, bytes)| GuestRange { start, bytes });
    vec(claim, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn plan_of_any_claims_agrees_with_the_model(
        regions in layouts(),
        mut claims in claim_lists(),
        expected in prop_oneof![Just(Expected::Zeros), Just(Expected::Anything)],
    ) {
        let (discarded, skips) = model(&regions, &claims, expected);
        let mut pieces = Vec::new();
        let skipped = plan(&regions, &mut claims, expected, &mut pieces);
        prop_assert_eq!(units_of(&regions, &pieces), discarded);
        prop_assert_eq!(skipped, skips);
    }

    /// Exactly the backing pages that are mapped, even in part, are left out.
    #[test]
    fn mapped_pages_are_left_out_as_in_the_model(
        regions in layouts(),
        mut claims in claim_lists(),
        mapped in vec((0..120_u64, 1..12_u64), 0..12),
    ) {
        let mapped: Vec<_> = mapped.into_iter().map(|(at, len)| at * PAGE..(at + len) * PAGE).collect();
        let mut pieces = Vec::new();
        plan(&regions, &mut claims, Expected::Anything, &mut pieces);
        let before = units_of(&regions, &pieces);
        let left_out = leave_out(&regions, &mut pieces, &MappedRanges::of(&mapped));
        let is_mapped = |unit: &u64| {
            let region = regions.iter().find(|r| (r.guest_start..r.guest_end()).contains(unit)).unwrap();
            let first = unit - (unit - region.guest_start) % region.page_bytes;
            mapped.iter().any(|it| it.start < first + region.page_bytes && it.end > first)
        };
        let (gone, left): (Vec<u64>, Vec<u64>) = before.into_iter().partition(is_mapped);
        prop_assert_eq!(units_of(&regions, &pieces), left);
        prop_assert_eq!(left_out, gone.len() as u64 * UNIT);
        prop_assert!(pieces.iter().all(|piece| piece.bytes > 0));
    }

    #[test]
    fn plan_of_wild_claims_accounts_for_every_byte(
        regions in layouts(),
        claims in vec((any::<u64>(), 0..1_u64 << 32), 0..20),
    ) {
        let mut claims: Vec<_> = claims
            .into_iter()
            .map(|(start, bytes)| GuestRange { start, bytes })
            .collect();
        let expected = Expected::Zeros;
        let asked: u64 = claims.iter().map(|c| c.bytes).sum();
        let mut pieces = Vec::new();
        let skipped = plan(&regions, &mut claims, expected, &mut pieces);
        let kept: u64 = pieces.iter().map(|p| p.bytes).sum();
        prop_assert_eq!(kept + skipped.total(), asked);
        for piece in &pieces {
            let region = &regions[piece.region];
            prop_assert!(piece.bytes > 0 && piece.offset + piece.bytes <= region.bytes);
            prop_assert_eq!((piece.offset % region.page_bytes, piece.bytes % region.page_bytes), (0, 0));
        }
    }
}

/// Plans over one anonymous region of 1 MiB at 1 MiB.
fn plan_one(claims: &[(u64, u64)]) -> (Vec<Piece>, SkippedBytes) {
    let regions = [region(1 << 20, 1 << 20, PAGE, Backing::AnonymousPrivate)];
    let claims = claims.iter().map(|(start, bytes)| GuestRange {
        start: *start,
        bytes: *bytes,
    });
    let mut pieces = Vec::new();
    let skipped = plan(
        &regions,
        &mut claims.collect::<Vec<_>>(),
        Expected::Zeros,
        &mut pieces,
    );
    (pieces, skipped)
}

#[test]
fn claim_that_wraps_around_is_outside_beyond_the_last_address() {
    let start = u64::MAX - PAGE + 1;
    let (pieces, skipped) = plan_one(&[(start, 3 * PAGE)]);
    assert_eq!(pieces, []);
    assert_eq!(skipped.get(SkipReason::OutsideRam), 3 * PAGE);
}

#[test]
fn claim_of_everything_there_could_be_gives_the_region() {
    let (pieces, skipped) = plan_one(&[(0, u64::MAX)]);
    assert_eq!((pieces.len(), pieces[0].bytes), (1, 1 << 20));
    assert_eq!(skipped.total(), u64::MAX - (1 << 20));
}

#[test]
fn adjacent_claims_in_any_order_become_one_piece() {
    let pages = [5, 3, 4, 2, 6].map(|page| ((1 << 20) + page * PAGE, PAGE));
    let (pieces, skipped) = plan_one(&pages);
    assert_eq!(
        (pieces.len(), pieces[0].offset, pieces[0].bytes),
        (1, 2 * PAGE, 5 * PAGE)
    );
    assert_eq!(skipped.total(), 0);
}

#[test]
fn small_claims_that_fill_a_large_page_free_it() {
    let regions = [region(0, 2 << 20, 2 << 20, Backing::AnonymousPrivate)];
    let page = |at| GuestRange {
        start: at * PAGE,
        bytes: PAGE,
    };
    let mut pieces = Vec::new();
    let mut all: Vec<_> = (0..512).map(page).collect();
    assert_eq!(
        plan(&regions, &mut all, Expected::Zeros, &mut pieces).total(),
        0
    );
    assert_eq!(pieces[0].bytes, 2 << 20);

    let mut all_but_one: Vec<_> = (0..511).map(page).collect();
    let skipped = plan(&regions, &mut all_but_one, Expected::Zeros, &mut pieces);
    assert_eq!(pieces, []);
    assert_eq!(skipped.get(SkipReason::BackingPageLarger), 511 * PAGE);
}

#[test]
fn claim_across_two_regions_is_served_in_both() {
    let regions = [
        region(0, 4 * PAGE, PAGE, Backing::AnonymousPrivate),
        region(
            4 * PAGE,
            4 * PAGE,
            PAGE,
            Backing::SharedFile {
                fd: 3,
                file_start: 0,
            },
        ),
    ];
    let mut claims = [GuestRange {
        start: 2 * PAGE,
        bytes: 4 * PAGE,
    }];
    let mut pieces = Vec::new();
    assert_eq!(
        plan(&regions, &mut claims, Expected::Zeros, &mut pieces).total(),
        0
    );
    let places: Vec<_> = pieces
        .iter()
        .map(|p| (p.region, p.offset, p.bytes))
        .collect();
    assert_eq!(places, [(0, 2 * PAGE, 2 * PAGE), (1, 0, 2 * PAGE)]);
}
