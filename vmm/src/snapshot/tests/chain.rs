//! Tests chains of snapshots, and snapshots of a running machine, without a guest.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use hypervisor::Kvm;
use machine::memory::RamSlots;

use super::*;

pub(super) const PAGE: u64 = 4096;
pub(super) const PAGES: u64 = (8 << 20) / PAGE;

/// RAM whose writes are recorded, and a folder for snapshots.
pub(super) struct Machine {
    memory: GuestMemory,
    slots: RamSlots,
    folder: tempfile::TempDir,
}

impl Machine {
    fn new() -> Option<Self> {
        let kvm = Kvm::open().map_err(test_skip::skip).ok()?;
        let memory = GuestMemory::new(&config().memory, 46).unwrap();
        let vm = std::sync::Arc::new(kvm.create_vm().unwrap());
        let slots = memory.attach(&vm).unwrap();
        let folder = tempfile::tempdir().unwrap();
        Some(Self {
            memory,
            slots,
            folder,
        })
    }

    fn recorder(&self) -> Recorder {
        Recorder::new(self.slots.track_writes(&self.memory).unwrap())
    }

    fn put(&self, page: u64, value: u64) {
        put(&self.memory, page, value);
    }

    fn new_folder(&self, name: &str) -> PathBuf {
        let folder = self.folder.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        folder
    }

