//! Tests the tables without queues and threads.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::Permissions;

use crate::dma::{FaultReason, GRANULE, MAPPINGS_MAX, MSI_RANGE, Piece, Refusal, Tables};

const READ: Permissions = Permissions::Read;
const WRITE: Permissions = Permissions::Write;
const BOTH: Permissions = Permissions::ReadWrite;
const ENDPOINT: u32 = 0x18;
const DOMAIN: u32 = 5;

/// Tables with one endpoint in a domain, and the device's key to it.
fn attached() -> (Tables, u64) {
    let mut tables = Tables::new(u64::MAX);
    let owner = tables.plug(ENDPOINT, Arc::default(), None);
    tables.attach(DOMAIN, ENDPOINT, false).unwrap();
    (tables, owner)
}

type Translated = Result<Option<Vec<Piece>>, (FaultReason, u64)>;

fn translate(tables: &Tables, owner: u64, input: u64, bytes: u64) -> Translated {
    tables.translate((ENDPOINT, owner), (input, bytes), READ, (false, 8))
}

fn piece(address: u64, bytes: u64) -> Piece {
    Piece { address, bytes }
}

#[test]
fn translation_crosses_mappings_that_touch_and_stops_at_a_gap() {
    let (mut tables, owner) = attached();
    tables.map(DOMAIN, 0x1000..=0x1fff, 0x9000, BOTH).unwrap();
    tables.map(DOMAIN, 0x2000..=0x3fff, 0x5000, READ).unwrap();
    let found = translate(&tables, owner, 0x1800, 0x1000);
    assert_eq!(
        found,
        Ok(Some(vec![piece(0x9800, 0x800), piece(0x5000, 0x800)]))
    );
    assert_eq!(
        translate(&tables, owner, 0x3fff, 2),
        Err((FaultReason::Mapping, 0x4000))
    );
    assert_eq!(
        translate(&tables, owner, 0xfff, 2),
        Err((FaultReason::Mapping, 0xfff))
    );
    assert_eq!(translate(&tables, owner, 0, 0), Ok(Some(Vec::new())));
    let few = tables.translate((ENDPOINT, owner), (0x1800, 0x1000), READ, (false, 1));
    assert_eq!(few, Ok(None), "more pieces than the caller accepts");
    let write = tables.translate((ENDPOINT, owner), (0x1800, 0x1000), WRITE, (false, 8));
    assert_eq!(write, Err((FaultReason::Mapping, 0x2000)));
}

#[test]
fn translation_reaches_the_last_address_and_does_not_wrap() {
    let (mut tables, owner) = attached();
    let first = u64::MAX - 0xfff;
    tables.map(DOMAIN, first..=u64::MAX, 0x5000, READ).unwrap();
    tables.map(DOMAIN, 0..=0xfff, 0x6000, READ).unwrap();
    assert_eq!(
        translate(&tables, owner, first, 0x1000),
        Ok(Some(vec![piece(0x5000, 0x1000)]))
    );
    assert_eq!(
        translate(&tables, owner, u64::MAX, 2),
        Err((FaultReason::Mapping, u64::MAX))
    );
    tables.unmap(DOMAIN, 0..=u64::MAX).unwrap();
    assert_eq!(tables.mappings(), 0);
    // One below the range of interrupts, one above.
    tables
        .map(DOMAIN, 0..=MSI_RANGE.start() - 1, 0, READ)
        .unwrap();
    let above = MSI_RANGE.end() + 1;
    tables.map(DOMAIN, above..=u64::MAX, above, READ).unwrap();
    let rest = u64::MAX - above;
    assert_eq!(
        translate(&tables, owner, above, u64::MAX),
        Err((FaultReason::Mapping, above + rest))
    );
}

