//! Tests the discard engine on real mappings: which pages are zero afterwards, and which are not.
#![allow(unsafe_code)]
// UNSAFETY: `memfd_create` with huge pages has no safe wrapper among our dependencies.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use test_skip::skip;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap,
};

use crate::device::GuestRam;
use crate::reclaim::guarded_ram::{
    GuardedRam, HUGE_PAGE_PAGES, Kind, PAGE, RamArea, discard_and_check,
};
use crate::reclaim::{
    DiscardEngine, DiscardSwitch, Expected, GuestRange, InhibitReason, Outcome, ResidencyProbe,
    SkipReason,
};
use crate::worker::{Turn, Work};

const PAGE_BYTES: u64 = PAGE as u64;

/// Both engines: with vectors, if this kernel has them, and without.
fn engines() -> [DiscardEngine; 2] {
    [
        DiscardEngine::new(Arc::default()),
        DiscardEngine::without_vectors(Arc::default()),
    ]
}

fn pages(first: u64, count: u64) -> GuestRange {
    GuestRange {
        start: first * PAGE_BYTES,
        bytes: count * PAGE_BYTES,
    }
}

fn area(guest_page: u64, pages: usize, kind: Kind) -> RamArea {
    RamArea {
        guest_page,
        pages,
        kind,
    }
}

fn assert_balanced(outcome: &Outcome) {
    assert_eq!(
        outcome.requested.bytes,
        outcome.discarded.bytes + outcome.failed.bytes + outcome.skipped.total()
    );
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        4 => Just(Kind::Anonymous),
        3 => Just(Kind::Memfd),
        1 => Just(Kind::PrivateFile),
        1 => Just(Kind::ReadOnlyMemfd),
    ]
}

fn area_lists() -> impl Strategy<Value = Vec<RamArea>> {
    vec((0..6_u64, 1..24_usize, kinds()), 1..5).prop_map(|shapes| {
        let mut at = 0;
        let mut areas = Vec::new();
        for (gap, pages, kind) in shapes {
            at += gap;
            areas.push(area(at, pages, kind));
            at += pages as u64;
        }
        areas
    })
}

fn claim_lists() -> impl Strategy<Value = Vec<GuestRange>> {
    let whole = (0..100_u64, 0..12_u64).prop_map(|(first, count)| pages(first, count));
    let ragged = (0..100 * PAGE_BYTES, 0..6 * PAGE_BYTES)
        .prop_map(|(start, bytes)| GuestRange { start, bytes });
    let wild = (any::<u64>(), any::<u32>()).prop_map(|(start, bytes)| GuestRange {
        start,
        bytes: u64::from(bytes),
    });
    vec(prop_oneof![6 => whole, 3 => ragged, 1 => wild], 0..24)
}

