//! Snapshots of earlier versions: `samples/N/` has the `state.json` of the chain in `chain.rs`, as it was written once.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use machine::memory::ZoneContentState;

use super::chain::{PAGE, PAGES, chain, restored};
use super::*;

/// Environment variable: write a sample of the current version if there is none yet.
const WRITE_SAMPLES: &str = "WRITE_STATE_SAMPLES";

/// One snapshot of the chain.
struct Member {
    name: &'static str,
    /// The pages in its memory file.
    pages: &'static [u64],
    /// Pages of RAM after its restore, with their values.
    restored: &'static [(usize, u64)],
}

const CHAIN: [Member; 2] = [
    Member {
        name: "first",
        pages: &[0, 1, 511, 512, 2047],
        restored: &[(1, 2), (512, 513), (600, 0)],
    },
    Member {
        name: "second",
        pages: &[1, 600],
        restored: &[(1, 70), (512, 0), (600, 71)],
    },
];

fn samples(ordinal: u32) -> PathBuf {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/snapshot/tests/samples");
    samples.join(ordinal.to_string())
}

/// The content of a page in the file of the snapshot.
fn value(name: &str, page: u64) -> u64 {
    match (name, page) {
        ("second", 1) => 70,
        ("second", _) => 71,
        _ => page + 1,
    }
}

/// A snapshot with this `state.json`.
fn folder_of_sample(folder: &Path, member: &Member, state: &str) {
    fs::create_dir(folder).unwrap();
    fs::write(folder.join("state.json"), state).unwrap();
    let config = serde_json::to_string(&config()).unwrap();
    fs::write(folder.join("config.json"), config).unwrap();
    let memory = File::create_new(folder.join("memory-0")).unwrap();
    memory.set_len(PAGES * PAGE).unwrap();
    for page in member.pages {
        let bytes = value(member.name, *page).to_le_bytes();
        memory.write_all_at(&bytes, page * PAGE).unwrap();
    }
}

/// Whether this version would write the same.
fn is_current(state: &str) -> bool {
    let mut lines = state.lines();
    let saved: Saved = serde_json::from_str(lines.next().unwrap()).unwrap();
    let table = lines.next().unwrap();
    let read: ZoneContentState = serde_json::from_str(table).unwrap();
    Saved::of(&saved.read::<SnapshotState>().unwrap()) == saved
        && serde_json::to_string(&read).unwrap() == table
}

#[test]
fn committed_samples_of_snapshots_are_restored() {
    let mut ordinal = 1;
    let mut current = 0;
    while samples(ordinal).is_dir() {
        let root = tempfile::tempdir().unwrap();
        current = 0;
        for member in &CHAIN {
            let name = member.name;
            // The oldest version had no chains.
            let Ok(state) = fs::read_to_string(samples(ordinal).join(format!("{name}.json")))
            else {
                continue;
            };
            let folder = root.path().join(name);
            folder_of_sample(&folder, member, &state);
            let values = restored(&folder, Filling::Before).unwrap();
            for (page, value) in member.restored {
                assert_eq!(values[*page], *value, "{ordinal}, {name}: page {page}");
            }
            current += usize::from(is_current(&state));
        }
        ordinal += 1;
    }
    if current == CHAIN.len() {
        return;
    }
    assert!(
        std::env::var_os(WRITE_SAMPLES).is_some(),
        "the newest sample differs from what is written today: give `snapshot` another version, then add a sample \
         with {WRITE_SAMPLES}=1"
    );
    let (machine, _) = chain().unwrap();
    fs::create_dir(samples(ordinal)).unwrap();
    for Member { name, .. } in &CHAIN {
        let state = machine.path(name).join("state.json");
        fs::copy(state, samples(ordinal).join(format!("{name}.json"))).unwrap();
    }
}
