use std::os::unix::fs::FileExt;

use virtio_devices::reclaim::{DiscardEngine, DiscardSwitch, Expected, GuestRange, Outcome};
use vm_memory::Bytes;

use super::super::layout::{MIB, PAGE_BYTES};
use super::super::test_memory::{self, address, mark, zones};
use super::*;

/// Single pages and runs; between pages 600 and 700 are holes.
const PAGES: [u64; 9] = [0, 1, 511, 512, 600, 700, 701, 1700, 1791];

fn memory(shared: bool) -> GuestMemory {
    zones(&[("a", shared)])
}

fn read(memory: &GuestMemory, page: u64) -> u64 {
    memory.ram().memory().read_obj(address(page)).unwrap()
}

fn write(memory: &GuestMemory, page: u64, value: u64) {
    let ram = memory.ram().memory();
    ram.write_obj(value, address(page)).unwrap();
}

fn save(memory: &GuestMemory) -> Vec<SavedZone> {
    let files = test_memory::saved(memory);
    files.into_iter().map(SavedZone::from).collect()
}

fn saved() -> Vec<SavedZone> {
    let memory = memory(false);
    for page in PAGES {
        write(&memory, page, mark(page));
    }
    save(&memory)
}

fn shown(files: &[SavedZone]) -> GuestMemory {
    let memory = memory(false);
    memory.show_files(files, true, |_| ()).unwrap();
    memory
}

fn discard(memory: &GuestMemory, pages: std::ops::Range<u64>) -> Outcome {
    let mut claims = [GuestRange {
        start: pages.start * PAGE_BYTES,
        bytes: (pages.end - pages.start) * PAGE_BYTES,
    }];
    let engine = DiscardEngine::new(Arc::<DiscardSwitch>::default());
    let mut engine = engine.over(memory.overlay().cloned());
    let outcome = engine.discard(memory.ram(), &mut claims, Expected::Zeros);
    // The guest may be told that all of it reads as zeros.
    let zeroed = engine.zeroed_prefix(claims[0]);
    assert!(outcome.discarded.bytes < claims[0].bytes || zeroed == claims[0].bytes);
    outcome
}

#[test]
fn machines_see_the_file_and_each_its_own_writes() {
    let files = saved();
    let (first, second) = (shown(&files), shown(&files));
    write(&first, 1, 7);
    write(&first, 650, 8);
    for page in 0..1792 {
        let expected = if PAGES.contains(&page) { mark(page) } else { 0 };
        assert_eq!(read(&second, page), expected, "{page}");
    }
    assert_eq!((read(&first, 1), read(&first, 650)), (7, 8));
    assert_eq!(read(&first, 700), mark(700));
}

#[test]
fn discarded_page_is_zero_and_never_the_files_again() {
    let files = saved();
    let memory = shown(&files);
    write(&memory, 1, 7);
    // Written, read, never touched; across the border of two chunks, and of the file.
    assert_eq!(read(&memory, 700), mark(700));
    for pages in [0..2, 511..513, 699..701, 1024..1792] {
        let bytes = (pages.end - pages.start) * PAGE_BYTES;
        let outcome = discard(&memory, pages);
        assert_eq!(outcome.discarded.bytes, bytes, "{outcome:?}");
    }
    for page in [0, 1, 511, 512, 700, 1700, 1791] {
        assert_eq!(read(&memory, page), 0, "{page}");
    }
    assert_eq!(
        (read(&memory, 600), read(&memory, 701)),
        (mark(600), mark(701))
    );
    write(&memory, 700, 9);
    assert_eq!(discard(&memory, 700..701).discarded.bytes, PAGE_BYTES);
    assert_eq!(read(&memory, 700), 0);
}

#[test]
fn every_other_page_is_discarded_and_its_neighbours_stay() {
    let full = memory(false);
    for page in 0..1792 {
        write(&full, page, mark(page));
    }
    let files = save(&full);
    let memory = shown(&files);
    for page in (0..1792).step_by(2) {
        let outcome = discard(&memory, page..page + 1);
        assert_eq!(outcome.discarded.bytes, PAGE_BYTES, "{outcome:?}");
        assert_eq!(read(&memory, page), 0);
        assert_eq!(read(&memory, page + 1), mark(page + 1));
    }
}

#[test]
fn memory_that_shows_a_file_is_saved_as_the_guest_sees_it() {
    let memory = shown(&saved());
    write(&memory, 1, 7);
    write(&memory, 1000, 8);
    discard(&memory, 700..701);
    let again = shown(&save(&memory));
    for page in 0..1792 {
        assert_eq!(read(&again, page), read(&memory, page), "{page}");
    }
}

#[test]
fn damaged_file_and_other_memory_are_refused_by_name() {
    let files = saved();
    let refused = memory(true).show_files(&files, true, |_| ()).unwrap_err();
    assert!(
        refused.to_string().contains("zone a is memfd-shared"),
        "{refused}"
    );
    let refused = |files: &[_]| {
        let refused = memory(false).show_files(files, true, |_| ()).unwrap_err();
        refused.to_string()
    };
    // In a page, and between two.
    for at in [600 * PAGE_BYTES + 1, 650 * PAGE_BYTES] {
        let files = saved();
        files[0]
            .single()
            .unwrap()
            .file
            .write_all_at(&[1], at)
            .unwrap();
        let told = refused(&files);
        assert!(
            told.contains("zone a is damaged at offset 0x200000"),
            "{told}"
        );
    }
    files[0].single().unwrap().file.set_len(MIB).unwrap();
    let told = refused(&files);
    assert!(told.contains("the memory file has"), "{told}");
}