    /// Saves the paused machine into the folder `name`, based on the snapshot `base`.
    fn save(
        &self,
        recorder: &mut Recorder,
        name: &str,
        base: Option<&str>,
    ) -> Result<(), SnapshotError> {
        let folder = self.new_folder(name);
        let base = base.map(|base| {
            let base = self.folder.path().join(base);
            Recorder::base(Some(recorder), &base, &folder)
        });
        let link = Link::new(base.transpose()?).unwrap();
        let mut state = state(&self.memory);
        state.link = Some(link.clone());
        let written = recorder.take_all()?;
        let written = link.base.is_some().then_some(&written);
        let progress = progress(&self.memory);
        write(&folder, &config(), &state, &self.memory, written, &progress)?;
        recorder.saved(&folder, &link);
        Ok(())
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn put(memory: &GuestMemory, page: u64, value: u64) {
    let ram = memory.ram();
    ram.memory()
        .write_obj(value, GuestAddress(page * PAGE))
        .unwrap();
    ram.writes().record(page * PAGE, 8);
}

fn values(memory: &GuestMemory) -> Vec<u64> {
    let ram = memory.ram().memory();
    let value = |page| ram.read_obj(GuestAddress(page * PAGE)).unwrap();
    (0..PAGES).map(value).collect()
}

pub(super) fn restored(folder: &Path, filling: Filling) -> Result<Vec<u64>, SnapshotError> {
    let mut snapshot = Snapshot::open(folder, &|_| Ok(()))?;
    snapshot.filling = filling;
    let (memory, on_demand) = memory_with_content(&snapshot, &snapshot.config)?;
    let values = values(&memory);
    drop(on_demand);
    Ok(values)
}

/// Three snapshots, and RAM at the end.
pub(super) fn chain() -> Option<(Machine, Vec<u64>)> {
    let machine = Machine::new()?;
    let mut recorder = machine.recorder();
    for page in [0, 1, 511, 512, 2047] {
        machine.put(page, page + 1);
    }
    machine.save(&mut recorder, "first", None).unwrap();
    machine.put(1, 70);
    machine.put(600, 71);
    machine.put(512, 0);
    machine
        .save(&mut recorder, "second", Some("first"))
        .unwrap();
    machine.put(512, 72);
    machine.put(600, 0);
    machine
        .save(&mut recorder, "third", Some("second"))
        .unwrap();
    let values = values(&machine.memory);
    Some((machine, values))
}

#[test]
fn chain_is_restored_by_copy_and_on_demand_but_not_by_copy_on_write() {
    let Some((machine, expected)) = chain() else {
        return;
    };
    let third = machine.path("third");
    assert_eq!(restored(&third, Filling::Before).unwrap(), expected);
    if let Ok(filling) = Filling::of(&request(MemoryRestoreMode::OnDemand)) {
        assert_eq!(restored(&third, filling).unwrap(), expected);
    }
    let error = restored(&third, Filling::CopyOnWrite).unwrap_err();
    assert!(error_line(&error).contains("merge them first"), "{error}");
    assert!(error.is_of_request());
    // A base is a snapshot like any other.
    let first = restored(&machine.path("first"), Filling::CopyOnWrite).unwrap();
    assert_eq!((first[1], first[512], first[600]), (2, 513, 0));
    let folders = folders(&third, &|_| Ok(())).unwrap();
    let names: Vec<_> = folders.iter().map(|it| it.file_name().unwrap()).collect();
    assert_eq!(names, ["third", "second", "first"]);
}

#[test]
fn merged_chain_needs_no_other_snapshot() {
    let Some((machine, expected)) = chain() else {
        return;
    };
    let merged = machine.new_folder("merged");
    merge(&machine.path("third"), &merged, &|_| Ok(())).unwrap();
    let error = merge(&machine.path("third"), &merged, &|_| Ok(())).unwrap_err();
    assert!(matches!(error, SnapshotError::Exists { .. }), "{error}");
    for name in ["first", "second", "third"] {
        std::fs::remove_dir_all(machine.path(name)).unwrap();
    }
    assert_eq!(restored(&merged, Filling::Before).unwrap(), expected);
    assert_eq!(restored(&merged, Filling::CopyOnWrite).unwrap(), expected);
    // Only pages that hold data at the end.
    let file = std::fs::metadata(merged.join("memory-0")).unwrap();
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file);
    assert!(blocks * 512 <= 6 * PAGE, "{blocks}");
}

#[test]
fn broken_chain_is_refused_by_name_and_merged_into_nothing() {
    type Break = fn(&Machine);
    let breaks: [(&str, Break); 7] = [
        ("second/state.json", |it| {
            std::fs::remove_dir_all(it.path("second")).unwrap();
        }),
        // In the wrong order.
        ("second breaks the chain", |it| {
            std::fs::rename(it.path("first"), it.path("x")).unwrap();
            std::fs::rename(it.path("second"), it.path("first")).unwrap();
            std::fs::rename(it.path("x"), it.path("second")).unwrap();
        }),
        // Another snapshot, which has no id.
        ("first breaks the chain", |it| {
            std::fs::remove_dir_all(it.path("first")).unwrap();
            let folder = it.new_folder("first");
            let (state, progress) = (state(&it.memory), progress(&it.memory));
            write(&folder, &config(), &state, &it.memory, None, &progress).unwrap();
        }),
        ("second/state.json is damaged", |it| {
            let path = it.path("second").join("state.json");
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, text.replacen("zeros", "zeroz", 1)).unwrap();
        }),
        ("zone mem0 of snapshot second is damaged", |it| {
            let path = it.path("second").join("memory-0");
            let file = std::fs::File::options().write(true).open(path).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &[9], PAGE + 8).unwrap();
        }),
        ("first/memory-0 is damaged", |it| {
            let path = it.path("first").join("memory-0");
            let file = std::fs::File::options().write(true).open(path).unwrap();
            file.set_len(PAGE).unwrap();
        }),
        ("the name of its base", |it| {
            rename_base(&it.path("third"), "../second");
        }),
    ];
    for (expected, damage) in breaks {
        let Some((machine, _)) = chain() else {
            return;
        };
        damage(&machine);
        let error = restored(&machine.path("third"), Filling::Before).unwrap_err();
        let told = error_line(&error);
        assert!(told.contains(expected), "{expected}: {told}");
        assert!(error.is_of_request(), "{told}");
        let merged = machine.new_folder("merged");
        let error = merge(&machine.path("third"), &merged, &|_| Ok(())).unwrap_err();
        assert!(error_line(&error).contains(expected), "{error}");
        assert_eq!(merged.read_dir().unwrap().count(), 0);
    }
}

