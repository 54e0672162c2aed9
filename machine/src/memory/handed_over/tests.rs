#![allow(unsafe_code)]
// UNSAFETY: memfd_create has no safe wrapper.

use api::config::{HotplugMethod, MemoryConfig};
use virtio_devices::reclaim::{DiscardEngine, Expected, GuestRange, ResidencyProbe};
use vm_memory::{Bytes, MemoryRegionAddress};

use super::*;
use crate::memory::layout::MIB;
use crate::memory::{MemoryState, RestoreError, ZoneFiles};

fn config(bytes: u64) -> MemoryConfig {
    MemoryConfig {
        size: bytes,
        shared: true,
        ..MemoryConfig::default()
    }
}

fn files(memory: &GuestMemory) -> Vec<File> {
    let files = memory.memory_files().unwrap();
    files.iter().map(|it| it.try_clone().unwrap()).collect()
}

fn hand_over(
    config: &MemoryConfig,
    state: &MemoryState,
    files: Vec<File>,
) -> Result<GuestMemory, RestoreError> {
    let files = ZoneFiles::Given(files.into_iter());
    GuestMemory::with_dimms(config, 46, state, files)
}

fn resident_bytes(memory: &GuestMemory) -> u64 {
    let probe = ResidencyProbe::new(memory.ram().clone()).unwrap();
    probe.measure().unwrap().resident_bytes
}

#[test]
fn memory_of_all_kinds_of_zones_is_the_same_in_the_other_process() {
    let config = MemoryConfig {
        hotplug_size: Some(1 << 30),
        ..config(64 * MIB)
    };
    let virtio_mem = MemoryConfig {
        hotplug_method: HotplugMethod::VirtioMem,
        ..config.clone()
    };
    for (config, grows) in [(virtio_mem, false), (config, true)] {
        let mut source = GuestMemory::new(&config, 46).unwrap();
        let mut moved = config.clone();
        if grows {
            let dimm = source.map_dimm(64 * MIB + 128 * MIB).unwrap().unwrap();
            source.add_dimm(dimm);
            moved.size = source.own_bytes();
        }
        assert_eq!(source.zones().len(), 2);
        let (start, second) = (0, source.zones()[1].ranges[0].start);
        for address in [start, start + 8 * MIB, second, second + 8 * MIB] {
            let ram = source.ram().memory();
            ram.write_obj(address | 1, GuestAddress(address)).unwrap();
        }
        // Given back: resident neither here nor there.
        let mut given_back = [GuestRange {
            start: 8 * MIB,
            bytes: 4096,
        }];
        let mut engine = DiscardEngine::without_vectors(Default::default());
        engine.discard(source.ram(), &mut given_back, Expected::Zeros);
        let target = hand_over(&moved, &source.state(), files(&source)).unwrap();
        assert_eq!(resident_bytes(&target), 3 * 4096);
        drop(source);
        assert_eq!(resident_bytes(&target), 3 * 4096);
        let read = |address| -> u64 {
            let ram = target.ram().memory();
            ram.read_obj(GuestAddress(address)).unwrap()
        };
        assert_eq!(read(start), start | 1);
        assert_eq!(read(8 * MIB), 0);
        assert_eq!(read(second + 8 * MIB), (second + 8 * MIB) | 1);
    }
}

#[test]
fn both_sides_of_the_hole_come_from_one_file() {
    let config = config((3 << 30) | (4 * MIB));
    let source = GuestMemory::new(&config, 46).unwrap();
    let above = GuestAddress(4 << 30);
    source.ram().memory().write_obj(7_u64, above).unwrap();
    let files = files(&source);
    assert_eq!(files.len(), 1);
    let target = hand_over(&config, &source.state(), files).unwrap();
    assert_eq!(target.ram().memory().read_obj::<u64>(above).unwrap(), 7);
    let ram = target.ram().memory();
    let region = ram.find_region(above).unwrap();
    assert_eq!(region.file_offset().unwrap().start(), 3 << 30);
    assert!(region.checked_offset(MemoryRegionAddress(0), 1).is_some());
}

#[test]
fn private_zone_is_named_with_the_settings_that_help() {
    let config = MemoryConfig {
        shared: false,
        ..config(64 * MIB)
    };
    let error = GuestMemory::new(&config, 46).unwrap().memory_files();
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("zone mem0 is anonymous-private") && error.contains("use shared=on"),
        "{error}"
    );
}

#[test]
fn files_that_are_not_the_zones_are_refused_by_name() {
    let config = config(64 * MIB);
    let source = GuestMemory::new(&config, 46).unwrap();
    let state = source.state();
    let good = || files(&source).remove(0);
    let plain = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * MIB).unwrap();
        file
    };
    let unsealed = || {
        // SAFETY: the name is a zero-terminated constant.
        let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_ALLOW_SEALING) };
        // SAFETY: the descriptor is open and has no other owner.
        let file: File = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) };
        file.set_len(64 * MIB).unwrap();
        file
    };
    let other = GuestMemory::new(&self::config(32 * MIB), 46).unwrap();
    let private = MemoryConfig {
        shared: false,
        ..config.clone()
    };
    let pipe = || File::from(std::os::fd::OwnedFd::from(std::io::pipe().unwrap().0));
    for (config, files, text) in [
        (&config, vec![], "is missing"),
        (&config, vec![good(), good()], "more memory files"),
        (&config, vec![plain()], "not a memory file"),
        (&config, vec![pipe()], "not a memory file"),
        (&config, vec![unsealed()], "not sealed"),
        (&config, vec![files(&other).remove(0)], "another size"),
        (&private, vec![good()], "has none here"),
    ] {
        let error = hand_over(config, &state, files).unwrap_err();
        let error = ::api::error_line(&error);
        assert!(error.contains(text), "{text}: {error}");
    }
}

#[test]
fn one_file_for_two_zones_is_refused() {
    let zone = |id: &str| api::config::MemoryZoneConfig {
        id: id.to_owned(),
        size: 8 * MIB,
        shared: true,
        ..Default::default()
    };
    let config = MemoryConfig {
        zones: Some(vec![zone("a"), zone("b")]),
        ..config(0)
    };
    let source = GuestMemory::new(&config, 46).unwrap();
    let first = files(&source).remove(0);
    let twice = vec![first.try_clone().unwrap(), first];
    let error = hand_over(&config, &source.state(), twice).unwrap_err();
    let error = ::api::error_line(&error);
    assert!(error.contains("zones a and b share a file"), "{error}");
}