#[test]
fn mapping_that_cannot_be_is_refused_and_changes_nothing() {
    let mut tables = Tables::new((1 << 32) - 1);
    tables.plug(ENDPOINT, Arc::default(), None);
    tables.plug(0x20, Arc::default(), None);
    tables.attach(DOMAIN, ENDPOINT, false).unwrap();
    tables.attach(6, 0x20, true).unwrap();
    tables.map(DOMAIN, 0x4000..=0x5fff, 0, BOTH).unwrap();
    #[expect(clippy::reversed_empty_ranges)]
    let reversed = 0x2000..=0x1fff;
    for (domain, input, to, refusal) in [
        (7, 0..=0xfff, 0, Refusal::NoEntry),
        (6, 0..=0xfff, 0, Refusal::Invalid),
        (DOMAIN, reversed, 0, Refusal::Invalid),
        (DOMAIN, 1..=0xfff, 0, Refusal::Range),
        (DOMAIN, 0..=0xffe, 0, Refusal::Range),
        (DOMAIN, 0..=0xfff, 1, Refusal::Range),
        (DOMAIN, 0..=0x1fff, u64::MAX - 0xfff, Refusal::Range),
        (DOMAIN, 1 << 32..=(1 << 32) + 0xfff, 0, Refusal::Range),
        (DOMAIN, 0xffff_f000..=(1 << 32) + 0xfff, 0, Refusal::Range),
        (DOMAIN, 0x3000..=0x4fff, 0, Refusal::Invalid),
        (DOMAIN, 0x5000..=0x5fff, 0, Refusal::Invalid),
        (DOMAIN, 0x1000..=0x9fff, 0, Refusal::Invalid),
        (DOMAIN, 0xfee0_0000..=0xfee0_0fff, 0, Refusal::Invalid),
        (DOMAIN, 0xf000_0000..=0xfeef_ffff, 0, Refusal::Invalid),
    ] {
        let done = tables.map(domain, input.clone(), to, BOTH);
        assert_eq!(done, Err(refusal), "{domain} {input:x?} {to:#x}");
    }
    for (domain, input, refusal) in [
        (7, 0..=u64::MAX, Refusal::NoEntry),
        (6, 0..=u64::MAX, Refusal::Invalid),
        (DOMAIN, 0x4000..=0x4fff, Refusal::Range),
        (DOMAIN, 0x5000..=0x9fff, Refusal::Range),
        (DOMAIN, 0..=0x4fff, Refusal::Range),
        (DOMAIN, 0x4000..=0x5ffe, Refusal::Range),
    ] {
        let done = tables.unmap(domain, input.clone());
        assert_eq!(done, Err(refusal), "{domain} {input:x?}");
    }
    assert_eq!(tables.mappings(), 1);
    assert_eq!(
        tables.unmap(DOMAIN, 0x8000..=0x8fff),
        Ok(()),
        "nothing there"
    );
}

#[test]
fn mappings_are_bounded_over_all_domains() {
    let (mut tables, _) = attached();
    tables.plug(0x20, Arc::default(), None);
    tables.attach(6, 0x20, false).unwrap();
    let page = |number: usize| {
        let first = (1 << 40) + number as u64 * GRANULE;
        first..=first + GRANULE - 1
    };
    for number in 0..MAPPINGS_MAX {
        let domain = [DOMAIN, 6][number % 2];
        tables.map(domain, page(number), 0, READ).unwrap();
    }
    let more = page(MAPPINGS_MAX);
    assert_eq!(
        tables.map(DOMAIN, more.clone(), 0, READ),
        Err(Refusal::NoMemory)
    );
    tables.unmap(6, page(1)).unwrap();
    tables.map(DOMAIN, more, 0, READ).unwrap();
    tables.detach(DOMAIN, ENDPOINT).unwrap();
    assert_eq!(tables.mappings(), MAPPINGS_MAX / 2 - 1);
    tables.unmap(6, 0..=u64::MAX).unwrap();
    assert_eq!(tables.mappings(), 0);
}

#[test]
fn domain_lives_as_long_as_it_has_endpoints() {
    let (mut tables, owner) = attached();
    assert_eq!(tables.attach(DOMAIN, 0x99, false), Err(Refusal::NoEntry));
    assert_eq!(tables.attach(DOMAIN, ENDPOINT, true), Err(Refusal::Invalid));
    assert_eq!(tables.attach(DOMAIN, ENDPOINT, false), Ok(()), "again");
    tables.map(DOMAIN, 0..=0xfff, 0x9000, READ).unwrap();
    let other = tables.plug(0x20, Arc::default(), None);
    tables.attach(DOMAIN, 0x20, false).unwrap();
    // Moving the first one to another domain leaves the second one its mappings.
    tables.attach(6, ENDPOINT, false).unwrap();
    let second = tables.translate((0x20, other), (0, 4), READ, (false, 8));
    assert_eq!(second, Ok(Some(vec![piece(0x9000, 4)])));
    assert_eq!(
        translate(&tables, owner, 0, 4),
        Err((FaultReason::Mapping, 0))
    );
    assert_eq!(tables.detach(DOMAIN, ENDPOINT), Err(Refusal::Invalid));
    assert_eq!(tables.detach(6, 0x99), Err(Refusal::NoEntry));
    tables.detach(DOMAIN, 0x20).unwrap();
    assert_eq!(
        tables.map(DOMAIN, 0..=0xfff, 0, READ),
        Err(Refusal::NoEntry)
    );
    assert_eq!(tables.mappings(), 0);
    tables.clear();
    assert_eq!(
        translate(&tables, owner, 0, 4),
        Err((FaultReason::Domain, 0))
    );
    assert!(tables.has_endpoint(ENDPOINT), "a reset unplugs nothing");
}

