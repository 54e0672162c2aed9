#![allow(clippy::unwrap_used)]
//! Tests the folders of VMs in standby.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{getgid, getuid};
use tempfile::TempDir;

use super::*;
use crate::host::ProcessIdentity;
use crate::model::Bytes;

fn record(vm: &str) -> Record {
    let process = ProcessIdentity {
        pid: i32::MAX,
        start_ticks: 1,
    };
    Record::saving(
        vm,
        PathBuf::from("/run/ch/a.sock"),
        (process, getuid().as_raw(), getgid().as_raw()),
        (Bytes::gib(1), false),
        7,
    )
}

fn made(dir: &Path) -> StandbyFolder {
    let folder = StandbyFolder::create(dir, &record("a")).unwrap();
    for name in ["config.json", "memory-0", "state.json"] {
        fs::write(folder.snapshot().join(name), "{}").unwrap();
    }
    folder
}

fn error_of(dir: &Path) -> StandbyError {
    StandbyFolder::open(dir, "a").unwrap_err()
}

#[test]
fn folder_comes_back_as_it_was_written_until_it_is_removed() {
    let here = TempDir::new().unwrap();
    let dir = here.path().join("standby");
    assert!(names(&dir).unwrap().is_empty());
    let folder = made(&dir);
    assert_eq!(names(&dir).unwrap(), ["a"]);
    let (opened, known) = StandbyFolder::open(&dir, "a").unwrap();
    assert_eq!((opened, known.clone()), (folder.clone(), record("a")));
    let later = Record {
        phase: Phase::Standby,
        ..known
    };
    folder.write(&later).unwrap();
    assert_eq!(StandbyFolder::open(&dir, "a").unwrap().1, later);
    assert!(folder.check().unwrap() > Bytes::ZERO);
    folder.remove().unwrap();
    assert!(names(&dir).unwrap().is_empty());
    // The name is free immediately.
    made(&dir);
}

#[test]
fn snapshot_can_be_written_by_its_user_alone() {
    let here = TempDir::new().unwrap();
    let folder = made(here.path());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(folder.path()), 0o711);
    assert_eq!(mode(&folder.snapshot()), 0o700);
    assert_eq!(mode(&folder.lock()), 0o600);
    assert_eq!(mode(&folder.path().join("record.json")), 0o600);
}

#[test]
fn second_folder_of_a_name_is_refused() {
    let here = TempDir::new().unwrap();
    made(here.path());
    let refused = StandbyFolder::create(here.path(), &record("a")).unwrap_err();
    assert!(matches!(refused, StandbyError::Exists { .. }), "{refused}");
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let here = TempDir::new().unwrap();
    let long = "n".repeat(201);
    for name in ["", ".", "..", ".a", "a/b", "/a", "a\n", "a\"b", &long] {
        let refused = StandbyFolder::create(here.path(), &record(name)).unwrap_err();
        assert!(
            matches!(refused, StandbyError::Name { .. }),
            "{name:?}: {refused}"
        );
        assert!(StandbyFolder::open(here.path(), name).is_err(), "{name:?}");
    }
    assert!(fs::read_dir(here.path()).unwrap().next().is_none());
    check_name("web-1,a=[b] ü").unwrap();
}

#[test]
fn damaged_records_are_refused_by_name() {
    let here = TempDir::new().unwrap();
    let path = made(here.path()).path().join("record.json");
    let text = fs::read_to_string(&path).unwrap();
    for length in 0..text.len() {
        fs::write(&path, &text[..length]).unwrap();
        let error = error_of(here.path());
        assert!(
            matches!(error, StandbyError::Form { .. }),
            "{length}: {error}"
        );
    }
    let write = |from: &str, to: &str| {
        assert!(text.contains(from), "{text}");
        fs::write(&path, text.replace(from, to)).unwrap();
        error_of(here.path())
    };
    let error = write("\"version\": 1", "\"version\": 2, \"more\": 3");
    assert!(
        matches!(error, StandbyError::Version { found: 2, .. }),
        "{error}"
    );
    let error = write("\"vm\": \"a\"", "\"vm\": \"b\"");
    assert!(matches!(error, StandbyError::OtherVm { .. }), "{error}");
    let error = write("\"saving\"", "\"sleeping\"");
    assert!(matches!(error, StandbyError::Form { .. }), "{error}");
    let error = write("{", "{\"unknown\": 1,");
    assert!(matches!(error, StandbyError::Form { .. }), "{error}");
    fs::write(&path, " ".repeat((1 << 20) + 1)).unwrap();
    let error = error_of(here.path());
    assert!(matches!(error, StandbyError::Long { .. }), "{error}");
    fs::remove_file(&path).unwrap();
    let error = error_of(here.path());
    assert!(matches!(error, StandbyError::System { .. }), "{error}");
}

