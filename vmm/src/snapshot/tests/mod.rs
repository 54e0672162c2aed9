#![allow(clippy::unwrap_used)]

mod chain;
mod samples;

use api::config::{
    FsConfig, MemoryRestoreMode, MemoryZoneConfig, NetConfig, RestoredNetConfig, ZoneUpdate,
};
use api::{RestoreConfig, VmConfig, error_line};
use machine::memory::GuestMemory;
use machine::memory::on_demand::OnDemand;
use serde_json::json;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::events::EventSink;

fn config() -> VmConfig {
    let mut config = VmConfig::default();
    config.memory.size = 8 << 20;
    config
}

/// The saved states are parsed only when the machine is built.
fn state(memory: &GuestMemory) -> SnapshotState {
    let part = json!({"version": 1});
    let pc = json!({
        "version": 1, "memory": Saved::of(&memory.state()), "vcpus": part, "ioapic": part, "pci_bus": part,
        "pci_hotplug": part, "devices": {}, "pvpanic": null, "serial": null, "cmos": part, "pm_timer": part, "ged": part,
    });
    SnapshotState {
        pc: serde_json::from_value(pc).unwrap(),
        thresholds: ReclaimThresholdsChange::default(),
        reporting_paused: true,
        memory_size_after_reboot: None,
        link: None,
        next_device_number: 0,
    }
}

fn sink() -> EventSink {
    std::sync::Arc::new(|_| ())
}

fn context() -> RestoreContext {
    RestoreContext {
        events: sink(),
        signals: std::sync::Arc::new(machine::signals::VmSignals::new().unwrap()),
        thread_start: std::sync::Arc::new(|_| ()),
    }
}

fn progress(memory: &GuestMemory) -> Progress {
    Progress::of_snapshot(memory, sink())
}

fn memory() -> GuestMemory {
    let memory = GuestMemory::new(&config().memory, 46).unwrap();
    let ram = memory.ram().memory();
    ram.write_slice(&[7; 5000], GuestAddress(4 << 20)).unwrap();
    drop(ram);
    memory
}

/// Writes RAM with its content and this configuration.
fn write_to(folder: &tempfile::TempDir, config: &VmConfig) -> Result<(), SnapshotError> {
    let memory = memory();
    let (state, progress) = (state(&memory), progress(&memory));
    write(folder.path(), config, &state, &memory, None, &progress).map(drop)
}

fn written() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_to(&folder, &config()).unwrap();
    folder
}