#[test]
fn device_in_the_slot_of_an_earlier_one_has_none_of_its_mappings() {
    let (mut tables, first) = attached();
    tables.map(DOMAIN, 0..=0xfff, 0x9000, READ).unwrap();
    let second = tables.plug(ENDPOINT, Arc::default(), None);
    for owner in [first, second] {
        assert_eq!(
            translate(&tables, owner, 0, 4),
            Err((FaultReason::Domain, 0))
        );
    }
    assert_eq!(tables.mappings(), 0);
    tables.unplug(ENDPOINT, first);
    assert!(tables.has_endpoint(ENDPOINT), "it belongs to the second");
    tables.unplug(ENDPOINT, second);
    assert!(!tables.has_endpoint(ENDPOINT));
}

#[test]
fn endpoint_without_a_domain_passes_only_with_bypass() {
    let mut tables = Tables::new(u64::MAX);
    let owner = tables.plug(ENDPOINT, Arc::default(), None);
    let pass = |tables: &Tables, bypass| {
        tables.translate((ENDPOINT, owner), (0x1234, 8), WRITE, (bypass, 8))
    };
    assert_eq!(pass(&tables, true), Ok(Some(vec![piece(0x1234, 8)])));
    assert_eq!(pass(&tables, false), Err((FaultReason::Domain, 0x1234)));
    tables.attach(DOMAIN, ENDPOINT, true).unwrap();
    assert_eq!(pass(&tables, false), Ok(Some(vec![piece(0x1234, 8)])));
    tables.attach(6, ENDPOINT, false).unwrap();
    assert_eq!(pass(&tables, true), Err((FaultReason::Mapping, 0x1234)));
}

/// Pages of the model's address space.
const PAGES: u64 = 24;

#[derive(Debug, Clone)]
enum Step {
    Map(u64, u64, u64, Permissions),
    Unmap(u64, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let permissions = prop_oneof![Just(READ), Just(WRITE), Just(BOTH), Just(Permissions::No)];
    let map = (0..PAGES, 1..6_u64, 0..PAGES, permissions)
        .prop_map(|(first, pages, to, allows)| Step::Map(first, pages, to, allows));
    let unmap = (0..PAGES, 1..12_u64).prop_map(|(first, pages)| Step::Unmap(first, pages));
    proptest::collection::vec(prop_oneof![3 => map, 1 => unmap], 1..40)
}

proptest! {
    /// The model has each page for itself: the mapping's first page and last page, its target, its permissions.
    #[test]
    fn tables_are_those_of_a_page_by_page_model(steps in steps()) {
        let (mut tables, owner) = attached();
        let mut model = BTreeMap::<u64, ((u64, u64), u64, Permissions)>::new();
        for step in steps {
            match step {
                Step::Map(first, pages, to, allows) => {
                    let range = first * GRANULE..=(first + pages) * GRANULE - 1;
                    let free = (first..first + pages).all(|page| !model.contains_key(&page));
                    let done = tables.map(DOMAIN, range, to * GRANULE, allows);
                    prop_assert_eq!(done.is_ok(), free);
                    if free {
                        let own = (first, first + pages - 1);
                        model.extend((0..pages).map(|at| (first + at, (own, to + at, allows))));
                    }
                }
                Step::Unmap(first, pages) => {
                    let inside = first..first + pages;
                    let whole = inside.clone().filter_map(|page| model.get(&page))
                        .all(|((start, end), ..)| inside.contains(start) && inside.contains(end));
                    let range = first * GRANULE..=(first + pages) * GRANULE - 1;
                    prop_assert_eq!(tables.unmap(DOMAIN, range).is_ok(), whole);
                    if whole {
                        model.retain(|page, _| !inside.contains(page));
                    }
                }
            }
            let starts: Vec<_> = model.values().map(|((start, _), ..)| *start).collect();
            let mut mappings = starts.clone();
            mappings.dedup();
            prop_assert_eq!(tables.mappings(), mappings.len());
            for access in [READ, WRITE, BOTH] {
                for page in 0..PAGES + 8 {
                    let input = page * GRANULE + 7;
                    let found = tables.translate((ENDPOINT, owner), (input, 9), access, (true, 8));
                    let expected = model.get(&page)
                        .filter(|(_, _, allows)| allows.allow(access))
                        .map(|(_, to, _)| Some(vec![piece(to * GRANULE + 7, 9)]));
                    prop_assert_eq!(found.ok(), expected);
                }
            }
        }
    }
}