#[test]
fn links_are_not_followed() {
    let here = TempDir::new().unwrap();
    let folder = made(here.path());
    let elsewhere = here.path().join("elsewhere");
    fs::write(&elsewhere, "kept").unwrap();
    let in_snapshot = folder.snapshot().join("memory-1");
    symlink(&elsewhere, &in_snapshot).unwrap();
    let error = folder.check().unwrap_err();
    assert!(matches!(error, StandbyError::NotAFile { .. }), "{error}");
    assert!(sync_snapshot(&folder.snapshot()).is_err());
    fs::remove_file(&in_snapshot).unwrap();
    folder.check().unwrap();

    let record = folder.path().join("record.json");
    fs::rename(&record, here.path().join("record")).unwrap();
    symlink(here.path().join("record"), &record).unwrap();
    assert!(StandbyFolder::open(here.path(), "a").is_err());

    symlink(folder.path(), here.path().join("b")).unwrap();
    let error = StandbyFolder::open(here.path(), "b").unwrap_err();
    assert!(matches!(error, StandbyError::NotAFolder { .. }), "{error}");
    fs::remove_dir_all(folder.snapshot()).unwrap();
    symlink(here.path(), folder.snapshot()).unwrap();
    let error = folder.check().unwrap_err();
    assert!(matches!(error, StandbyError::NotAFolder { .. }), "{error}");
    folder.remove().unwrap();
    assert_eq!(fs::read_to_string(elsewhere).unwrap(), "kept");
}

#[test]
fn snapshot_without_its_last_file_is_not_complete() {
    let here = TempDir::new().unwrap();
    let folder = made(here.path());
    fs::remove_file(folder.snapshot().join("state.json")).unwrap();
    for error in [
        folder.check().unwrap_err(),
        sync_snapshot(&folder.snapshot()).unwrap_err(),
    ] {
        assert!(matches!(error, StandbyError::Incomplete { .. }), "{error}");
    }
}

#[test]
fn folder_with_too_many_files_is_refused() {
    let here = TempDir::new().unwrap();
    let folder = made(here.path());
    for number in 0..1024 {
        File::create(folder.snapshot().join(number.to_string())).unwrap();
    }
    let error = folder.check().unwrap_err();
    assert!(matches!(error, StandbyError::TooMany { .. }), "{error}");
}

#[test]
fn lock_is_seen_as_long_as_its_file_is_open() {
    let here = TempDir::new().unwrap();
    let folder = made(here.path());
    assert!(!folder.is_locked().unwrap());
    let file = File::options().write(true).open(folder.lock()).unwrap();
    flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert!(folder.is_locked().unwrap());
    let own = i32::try_from(std::process::id()).unwrap();
    assert!(folder.is_open_in(Path::new("/proc"), own));
    drop(file);
    assert!(!folder.is_locked().unwrap());
    assert!(!folder.is_open_in(Path::new("/proc"), own));
    assert!(!folder.is_open_in(Path::new("/proc"), i32::MAX));
}

#[test]
fn leftovers_of_a_killed_agent_are_removed_and_nothing_else() {
    let here = TempDir::new().unwrap();
    made(here.path());
    for name in [".new-b", ".removed-1-0-c"] {
        fs::create_dir(here.path().join(name)).unwrap();
    }
    clean(here.path()).unwrap();
    crate::agent::fake_vmm::wait("the removal", || {
        let left = fs::read_dir(here.path()).unwrap();
        let left: io::Result<Vec<_>> = left.map(|entry| Ok(entry?.file_name())).collect();
        (left.unwrap() == ["a"]).then_some(())
    });
}

#[test]
fn images_that_are_changed_or_replaced_are_noticed() {
    let here = TempDir::new().unwrap();
    let folder = made(here.path());
    let image = |name: &str| here.path().join(name).display().to_string();
    for name in ["disk", "pmem", "readonly", "private"] {
        fs::write(image(name), name).unwrap();
    }
    let config = serde_json::json!({
        "disks": [
            {"path": image("disk"), "new": 1},
            {"path": image("readonly"), "readonly": true},
            {"path": image("absent")},
            {"path": "relative"},
            {"vhost_user": true},
            {"path": image("")},
        ],
        "pmem": [
            {"file": image("pmem")},
            {"file": image("private"), "discard_writes": true},
        ],
    });
    fs::write(folder.snapshot().join("config.json"), config.to_string()).unwrap();
    let found = images(&folder.snapshot()).unwrap();
    let paths: Vec<String> = found
        .iter()
        .map(|it| it.path.display().to_string())
        .collect();
    assert_eq!(paths, [image("disk"), image("pmem")]);
    assert!(found.iter().all(|image| !image.has_changed()));
    fs::write(image("disk"), "longer than before").unwrap();
    fs::write(image("new"), "pmem").unwrap();
    fs::rename(image("new"), image("pmem")).unwrap();
    assert!(found.iter().all(Image::has_changed));
    fs::remove_file(image("disk")).unwrap();
    assert!(found[0].has_changed());
    for text in ["", "[]", "{\"disks\": 1}"] {
        fs::write(folder.snapshot().join("config.json"), text).unwrap();
        images(&folder.snapshot()).unwrap_err();
    }
}