fn names(folder: &tempfile::TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(folder.path()).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

/// The RAM of `config` with the content of the snapshot.
fn memory_with_content(
    snapshot: &Snapshot,
    config: &VmConfig,
) -> Result<(GuestMemory, Option<OnDemand>), SnapshotError> {
    let memory = snapshot.new_memory(config)?;
    let on_demand = snapshot.fill(&memory, config, &context())?;
    Ok((memory, on_demand))
}

fn load(folder: &tempfile::TempDir) -> Result<GuestMemory, SnapshotError> {
    let snapshot = Snapshot::open(folder.path(), &|_| Ok(()))?;
    let loaded = memory_with_content(&snapshot, &snapshot.config);
    loaded.map(|(memory, _)| memory)
}

#[test]
fn snapshot_comes_back_from_its_folder() {
    let folder = written();
    assert_eq!(names(&folder), ["config.json", "memory-0", "state.json"]);
    let snapshot = Snapshot::open(folder.path(), &|_| Ok(())).unwrap();
    assert_eq!(snapshot.config, config());
    assert!(snapshot.state.reporting_paused);
    let mut bytes = [0; 5001];
    let ram = load(&folder).unwrap();
    let ram = ram.ram().memory();
    ram.read_slice(&mut bytes, GuestAddress(4 << 20)).unwrap();
    assert_eq!((bytes[0], bytes[4999], bytes[5000]), (7, 7, 0));
}

#[test]
fn state_of_the_version_without_a_pending_size_is_read() {
    let mut older = serde_json::to_value(Saved::of(&state(&memory()))).unwrap();
    let fields = older.as_object_mut().unwrap();
    fields.insert("version".to_owned(), json!(2));
    fields.remove("memory_size_after_reboot").unwrap();
    fields.remove("link").unwrap();
    fields.remove("next_device_number").unwrap();
    let older: Saved = serde_json::from_value(older).unwrap();
    assert_eq!(older.read::<SnapshotState>().unwrap(), state(&memory()));
}

fn request(mode: MemoryRestoreMode) -> RestoreConfig {
    RestoreConfig {
        memory_restore_mode: mode,
        ..RestoreConfig::default()
    }
}

#[test]
fn snapshot_comes_back_on_demand() {
    let folder = written();
    let filling = match Filling::of(&request(MemoryRestoreMode::OnDemand)) {
        Err(SnapshotError::OnDemand(error)) => return test_skip::skip(error),
        filling => filling.unwrap(),
    };
    let mut snapshot = Snapshot::open(folder.path(), &|_| Ok(())).unwrap();
    snapshot.filling = filling;
    let (memory, on_demand) = memory_with_content(&snapshot, &snapshot.config).unwrap();
    let mut bytes = [0; 5001];
    let ram = memory.ram().memory();
    ram.read_slice(&mut bytes, GuestAddress(4 << 20)).unwrap();
    assert_eq!((bytes[0], bytes[4999], bytes[5000]), (7, 7, 0));
    assert!(on_demand.unwrap().finish());
}

#[test]
fn settings_that_exclude_restoring_on_demand_are_refused() {
    let refused = [
        RestoreConfig {
            prefault: true,
            ..request(MemoryRestoreMode::OnDemand)
        },
        RestoreConfig {
            background_fill: false,
            ..request(MemoryRestoreMode::Copy)
        },
    ];
    for request in refused {
        let error = Filling::of(&request).unwrap_err();
        assert!(error.is_of_request(), "{error}");
    }
}

#[test]
fn memory_devices_come_back_where_they_were() {
    let mut config = config();
    config.memory.hotplug_size = Some(256 << 20);
    let mut memory = GuestMemory::new(&config.memory, 46).unwrap();
    config.memory.size += 128 << 20;
    memory.add_dimm(memory.map_dimm(config.memory.size).unwrap().unwrap());
    let address = GuestAddress((4 << 30) + (5 << 20));
    memory.ram().memory().write_obj(7_u8, address).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (state, progress) = (state(&memory), progress(&memory));
    write(folder.path(), &config, &state, &memory, None, &progress).unwrap();
    let mut loaded = load(&folder).unwrap();
    assert_eq!(loaded.state(), memory.state());
    let byte: u8 = loaded.ram().memory().read_obj(address).unwrap();
    assert_eq!(byte, 7);
    // There is room for one more.
    loaded.add_dimm(
        loaded
            .map_dimm(config.memory.size + (128 << 20))
            .unwrap()
            .unwrap(),
    );
    assert_eq!(loaded.dimms()[1].end, (4 << 30) + (256 << 20));
}

#[test]
fn folder_in_use_is_refused_and_left_alone() {
    for name in [
        "config.json",
        "memory-0",
        "state.json",
        "state.json.partial",
    ] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), "theirs").unwrap();
        let error = write_to(&folder, &config()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(names(&folder), [name], "what was written is gone again");
        let text = std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(text, "theirs");
    }
}

#[test]
fn zone_in_a_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    config.memory.zones = Some(vec![MemoryZoneConfig {
        id: "disk".to_owned(),
        file: Some("/f".into()),
        ..MemoryZoneConfig::default()
    }]);
    let error = write_to(&folder, &config).unwrap_err();
    assert!(error.to_string().contains("zone disk"), "{error}");
    assert!(names(&folder).is_empty());
}

#[test]
fn restored_configuration_with_a_zone_in_a_file_is_refused() {
    let folder = written();
    let mut edited = config();
    edited.memory.zones = Some(vec![MemoryZoneConfig {
        id: "disk".to_owned(),
        file: Some("/f".into()),
        ..MemoryZoneConfig::default()
    }]);
    let text = serde_json::to_string(&edited).unwrap();
    std::fs::write(folder.path().join("config.json"), text).unwrap();
    let error = Snapshot::open(folder.path(), &|_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("zone disk"), "{error}");
}

