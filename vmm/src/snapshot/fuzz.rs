//! Entry point of the fuzz target `snapshot`, and of an ordinary test with random bytes: a chain of two snapshots whose
//! files have been changed, and a single snapshot, which is also restored by copy-on-write.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use api::VmConfig;
use machine::memory::{ChunkState, GuestMemory, ZoneContentState};
use machine::signals::VmSignals;
use serde_json::{Value, json};
use state::{Bytes, Saved};
use vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace};

use super::chain::folders;
use super::state_file::checksum_line;
use super::{Filling, RestoreContext, Snapshot, merge};

const RAM_BYTES: u64 = 4 << 20;
const CHUNK_BYTES: u64 = 2 << 20;
const PAGE_BYTES: usize = 4096;

/// The input, and zeros behind it.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }
}

/// Restores and merges the chain that `bytes` describe, in `folder`, which must be empty. Returns whether it was accepted.
///
/// # Panics
/// A chain is merged to other RAM than it is restored to, or a rejected one leaves files.
#[must_use]
pub fn restore(folder: &Path, bytes: &[u8]) -> bool {
    let mut input = Input(bytes);
    let choice = input.byte();
    let last = folder.join("last");
    let (id, base) = match choice >> 4 {
        // Another snapshot than the one that the last is based on.
        1 => ("c", None),
        // A chain without an end.
        2 => ("a", Some("first")),
        3 => ("a", Some("last")),
        _ => ("a", None),
    };
    write(&folder.join("first"), id, base, table(&mut input, false));
    match choice % 5 {
        0 => write(&last, "b", Some("first"), table(&mut input, true)),
        // A checksum that matches, and any line.
        1 => write(&last, "b", Some("first"), input.0.to_vec()),
        // Any file.
        2 => {
            write(&last, "b", Some("first"), table(&mut input, true));
            fs::write(last.join("state.json"), input.0).expect("a file");
        }
        3 => write(&last, "b", None, table(&mut input, false)),
        // Any name of a base.
        _ => {
            let name = String::from_utf8_lossy(input.0).into_owned();
            write(&last, "b", Some(&name), table(&mut Input(&[]), true));
        }
    }
    let merged = folder.join("merged");
    fs::create_dir(&merged).expect("a folder");
    let restored = load(&last, Filling::default());
    // Copy-on-write also rejects data that is not in the table.
    if let Some(ram) = load(&last, Filling::CopyOnWrite) {
        assert!(restored.as_ref() == Some(&ram), "shows other RAM");
    }
    let length = folders(&last, &|_| Ok(())).map(|it| it.len());
    let expected = if choice % 5 == 3 { 1 } else { 2 };
    assert!(restored.is_none() || length.is_ok_and(|it| it == expected));
    let merges = merge(&last, &merged, &|_| Ok(())).is_ok();
    match (&restored, merges) {
        (Some(ram), true) => assert!(
            load(&merged, Filling::default()).as_ref() == Some(ram),
            "merged to other RAM"
        ),
        // The tables may be those of another machine, which only a restore finds out.
        (None, true) => {}
        (Some(_), false) => panic!("a good chain cannot be merged"),
        (None, false) => {
            let left = merged.read_dir().expect("a folder").count();
            assert_eq!(left, 0, "files of a rejected chain");
        }
    }
    restored.is_some()
}

fn load(folder: &Path, filling: Filling) -> Option<Vec<u8>> {
    let context = RestoreContext {
        events: Arc::new(|_| ()),
        signals: Arc::new(VmSignals::new().expect("descriptors")),
        thread_start: Arc::new(|_| ()),
    };
    let mut snapshot = Snapshot::open(folder, &|_| Ok(())).ok()?;
    snapshot.filling = filling;
    let memory = snapshot.new_memory(&snapshot.config).ok()?;
    snapshot.fill(&memory, &snapshot.config, &context).ok()?;
    let mut ram = vec![0; RAM_BYTES as usize];
    memory
        .ram()
        .memory()
        .read_slice(&mut ram, GuestAddress(0))
        .expect("RAM");
    Some(ram)
}

fn config() -> VmConfig {
    let mut config = VmConfig::default();
    config.memory.size = RAM_BYTES;
    config
}

