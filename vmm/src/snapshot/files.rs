//! The files of a snapshot.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use api::VmConfig;
use machine::memory::{GuestMemory, ZoneContentState};
use machine::open_regular_file;
use machine::pc::PcState;
use serde::de::DeserializeOwned;
use state::Saved;

use super::{SnapshotError, SnapshotState};

const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const STATE_PARTIAL: &str = "state.json.partial";

/// As much as a request may have.
const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// 2 TiB of RAM need 160 MiB of tables.
const STATE_BYTES_MAX: u64 = 512 << 20;

/// The folder that `url` names.
///
/// # Errors
/// Another form of URL, or no folder there.
pub fn folder_of(url: &str) -> Result<PathBuf, SnapshotError> {
    let path = url.strip_prefix("file://").map(PathBuf::from);
    let Some(path) = path.filter(|path| path.is_absolute()) else {
        let url = url.to_owned();
        return Err(SnapshotError::Url { url });
    };
    match path.is_dir() {
        true => Ok(path),
        false => Err(SnapshotError::NotAFolder { path }),
    }
}

fn memory_name(zone: usize) -> String {
    format!("memory-{zone}")
}

/// Files that are removed again unless the snapshot becomes complete.
struct NewFiles<'a> {
    folder: &'a Path,
    paths: Vec<PathBuf>,
}

impl NewFiles<'_> {
    fn create(&mut self, name: &str) -> Result<(File, PathBuf), SnapshotError> {
        let path = self.folder.join(name);
        let created = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        match created {
            Ok(file) => {
                self.paths.push(path.clone());
                Ok((file, path))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(SnapshotError::Exists { path })
            }
            Err(error) => Err(SnapshotError::file("create", &path)(error)),
        }
    }

    fn write(&mut self, name: &str, text: &str) -> Result<PathBuf, SnapshotError> {
        let (mut file, path) = self.create(name)?;
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(SnapshotError::file("write", &path))?;
        Ok(path)
    }
}

impl Drop for NewFiles<'_> {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = fs::remove_file(path) {
                log::warn!("Cannot remove {}: {error}", path.display());
            }
        }
    }
}

/// Writes the snapshot of a paused machine into `folder`. `state` lacks the tables of memory, which this adds.
///
/// # Errors
/// The folder has such files, the VM cannot be saved, or writing fails; the folder is as before then.
pub fn write(
    folder: &Path,
    config: &VmConfig,
    mut state: SnapshotState,
    memory: &GuestMemory,
) -> Result<(), SnapshotError> {
    require_content_is_ours(config)?;
    let path = folder.join(STATE);
    if path.exists() {
        return Err(SnapshotError::Exists { path });
    }
    let mut files = NewFiles {
        folder,
        paths: Vec::new(),
    };
    files.write(CONFIG, &text_of(config))?;
    for (at, zone) in memory.zones().iter().enumerate() {
        let (file, _) = files.create(&memory_name(at))?;
        let table = memory.save_zone(zone, &file);
        state.memory.push(table.map_err(SnapshotError::Content)?);
    }
    let mut text = text_of(&Saved::of(&state));
    text += &checksum_of(&text);
    let partial = files.write(STATE_PARTIAL, &text)?;
    fs::rename(&partial, &path).map_err(SnapshotError::file("rename", &partial))?;
    // Complete: nothing is removed any more.
    files.paths.clear();
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(SnapshotError::file("sync", folder))
}

/// Refuses state that is kept outside the snapshot. At a restore, a configuration that was edited is refused as well: RAM
/// would be loaded over a file of the host.
fn require_content_is_ours(config: &VmConfig) -> Result<(), SnapshotError> {
    let mut zones = config.memory.zones.iter().flatten();
    if let Some(zone) = zones.find(|zone| zone.file.is_some()) {
        let zone = zone.id.clone();
        return Err(SnapshotError::ZoneInFile { zone });
    }
    if let Some(fs) = config.fs.iter().flatten().next() {
        let tag = fs.tag.clone();
        return Err(SnapshotError::SharedFolder { tag });
    }
    Ok(())
}