/// Changes the name of the base in the snapshot in `folder`, with a checksum that matches.
fn rename_base(folder: &Path, name: &str) {
    let path = folder.join("state.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.pop();
    let mut state: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
    state["link"]["base"]["folder"] = json!(name);
    lines[0] = state.to_string();
    let mut text = lines.join("\n") + "\n";
    text += &state_file::checksum_line(crc32fast::hash(text.as_bytes()));
    std::fs::write(&path, text).unwrap();
}

#[test]
fn name_of_a_base_never_leads_elsewhere() {
    for name in [
        "",
        ".",
        "..",
        "/",
        "/etc",
        "a/b",
        "../second",
        "second/../second",
    ] {
        let Some((machine, _)) = chain() else {
            return;
        };
        let third = machine.path("third");
        rename_base(&third, name);
        let error = restored(&third, Filling::Before).unwrap_err();
        assert!(
            matches!(error, SnapshotError::Chain { .. }),
            "{name}: {error}"
        );
    }
    let Some((machine, _)) = chain() else {
        return;
    };
    // Based on itself.
    let third = machine.path("third");
    rename_base(&third, "third");
    let error = restored(&third, Filling::Before).unwrap_err();
    assert!(error.to_string().contains("breaks the chain"), "{error}");
    // A folder that the VMM may not read.
    let refused = |_: &Path| Err(SnapshotError::ChainTooLong);
    let error = Snapshot::open(&machine.path("second"), &refused).unwrap_err();
    assert!(matches!(error, SnapshotError::ChainTooLong), "{error}");
}

#[test]
fn difference_needs_the_last_recorded_snapshot_beside_it_and_a_chain_has_eight() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let mut recorder = machine.recorder();
    machine.save(&mut recorder, "s0", None).unwrap();
    machine.save(&mut recorder, "full", None).unwrap();
    for (base, folder) in [
        ("s0", machine.new_folder("a")),
        ("nothing", machine.new_folder("b")),
    ] {
        let error = Recorder::base(Some(&recorder), &machine.path(base), &folder).unwrap_err();
        assert!(
            matches!(error, SnapshotError::NotRecorded { .. }),
            "{error}"
        );
    }
    let elsewhere = tempfile::tempdir().unwrap();
    let full = machine.path("full");
    let error = Recorder::base(Some(&recorder), &full, elsewhere.path()).unwrap_err();
    assert!(
        error.to_string().contains("not in the same folder"),
        "{error}"
    );
    assert!(Recorder::base(None, &full, &machine.path("a")).is_err());
    let mut before = "full".to_owned();
    for number in 1..CHAIN_MAX {
        machine.put(number as u64, 5);
        let name = format!("d{number}");
        machine.save(&mut recorder, &name, Some(&before)).unwrap();
        before = name;
    }
    let error = machine
        .save(&mut recorder, "more", Some(&before))
        .unwrap_err();
    assert!(matches!(error, SnapshotError::ChainTooLong), "{error}");
    let last = machine.path(&before);
    assert_eq!(
        restored(&last, Filling::Before).unwrap(),
        values(&machine.memory)
    );
    assert_eq!(folders(&last, &|_| Ok(())).unwrap().len(), CHAIN_MAX);
    let merged = machine.new_folder("merged");
    merge(&last, &merged, &|_| Ok(())).unwrap();
    assert_eq!(
        restored(&merged, Filling::Before).unwrap(),
        values(&machine.memory)
    );
    // The base changes after it was saved.
    std::fs::remove_dir_all(&last).unwrap();
    assert!(Recorder::base(Some(&recorder), &last, &machine.path("a")).is_err());
}

#[test]
fn failed_difference_loses_nothing_for_the_next_one() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let mut recorder = machine.recorder();
    machine.save(&mut recorder, "first", None).unwrap();
    machine.put(9, 9);
    let bad = machine.new_folder("bad");
    std::fs::write(bad.join("memory-0"), "theirs").unwrap();
    let written = recorder.take_all().unwrap();
    let (state, progress) = (state(&machine.memory), progress(&machine.memory));
    let failed = write(
        &bad,
        &config(),
        &state,
        &machine.memory,
        Some(&written),
        &progress,
    );
    assert!(failed.is_err());
    machine.put(10, 10);
    machine
        .save(&mut recorder, "second", Some("first"))
        .unwrap();
    let found = restored(&machine.path("second"), Filling::Before).unwrap();
    assert_eq!((found[9], found[10]), (9, 10));
}