#[test]
fn fifo_in_place_of_a_file_is_refused_without_waiting_for_a_writer() {
    for name in ["config.json", "memory-0", "state.json"] {
        let folder = written();
        let path = folder.path().join(name);
        std::fs::remove_file(&path).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let error = Snapshot::open(folder.path(), &|_| Ok(())).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert!(error.to_string().contains("is not a file"), "{error}");
    }
}

#[test]
fn vm_with_a_shared_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    config.fs = Some(vec![FsConfig {
        tag: "home".to_owned(),
        ..FsConfig::default()
    }]);
    let error = write_to(&folder, &config).unwrap_err();
    assert!(error.to_string().contains("folder home"), "{error}");
    assert!(error.is_of_request() && names(&folder).is_empty());
}

#[test]
fn url_of_another_form_or_without_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    assert_eq!(folder_of(&format!("file://{path}")).unwrap(), folder.path());
    for url in ["", path, "file://", "file://relative", "http:///tmp"] {
        assert!(
            matches!(folder_of(url), Err(SnapshotError::Url { .. })),
            "{url}"
        );
    }
    let absent = folder_of(&format!("file://{path}/x")).unwrap_err();
    assert!(
        matches!(absent, SnapshotError::NotAFolder { .. }),
        "{absent}"
    );
}

#[test]
fn state_cut_or_changed_anywhere_is_refused() {
    let folder = written();
    let path = folder.path().join("state.json");
    let text = std::fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let error = Snapshot::open(folder.path(), &|_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("state.json"), "{error}");
        assert!(error.is_of_request());
    };
    for end in 0..text.len() {
        refused(&text[..end]);
    }
    for at in 0..text.len() {
        let mut flipped = text.clone();
        flipped[at] ^= 1 << (at % 8);
        refused(&flipped);
    }
    refused(&[&text[..], b"\n"].concat());
}

#[test]
fn file_that_is_absent_or_of_another_size_is_refused_by_name() {
    for name in ["config.json", "memory-0", "state.json"] {
        let folder = written();
        std::fs::remove_file(folder.path().join(name)).unwrap();
        let error = Snapshot::open(folder.path(), &|_| Ok(())).unwrap_err();
        assert!(
            error.to_string().contains(name) && error.is_of_request(),
            "{error}"
        );
    }
    let folder = written();
    let file = std::fs::File::options()
        .write(true)
        .open(folder.path().join("memory-0"));
    file.unwrap().set_len(4096).unwrap();
    let error = Snapshot::open(folder.path(), &|_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("memory-0"), "{error}");
}

#[test]
fn configuration_of_other_memory_is_refused() {
    let folder = written();
    let mut other = config();
    other.memory.size = 16 << 20;
    let text = serde_json::to_string(&other).unwrap();
    std::fs::write(folder.path().join("config.json"), text).unwrap();
    let error = error_line(&load(&folder).unwrap_err());
    assert!(error.contains("memory-map"), "{error}");
}