/// Opens a file of a snapshot for reading and returns its size with it.
fn open_file(path: &Path) -> Result<(File, u64), SnapshotError> {
    let opened = open_regular_file(path).map_err(SnapshotError::file("open", path))?;
    opened.ok_or_else(|| SnapshotError::Damaged {
        path: path.to_owned(),
        reason: "it is not a file",
    })
}

fn text_of<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data is always JSON")
}

/// What follows the text in its file: the end of its line, and a line with its checksum.
fn checksum_of(text: &str) -> String {
    let crc = crc32fast::hash(text.as_bytes());
    format!("\n{{\"crc32\":\"{crc:08x}\"}}\n")
}

/// A snapshot that was opened and checked. Its memory is checked while it is loaded.
#[derive(Debug)]
pub struct Snapshot {
    /// The saved configuration.
    pub config: VmConfig,
    /// The machine.
    pub pc: PcState,
    /// The rest of the state.
    pub state: SnapshotState,
    memory: Vec<File>,
}

impl Snapshot {
    /// Opens the snapshot in `folder`.
    ///
    /// # Errors
    /// A file is missing, damaged, or of another version.
    pub fn open(folder: &Path) -> Result<Self, SnapshotError> {
        let path = folder.join(STATE);
        let text = read(&path, STATE_BYTES_MAX)?;
        let damaged = |reason| SnapshotError::Damaged {
            path: path.clone(),
            reason,
        };
        let (body, checksum) = text.split_at(text.find('\n').unwrap_or(text.len()));
        if checksum_of(body) != checksum {
            return Err(damaged("its checksum does not match"));
        }
        let saved: Saved = json(&path, body)?;
        let state: SnapshotState = saved.read().map_err(SnapshotError::State)?;
        let pc: PcState = state.pc.read().map_err(SnapshotError::State)?;
        let path = folder.join(CONFIG);
        let config = json(&path, &read(&path, CONFIG_BYTES_MAX)?)?;
        require_content_is_ours(&config)?;
        let open = |(at, table): (usize, &ZoneContentState)| {
            let path = folder.join(memory_name(at));
            let (file, bytes) = open_file(&path)?;
            let reason = "its size is not that of its zone";
            match bytes == table.bytes {
                true => Ok(file),
                false => Err(SnapshotError::Damaged { path, reason }),
            }
        };
        let memory = state.memory.iter().enumerate().map(open);
        let memory = memory.collect::<Result<_, _>>()?;
        Ok(Self {
            config,
            pc,
            state,
            memory,
        })
    }

    /// Loads the content of RAM, which nobody has touched yet.
    ///
    /// # Errors
    /// RAM has other zones than the saved one, or a memory file is damaged.
    pub fn load(&self, memory: &GuestMemory, thp: bool) -> Result<(), SnapshotError> {
        let map = self.pc.memory.read();
        let fits = map.and_then(|map| memory.check_state(&map));
        fits.map_err(SnapshotError::State)?;
        let (zones, tables) = (memory.zones(), &self.state.memory);
        state::require(
            zones.len() == tables.len(),
            state::parts::SNAPSHOT,
            "memory",
            || {
                format!(
                    "has {} zones, the machine has {}",
                    tables.len(),
                    zones.len()
                )
            },
        )
        .map_err(SnapshotError::State)?;
        for ((zone, file), table) in zones.iter().zip(&self.memory).zip(tables) {
            let loaded = memory.load_zone(zone, file, table, thp);
            loaded.map_err(SnapshotError::Content)?;
        }
        Ok(())
    }
}

fn read(path: &Path, bytes_max: u64) -> Result<String, SnapshotError> {
    let mut text = String::new();
    let (file, _) = open_file(path)?;
    let read = file.take(bytes_max + 1).read_to_string(&mut text);
    let damaged = |reason| SnapshotError::Damaged {
        path: path.to_owned(),
        reason,
    };
    match read {
        Ok(bytes) if bytes as u64 > bytes_max => Err(damaged("it is too long")),
        Ok(_) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(damaged("it is not text")),
        Err(error) => Err(SnapshotError::file("read", path)(error)),
    }
}

fn json<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, SnapshotError> {
    serde_json::from_str(text).map_err(|source| SnapshotError::Json {
        path: path.to_owned(),
        source,
    })
}