/// The owner of a machine that writes a page in each step.
struct FakeOwner {
    memory: GuestMemory,
    steps: Vec<&'static str>,
    fails: bool,
    ends: Sender<Ended>,
}

impl LiveOwner for FakeOwner {
    fn pause(&mut self) -> Result<(VmConfig, SnapshotState), SnapshotError> {
        self.steps.push("pause");
        put(&self.memory, 1000, 33);
        put(&self.memory, 0, 0);
        match self.fails {
            true => Err(SnapshotError::Incomplete),
            false => Ok((config(), state(&self.memory))),
        }
    }

    fn resume(&mut self) -> Result<(), SnapshotError> {
        self.steps.push("resume");
        // After the snapshot.
        put(&self.memory, 1001, 34);
        Ok(())
    }

    fn end(&mut self, end: Result<LiveReport, SnapshotError>, recorder: Option<Recorder>) {
        let steps = std::mem::take(&mut self.steps);
        self.ends.send((end, recorder, steps)).unwrap();
    }
}

type Ended = (
    Result<LiveReport, SnapshotError>,
    Option<Recorder>,
    Vec<&'static str>,
);

fn save_live(
    machine: &Machine,
    recorder: Recorder,
    name: &str,
    base: Option<Base>,
    (fails, cancelled): (bool, bool),
) -> Ended {
    let (ends, end) = channel();
    let mut owner = FakeOwner {
        memory: machine.memory.clone(),
        steps: Vec::new(),
        fails,
        ends,
    };
    let save = LiveSave {
        folder: machine.new_folder(name),
        link: Link::new(base).unwrap(),
        recorder,
        keeps_recording: true,
        progress: std::sync::Arc::new(progress(&machine.memory)),
        cancel: std::sync::Arc::new(AtomicBool::new(cancelled)),
    };
    save.run(&mut owner);
    end.recv_timeout(Duration::from_secs(60)).unwrap()
}

#[test]
fn live_snapshots_have_the_moment_of_the_pause_and_can_be_chained() {
    let Some(machine) = Machine::new() else {
        return;
    };
    for page in [0, 5, 2047] {
        machine.put(page, page + 1);
    }
    let recorder = machine.recorder();
    let (end, recorder, steps) = save_live(&machine, recorder, "first", None, (false, false));
    assert_eq!(end.unwrap().passes, 2);
    assert_eq!(steps, ["pause", "resume"]);
    let first = restored(&machine.path("first"), Filling::Before).unwrap();
    let found = [0, 5, 1000, 1001, 2047].map(|page| first[page]);
    assert_eq!(found, [0, 6, 33, 0, 2048]);
    // The write after the pause is in the next one.
    let recorder = recorder.unwrap();
    machine.put(5, 50);
    let folder = machine.path("first");
    let base = Recorder::base(Some(&recorder), &folder, &machine.path("second")).unwrap();
    let (end, recorder, _) = save_live(&machine, recorder, "second", Some(base), (false, false));
    let report = end.unwrap();
    assert!(report.data_bytes <= 4 * PAGE, "{report:?}");
    let second = restored(&machine.path("second"), Filling::Before).unwrap();
    let found = [0, 5, 1000, 1001, 2047].map(|page| second[page]);
    assert_eq!(found, [0, 50, 33, 34, 2048]);
    assert!(recorder.is_some_and(|it| it.has_base()));
}

#[test]
fn live_snapshot_that_fails_or_is_cancelled_leaves_nothing_and_the_machine_resumes() {
    let Some(machine) = Machine::new() else {
        return;
    };
    machine.put(5, 5);
    for (name, fails, cancelled, expected) in [
        ("fails", true, false, &["pause", "resume"][..]),
        ("cancelled", false, true, &[]),
    ] {
        let recorder = machine.recorder();
        let (end, recorder, steps) = save_live(&machine, recorder, name, None, (fails, cancelled));
        let error = end.unwrap_err();
        assert_eq!(
            matches!(error, SnapshotError::Cancelled),
            cancelled,
            "{error}"
        );
        assert_eq!(steps, expected);
        assert!(recorder.is_none(), "there is no base");
        assert_eq!(machine.path(name).read_dir().unwrap().count(), 0);
    }
    assert!(!machine.memory.ram().writes().is_on());
}
