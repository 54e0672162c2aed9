use state::{Saved, State};

use super::*;
use crate::memory::test_memory::zones;
use virtio_devices::reclaim::{DiscardEngine, Expected, GuestRange, ResidencyProbe};

/// Only the tests wrap a table in its own envelope.
impl State for ZoneContentState {
    const PART: Part = PART;
}

/// Two zones, the second shared.
fn memory() -> GuestMemory {
    zones(&[("a", false), ("b", true)])
}

fn resident_bytes(memory: &GuestMemory) -> u64 {
    let probe = ResidencyProbe::new(memory.ram().clone()).unwrap();
    probe.measure().unwrap().resident_bytes
}

fn put(memory: &GuestMemory, page: u64, byte: u8) {
    let data = [byte; PAGE];
    let address = GuestAddress(page * PAGE_BYTES);
    memory.ram().memory().write_slice(&data, address).unwrap();
}

fn content(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; 14 * MIB as usize];
    let ram = memory.ram().memory();
    ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// Pages with data at the borders of chunks and zones, and one page of zeros.
fn filled() -> GuestMemory {
    let memory = memory();
    for page in [0, 1, 511, 512, 1700, 1791, 1792, 2303, 2304, 3583] {
        put(&memory, page, page as u8 | 1);
    }
    put(&memory, 100, 0);
    put(&memory, 2000, 0);
    memory
}

fn saved(memory: &GuestMemory) -> Vec<(File, ZoneContentState)> {
    let zones = memory.zones().iter();
    zones
        .map(|zone| {
            let file = tempfile::tempfile().unwrap();
            let state = memory.save_zone(zone, &file, |_| ()).unwrap();
            (file, state)
        })
        .collect()
}

fn load(memory: &GuestMemory, files: &[(File, ZoneContentState)]) -> Result<(), ContentError> {
    let mut zones = memory.zones().iter().zip(files);
    zones.try_for_each(|(zone, (file, state))| memory.load_zone(zone, file, state, true, |_| ()))
}

#[test]
fn content_comes_back_and_only_pages_with_data_are_resident() {
    use std::os::unix::fs::MetadataExt;

    let memory = filled();
    let before = resident_bytes(&memory);
    let files = saved(&memory);
    assert_eq!(resident_bytes(&memory), before, "saving touches nothing");
    for ((file, state), expected) in files.iter().zip([6, 4]) {
        let pages = state.chunks.iter().flat_map(|chunk| &chunk.pages.0);
        assert_eq!(pages.map(|byte| byte.count_ones()).sum::<u32>(), expected);
        assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
    }
    let other = self::memory();
    load(&other, &files).unwrap();
    assert_eq!(resident_bytes(&other), 10 * PAGE_BYTES);
    assert!(content(&other) == content(&memory));
}

#[test]
fn page_that_was_given_back_is_not_in_the_file() {
    let memory = filled();
    let claim = |page: u64| GuestRange {
        start: page * PAGE_BYTES,
        bytes: PAGE_BYTES,
    };
    let mut gone = [claim(1), claim(2303)];
    DiscardEngine::new(Default::default()).discard(memory.ram(), &mut gone, Expected::Anything);
    for ((_, state), expected) in saved(&memory).into_iter().zip([5, 3]) {
        let pages = state.chunks.iter().flat_map(|chunk| &chunk.pages.0);
        assert_eq!(pages.map(|byte| byte.count_ones()).sum::<u32>(), expected);
    }
}

#[test]
fn holes_that_a_copy_of_the_file_lost_stay_absent() {
    let memory = filled();
    let mut files = saved(&memory);
    for (file, _) in &mut files {
        let mut bytes = vec![0; 7 * MIB as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        // Bytes outside the listed pages do not matter.
        bytes[5 * PAGE] = 1;
        file.write_all_at(&bytes, 0).unwrap();
    }
    let other = self::memory();
    load(&other, &files).unwrap();
    assert_eq!(resident_bytes(&other), 10 * PAGE_BYTES);
    assert!(content(&other) == content(&memory));
}

#[test]
fn damaged_file_is_refused_by_name() {
    let files = saved(&filled());
    for page in [0, 511, 512, 1700] {
        for (at, bit) in [(0, 0), (PAGE as u64 - 1, 7)] {
            let file = &files[0].0;
            let at = page * PAGE_BYTES + at;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
            let error = load(&memory(), &files).unwrap_err();
            assert!(matches!(error, ContentError::Damaged { .. }), "{error}");
            assert!(error.to_string().contains("zone a"), "{error}");
            file.write_all_at(&byte, at).unwrap();
        }
    }
    load(&memory(), &files).unwrap();
    for bytes in [0, PAGE_BYTES, 7 * MIB - 1, 7 * MIB + 1] {
        files[1].0.set_len(bytes).unwrap();
        let error = load(&memory(), &files).unwrap_err();
        assert!(error.to_string().contains("the memory file has"), "{error}");
    }
}

#[test]
fn damaged_table_is_refused_or_loads() {
    let (file, state) = saved(&filled()).remove(0);
    let memory = memory();
    let zone = &memory.zones()[0];
    let mut refused = 0;
    let count = state::testing::damage(&Saved::of(&state), |damaged| {
        let Ok(state) = damaged.read::<ZoneContentState>() else {
            return;
        };
        refused += usize::from(
            memory
                .load_zone(zone, &file, &state, false, |_| ())
                .is_err(),
        );
    });
    assert!(count > 100 && refused > 20, "{refused} of {count}");
}