fn expectations() -> impl Strategy<Value = Expected> {
    prop_oneof![Just(Expected::Zeros), Just(Expected::Anything)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn engine_discards_the_intersection_and_nothing_else(
        areas in area_lists(),
        claims in claim_lists(),
        expected in expectations(),
    ) {
        for mut engine in engines() {
            discard_and_check(&mut engine, &areas, &claims, expected).unwrap();
        }
    }
}

/// Huge pages next to other kinds, and claims of similar sizes.
fn huge_area_lists() -> impl Strategy<Value = Vec<RamArea>> {
    let huge = (1..3_usize).prop_map(|count| (count * HUGE_PAGE_PAGES, Kind::Huge));
    let small = (1..40_usize, kinds());
    vec((0..300_u64, prop_oneof![2 => huge, 1 => small]), 1..4).prop_map(|shapes| {
        let mut at = 0;
        let mut areas = Vec::new();
        for (gap, (pages, kind)) in shapes {
            at += gap;
            areas.push(area(at, pages, kind));
            at += pages as u64;
        }
        areas
    })
}

fn large_claim_lists() -> impl Strategy<Value = Vec<GuestRange>> {
    let large = (0..2000_u64, 0..1200_u64).prop_map(|(first, count)| pages(first, count));
    vec(large, 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn engine_discards_whole_huge_pages_beside_others(
        areas in huge_area_lists(),
        claims in large_claim_lists(),
        expected in expectations(),
    ) {
        for mut engine in engines() {
            if let Err(error) = discard_and_check(&mut engine, &areas, &claims, expected) {
                skip(format!("cases with more huge pages than this host has set aside: {error}"));
            }
        }
    }
}

#[test]
fn engine_with_vectors_discards_scattered_pages_in_one_call() {
    let mut engine = DiscardEngine::new(Arc::default());
    if !engine.has_vectors() {
        skip("this kernel does not discard by vector");
        return;
    }
    let guarded = GuardedRam::new(&[
        area(0, 600, Kind::Anonymous),
        area(600, 600, Kind::Anonymous),
    ]);
    let mut claims: Vec<_> = (0..1200).step_by(2).map(|page| pages(page, 1)).collect();
    let outcome = engine.discard(&guarded.ram, &mut claims, Expected::Zeros);
    assert_eq!((outcome.discarded.ranges, outcome.syscalls), (600, 1));
    assert_eq!(guarded.discarded().len(), 600);
}

#[test]
fn engine_splits_vectors_at_the_longest_the_kernel_takes() {
    for mut engine in engines() {
        let guarded = GuardedRam::new(&[area(0, 4200, Kind::Anonymous)]);
        let mut claims: Vec<_> = (0..2100).map(|at| pages(2 * at, 1)).collect();
        let outcome = engine.discard(&guarded.ram, &mut claims, Expected::Zeros);
        assert_eq!(outcome.discarded.bytes, 2100 * PAGE_BYTES);
        let calls = if engine.has_vectors() { 3 } else { 2100 };
        assert_eq!(outcome.syscalls, calls);
        assert_eq!(guarded.discarded().len(), 2100);
    }
}

#[test]
fn contiguous_pages_cost_one_call_whatever_the_kernel() {
    for mut engine in engines() {
        for kind in [Kind::Anonymous, Kind::Memfd] {
            let guarded = GuardedRam::new(&[area(0, 256, kind)]);
            let mut claims: Vec<_> = (0..256).rev().map(|page| pages(page, 1)).collect();
            let outcome = engine.discard(&guarded.ram, &mut claims, Expected::Zeros);
            assert_eq!(
                (outcome.syscalls, outcome.discarded.ranges),
                (1, 1),
                "{kind:?}"
            );
        }
    }
}

#[test]
fn range_the_kernel_refuses_fails_alone() {
    for mut engine in engines() {
        let guarded = GuardedRam::new(&[area(0, 12, Kind::Anonymous)]);
        guarded.lock_page(0, 4);
        let mut claims = [pages(0, 2), pages(4, 1), pages(6, 2), pages(10, 1)];
        let outcome = engine.discard(&guarded.ram, &mut claims, Expected::Zeros);
        assert_balanced(&outcome);
        assert_eq!(
            (outcome.failed.ranges, outcome.failed.bytes),
            (1, PAGE_BYTES)
        );
        let error = outcome.first_error.expect("the first failure is told");
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        let pages: Vec<_> = guarded.discarded().iter().map(|(_, page)| *page).collect();
        assert_eq!(pages, [0, 1, 6, 7, 10]);
    }
}

#[test]
fn zeroed_prefix_ends_at_the_first_page_that_was_not_discarded() {
    for mut engine in engines() {
        let guarded = GuardedRam::new(&[
            area(0, 12, Kind::Anonymous),
            area(12, 4, Kind::Memfd),
            area(16, 4, Kind::PrivateFile),
        ]);
        guarded.lock_page(0, 4);
        let mut claims = [pages(0, 8), pages(10, 8), pages(100, 1)];
        engine.discard(&guarded.ram, &mut claims, Expected::Anything);
        let zeroed = |first, count| engine.zeroed_prefix(pages(first, count)) / PAGE_BYTES;
        // Page 4 failed, and with it its range: how far the kernel came is unknown.
        assert_eq!((zeroed(0, 4), zeroed(0, 8), zeroed(4, 1)), (0, 0, 0));
        assert_eq!(zeroed(8, 4), 0, "not claimed");
        assert_eq!(zeroed(10, 8), 6, "up to the private file");
        assert_eq!(zeroed(11, 3), 3, "across two regions");
        assert_eq!(zeroed(16, 2), 0);
        assert_eq!(zeroed(100, 1), 0, "outside of RAM");
        assert_eq!(zeroed(2, 0), 0);
    }
}

#[test]
fn private_file_is_dropped_only_where_its_bytes_are_good_enough() {
    for mut engine in engines() {
        let guarded = GuardedRam::new(&[area(0, 8, Kind::PrivateFile)]);
        let probe = ResidencyProbe::new(guarded.ram.clone()).unwrap();
        let mut claims = [pages(0, 3), pages(5, 3)];
        let outcome = engine.discard(&guarded.ram, &mut claims, Expected::Zeros);
        assert_eq!(outcome.skipped.get(SkipReason::PrivateFile), 6 * PAGE_BYTES);
        assert_eq!((outcome.syscalls, guarded.discarded()), (0, vec![]));
        let outcome = engine.discard(&guarded.ram, &mut claims, Expected::Anything);
        assert_eq!(outcome.discarded.bytes, 6 * PAGE_BYTES);
        assert_eq!(probe.measure().unwrap().resident_bytes, 2 * PAGE_BYTES);
        assert_eq!(guarded.discarded().len(), 6);
        assert_eq!(engine.zeroed_prefix(pages(0, 3)), 0, "the file shows again");
    }
}

#[test]
fn inhibited_engine_discards_nothing_until_the_guard_goes() {
    let switch = Arc::<DiscardSwitch>::default();
    let mut engine = DiscardEngine::new(Arc::clone(&switch));
    let guarded = GuardedRam::new(&[area(0, 4, Kind::Anonymous)]);
    let guard = switch.inhibit(InhibitReason::AssignedDevice);
    let outcome = engine.discard(&guarded.ram, &mut [pages(0, 4)], Expected::Zeros);
    assert_eq!(outcome.skipped.get(SkipReason::Inhibited), 4 * PAGE_BYTES);
    assert_eq!((outcome.syscalls, guarded.discarded()), (0, vec![]));
    assert_eq!(engine.discarded_ranges().count(), 0);
    assert_eq!(engine.zeroed_prefix(pages(0, 4)), 0);
    drop(guard);
    let outcome = engine.discard(&guarded.ram, &mut [pages(0, 4)], Expected::Zeros);
    assert_eq!(outcome.discarded.bytes, 4 * PAGE_BYTES);
}

#[test]
fn memory_that_a_device_can_access_stays() {
    for mut engine in engines() {
        for kind in [Kind::Anonymous, Kind::Memfd] {
            let guarded = GuardedRam::new(&[area(0, 8, kind)]);
            let mapped = [
                2 * PAGE_BYTES..3 * PAGE_BYTES,
                5 * PAGE_BYTES..20 * PAGE_BYTES,
            ];
            mapped
                .iter()
                .for_each(|it| guarded.ram.dma_mapped().hold(it));
            let outcome = engine.discard(&guarded.ram, &mut [pages(0, 6)], Expected::Zeros);
            assert_balanced(&outcome);
            assert_eq!(outcome.skipped.get(SkipReason::DmaMapped), 2 * PAGE_BYTES);
            assert_eq!(outcome.discarded.bytes, 4 * PAGE_BYTES);
            assert_eq!(guarded.discarded(), [(0, 0), (0, 1), (0, 3), (0, 4)]);
            // After the device has lost access, the same claim frees it.
            mapped
                .iter()
                .for_each(|it| guarded.ram.dma_mapped().release(it));
            let outcome = engine.discard(&guarded.ram, &mut [pages(0, 8)], Expected::Zeros);
            assert_eq!(outcome.discarded.bytes, 8 * PAGE_BYTES);
        }
    }
}

#[test]
fn engine_follows_a_memory_map_that_changes() {
    let first = GuardedRam::new(&[area(0, 4, Kind::Anonymous)]);
    let second = GuardedRam::new(&[area(0, 8, Kind::Anonymous)]);
    let mut engine = DiscardEngine::new(Arc::default());
    engine.discard(&first.ram, &mut [pages(0, 1)], Expected::Zeros);
    let new_map: Arc<GuestMemoryMmap<()>> = second.ram.memory().into_inner();
    first.ram.lock().unwrap().replace((*new_map).clone());
    let outcome = engine.discard(&first.ram, &mut [pages(5, 2)], Expected::Zeros);
    assert_eq!(outcome.discarded.bytes, 2 * PAGE_BYTES);
    let zeroed: BTreeSet<_> = second.discarded().into_iter().collect();
    assert_eq!(zeroed, BTreeSet::from([(0, 5), (0, 6)]));
}

/// Shared huge pages, as with `--memory hugepages=on`. `None` if the host has none reserved.
fn huge_ram(pages: usize) -> Option<GuestRam> {
    let name = c"huge";
    let flags = libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    let bytes = pages * HUGE_PAGE_BYTES as usize;
    // SAFETY: the name is a C string, and a returned descriptor has no other owner.
    let file = unsafe {
        let fd = libc::memfd_create(name.as_ptr(), flags);
        (fd >= 0).then(|| File::from_raw_fd(fd))?
    };
    file.set_len(bytes as u64).ok()?;
    let region = MmapRegionBuilder::new(bytes)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .with_file_offset(FileOffset::new(file, 0))
        .build()
        .ok()?;
    let region = GuestRegionMmap::new(region, GuestAddress(0))?;
    Some(GuestRam::new(
        GuestMemoryMmap::from_regions(vec![region]).ok()?,
    ))
}

/// A file on a file system without holes, in a mount namespace that ends with its thread.
fn file_without_holes(bytes: u64) -> std::io::Result<File> {
    let folder = tempfile::tempdir()?;
    let ram = folder.path().join("ram");
    let path = std::ffi::CString::new(folder.path().as_os_str().as_encoded_bytes())?;
    std::thread::spawn(move || {
        let done = |ret: libc::c_int| match ret {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        };
        let root = c"/".as_ptr();
        let none = std::ptr::null();
        let private = libc::MS_REC | libc::MS_PRIVATE;
        // SAFETY: every name is a C string that outlives its call, and the mount is visible only to this thread.
        unsafe {
            done(libc::unshare(libc::CLONE_NEWNS))?;
            done(libc::mount(none, root, none, private, none.cast()))?;
            done(libc::mount(
                none,
                path.as_ptr(),
                c"ramfs".as_ptr(),
                0,
                none.cast(),
            ))?;
        }
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(ram);
        file.and_then(|file| file.set_len(bytes).map(|()| file))
    })
    .join()
    .unwrap()
}

#[test]
fn file_that_cannot_have_holes_is_skipped_and_counted() {
    let bytes = 8 * PAGE_BYTES;
    let file = match file_without_holes(bytes) {
        Ok(file) => file,
        Err(error) => {
            skip(format!("no ramfs can be mounted here: {error}"));
            return;
        }
    };
    let region = MmapRegionBuilder::new(usize::try_from(bytes).unwrap())
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .with_file_offset(FileOffset::new(file, 0))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let ram = GuestRam::new(GuestMemoryMmap::from_regions(vec![region]).unwrap());
    ram.memory().write_obj(7_u8, GuestAddress(0)).unwrap();
    let mut engine = DiscardEngine::new(Arc::default());
    let outcome = engine.discard(&ram, &mut [pages(0, 8)], Expected::Zeros);
    let skipped = outcome.skipped.get(SkipReason::UnsupportedBacking);
    assert_eq!((skipped, outcome.syscalls), (bytes, 0));
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0)).unwrap(), 7);
}