/// Replaces the lines of `state.json` by `change`d ones, with a checksum that matches.
fn rewrite(folder: &tempfile::TempDir, change: impl FnOnce(&mut Vec<String>)) {
    let path = folder.path().join("state.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.pop();
    change(&mut lines);
    let mut text = lines.join("\n") + "\n";
    text += &state_file::checksum_line(crc32fast::hash(text.as_bytes()));
    std::fs::write(&path, text).unwrap();
}

#[test]
fn state_with_other_lines_is_refused() {
    type Change = fn(&mut Vec<String>);
    let changes: [(&str, Change); 5] = [
        ("a line is missing", |lines| lines.truncate(1)),
        ("Cannot read", Vec::clear),
        ("surplus line", |lines| lines.push("{}".to_owned())),
        ("Cannot read", |lines| lines[0] = "[]".to_owned()),
        ("too long", |lines| {
            lines[1].insert_str(0, &" ".repeat(64 << 10));
        }),
    ];
    for (expected, change) in changes {
        let folder = written();
        rewrite(&folder, change);
        let error = Snapshot::open(folder.path(), &|_| Ok(())).unwrap_err();
        let told = error_line(&error);
        assert!(
            told.contains(expected) && told.contains("state.json"),
            "{told}"
        );
        assert!(error.is_of_request());
    }
}

#[test]
fn state_too_long_for_the_configured_machine_is_refused_unread() {
    let folder = written();
    let file = std::fs::File::options()
        .write(true)
        .open(folder.path().join("state.json"));
    // A size that would not fit into the host's memory.
    file.unwrap().set_len(1 << 40).unwrap();
    let error = Snapshot::open(folder.path(), &|_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");
    assert!(error.is_of_request());
}

#[test]
fn memory_is_populated_only_if_the_snapshot_fits_it() {
    let folder = written();
    let snapshot = Snapshot::open(folder.path(), &|_| Ok(())).unwrap();
    let mut config = config();
    config.memory.prefault = true;
    let (memory, _) = memory_with_content(&snapshot, &config).unwrap();
    let probe = virtio_devices::reclaim::ResidencyProbe::new(memory.ram().clone()).unwrap();
    assert_eq!(probe.measure().unwrap().resident_bytes, 8 << 20);
    // More RAM than any host has.
    config.memory.size = 1 << 42;
    let error = memory_with_content(&snapshot, &config).unwrap_err();
    assert!(error_line(&error).contains("memory-map"), "{error}");
}

fn with_taps(net_fds: &[(&str, usize)], fds: &[i32]) -> Result<VmConfig, SnapshotError> {
    let net = |id: &str, fds: Option<Vec<i32>>| NetConfig {
        id: Some(id.to_owned()),
        fds,
        ..NetConfig::default()
    };
    let mut config = config();
    config.memory.prefault = true;
    config.net = Some(vec![
        net("a", Some(vec![-1, -1])),
        net("b", None),
        net("c", Some(vec![-1])),
    ]);
    let named = net_fds.iter().map(|(id, num_fds)| RestoredNetConfig {
        id: (*id).to_owned(),
        num_fds: *num_fds,
        fds: Vec::new(),
    });
    let request = RestoreConfig {
        net_fds: Some(named.collect()),
        ..RestoreConfig::default()
    };
    adapt(&mut config, &request, fds).map(|()| config)
}

#[test]
fn interfaces_from_descriptors_get_those_of_the_request() {
    let config = with_taps(&[("c", 1), ("a", 2)], &[7, 8, 9]).unwrap();
    let nets = config.net.unwrap();
    let fds: Vec<_> = nets.iter().map(|net| net.fds.clone()).collect();
    assert_eq!(fds, [Some(vec![8, 9]), None, Some(vec![7])]);
    assert!(!config.memory.prefault);
    for (named, fds) in [
        (&[("a", 2)][..], &[1, 2][..]),
        (&[("a", 1), ("c", 1)], &[1, 2]),
        (&[("a", 2), ("c", 1)], &[1, 2]),
        (&[("a", usize::MAX), ("c", 2)], &[1, 2]),
        (&[("a", 2), ("a", 2), ("c", 1)], &[1, 2, 3, 4, 5]),
    ] {
        assert!(with_taps(named, fds).is_err(), "{named:?}");
    }
}

#[test]
fn zones_move_to_the_nodes_of_the_request() {
    let zone = |id: &str| MemoryZoneConfig {
        id: id.to_owned(),
        host_numa_node: Some(7),
        ..MemoryZoneConfig::default()
    };
    let moved = |updates: &[(&str, u32)]| {
        let mut config = config();
        config.memory.zones = Some(vec![zone("a"), zone("b")]);
        let updates = updates.iter().map(|(id, node)| ZoneUpdate {
            id: (*id).to_owned(),
            host_numa_node: *node,
        });
        let request = RestoreConfig {
            zone_updates: Some(updates.collect()),
            ..RestoreConfig::default()
        };
        adapt(&mut config, &request, &[]).map(|()| {
            let zones = config.memory.zones.unwrap().into_iter();
            zones.map(|zone| zone.host_numa_node).collect::<Vec<_>>()
        })
    };
    assert_eq!(moved(&[("b", 0)]).unwrap(), [Some(7), Some(0)]);
    assert_eq!(moved(&[("b", 1), ("a", 2)]).unwrap(), [Some(2), Some(1)]);
    for (updates, word) in [
        (&[("a", 0), ("a", 1)][..], "zone a twice"),
        (&[("", 0)], "does not have"),
        (&[("a", 0), ("c", 0)], "zone c, which"),
    ] {
        let error = moved(updates).unwrap_err();
        assert!(
            error.to_string().contains(word) && error.is_of_request(),
            "{error}"
        );
    }
}