/// Pages of which each has the same bytes, so that their checksums are known; some are wrong.
fn table(input: &mut Input<'_>, differs: bool) -> Vec<u8> {
    let mut chunks = Vec::new();
    for number in 0..u64::from(input.byte() % 4) {
        let mut pages = vec![0; 64];
        let mut zeros = vec![0; 64];
        for _ in 0..input.byte() % 8 {
            let at = usize::from(input.byte()) % 64;
            pages[at] = input.byte();
            zeros[at] = input.byte() & !pages[at];
        }
        let odd = input.byte();
        let offset = match odd {
            255 => u64::MAX,
            254 => number * CHUNK_BYTES + 4096,
            _ => number * CHUNK_BYTES,
        };
        match odd {
            253 => pages.truncate(63),
            252 => zeros[0] = 255,
            _ => {}
        }
        let damage = u32::from(odd == 251);
        let sum = |count: u32| {
            let mut crc = crc32fast::Hasher::new();
            (0..count).for_each(|_| crc.update(&[7; PAGE_BYTES]));
            crc.finalize() ^ damage
        };
        let counts = |byte: &u8| [byte & 15, byte >> 4].map(u8::count_ones);
        let counts: Vec<u32> = pages.iter().flat_map(counts).collect();
        // Earlier versions have one checksum.
        let is_early = odd % 4 == 3;
        let pieces = counts.iter().filter(|count| !is_early && **count > 0);
        let sums = pieces.flat_map(|count| sum(*count).to_le_bytes()).collect();
        let has_zeros = differs && zeros.iter().any(|byte| *byte != 0);
        chunks.push(ChunkState {
            offset,
            pages: Bytes(pages),
            zeros: Bytes(if has_zeros { zeros } else { Vec::new() }),
            sums: Bytes(sums),
            crc32: is_early.then(|| sum(counts.iter().sum())),
        });
    }
    let table = ZoneContentState {
        bytes: RAM_BYTES,
        chunks,
    };
    serde_json::to_vec(&table).expect("plain data is always JSON")
}

/// Writes a snapshot whose second line is `table`. Each page of its memory file could be in the table.
fn write(folder: &Path, id: &str, base: Option<&str>, table: Vec<u8>) {
    fs::create_dir(folder).expect("a folder");
    let text = serde_json::to_vec(&config()).expect("plain data is always JSON");
    fs::write(folder.join("config.json"), text).expect("a file");
    fs::write(folder.join("memory-0"), vec![7; RAM_BYTES as usize]).expect("a file");
    let mut text = state(id, base).to_string().into_bytes();
    text.push(b'\n');
    text.extend(table);
    text.push(b'\n');
    text.extend(checksum_line(crc32fast::hash(&text)).into_bytes());
    fs::write(folder.join("state.json"), text).expect("a file");
}

fn state(id: &str, base: Option<&str>) -> Value {
    let part = json!({"version": 1});
    let memory = GuestMemory::new(&config().memory, 46).expect("RAM");
    let memory = Saved::of(&memory.state());
    let base = base.map(|folder| json!({"id": "a", "folder": folder}));
    json!({
        "version": 4, "thresholds": {}, "reporting_paused": false, "memory_size_after_reboot": null,
        "link": {"id": id, "base": base},
        "pc": {
            "version": 1, "memory": memory, "vcpus": part, "ioapic": part, "pci_bus": part, "pci_hotplug": part,
            "devices": {}, "pvpanic": null, "serial": null, "cmos": part, "pm_timer": part, "ged": part,
        },
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_chain_is_restored_as_it_is_merged_or_rejected(
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let folder = tempfile::tempdir().expect("a folder");
            let _accepted = restore(folder.path(), &bytes);
        }
    }

    #[test]
    fn chain_of_the_smallest_input_is_accepted() {
        // Two snapshots, and a single one.
        for choice in [0, 3] {
            let folder = tempfile::tempdir().expect("a folder");
            assert!(restore(folder.path(), &[choice]));
        }
    }

    #[test]
    fn chain_with_another_base_or_without_an_end_is_rejected() {
        for choice in [0x14, 0x23, 0x32] {
            let folder = tempfile::tempdir().expect("a folder");
            assert!(!restore(folder.path(), &[choice]), "{choice:#x}");
        }
    }
}