const HUGE_PAGE_BYTES: u64 = 2 << 20;

#[test]
fn huge_pages_are_freed_whole_or_not_at_all() {
    let Some(ram) = huge_ram(2) else {
        skip("this host has no huge pages set aside");
        return;
    };
    let mem = ram.memory().into_inner();
    let probe = ResidencyProbe::new(ram.clone()).unwrap();
    mem.write_slice(&[1; 2 * HUGE_PAGE_BYTES as usize], GuestAddress(0))
        .unwrap();
    assert_eq!(probe.measure().unwrap().resident_bytes, 2 * HUGE_PAGE_BYTES);
    let mut engine = DiscardEngine::new(Arc::default());

    // Punching a part of a huge page would zero it and free nothing.
    let outcome = engine.discard(&ram, &mut [pages(0, 511)], Expected::Zeros);
    assert_eq!(
        (
            outcome.syscalls,
            outcome.skipped.get(SkipReason::BackingPageLarger)
        ),
        (0, 511 * PAGE_BYTES)
    );
    assert_eq!(mem.read_obj::<u8>(GuestAddress(0)).unwrap(), 1);

    let mut claims: Vec<_> = (256..1024).map(|page| pages(page, 1)).collect();
    let outcome = engine.discard(&ram, &mut claims, Expected::Zeros);
    assert_eq!(outcome.discarded.bytes, HUGE_PAGE_BYTES);
    assert_eq!(mem.read_obj::<u8>(GuestAddress(0)).unwrap(), 1);
    assert_eq!(
        mem.read_obj::<u8>(GuestAddress(HUGE_PAGE_BYTES)).unwrap(),
        0
    );
}

#[test]
fn long_ranges_are_discarded_in_pieces_between_which_a_command_is_seen() {
    const MIB: u64 = 1 << 20;
    // Never touched, so it uses no memory.
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 30)]).unwrap();
    let ram = GuestRam::new(mem);
    let one = GuestRange {
        start: 0,
        bytes: 1024 * MIB,
    };
    let many: Vec<_> = (0..512)
        .map(|at| GuestRange {
            start: 2 * at * MIB,
            bytes: MIB,
        })
        .collect();
    for mut engine in engines() {
        for (claims, calls_least) in [(vec![one], 8), (many.clone(), 4)] {
            let mut turn = Turn::default();
            let outcome = engine
                .discard_unless_called(&ram, &mut claims.clone(), Expected::Zeros, &mut turn)
                .expect("no command comes in");
            assert_eq!(outcome.discarded, outcome.requested);
            assert!(outcome.syscalls >= calls_least);
            let most = turn.most_between_looks();
            assert!(most.bytes <= 128 * MIB && most.calls == 1, "{most:?}");

            turn.begin();
            turn.call_after(2);
            let outcome =
                engine.discard_unless_called(&ram, &mut claims.clone(), Expected::Zeros, &mut turn);
            assert!(outcome.is_none());
            assert_eq!(turn.done_in_spite(), Work::default());
        }
    }
}
