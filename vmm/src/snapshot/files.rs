//! Writes, opens and checks the files of a snapshot.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::VmConfig;
use machine::memory::on_demand::{Background, Content, Faults, OnDemand, OnDemandError};
use machine::memory::{
    ContentFiles, DEFAULT_ZONE_ID, GuestMemory, RestoreError, SavedZone, WrittenPages,
    ZoneContentState, ZoneFile, ZoneFiles,
};
use machine::pc::{BarePc, PcState};
use state::Saved;
use virtio_devices::Unpoisoned;

use super::adapt::set_prefault;
use super::chain::{self, Admit};
use super::on_demand::{Filling, Received, Record, RestoreContext};
use super::pass::write_pass;
use super::saveable::require_content_is_ours;
use super::saved_files::{CONFIG, STATE, SavedFiles, memory_name};
use super::state_file::checksum_line;
use super::touched::read_order;
use super::{Progress, SnapshotError, SnapshotState};

const STATE_PARTIAL: &str = "state.json.partial";

/// The folder that `url` names.
///
/// # Errors
/// The URL is unsupported, or there is no such folder.
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

/// Files that are removed unless the snapshot is completed.
struct NewFiles<'a> {
    folder: &'a Path,
    paths: Vec<PathBuf>,
}

impl NewFiles<'_> {
    fn create(&mut self, name: &str) -> Result<(File, PathBuf), SnapshotError> {
        let path = self.folder.join(name);
        let created = File::options()
            // Checksums of pages that were written in several passes are taken from the file.
            .read(true)
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

    fn write(&mut self, name: &str, text: &str) -> Result<(), SnapshotError> {
        let (mut file, path) = self.create(name)?;
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(SnapshotError::file("write", &path))
    }

    /// Gives the file that was written last its final name.
    fn rename_last(&mut self, name: &str) -> Result<(), SnapshotError> {
        let to = self.folder.join(name);
        if let Some(last) = self.paths.last_mut() {
            fs::rename(&*last, &to).map_err(SnapshotError::file("rename", last))?;
            *last = to;
        }
        Ok(())
    }

    /// Syncs the folder. The files are complete, so none is removed.
    fn keep(mut self) -> Result<(), SnapshotError> {
        File::open(self.folder)
            .and_then(|folder| folder.sync_all())
            .map_err(SnapshotError::file("sync", self.folder))?;
        self.paths.clear();
        Ok(())
    }
}

impl Drop for NewFiles<'_> {
    fn drop(&mut self) {
        // Remove the last file first: without it, the others are not a snapshot.
        for path in self.paths.iter().rev() {
            if let Err(error) = fs::remove_file(path) {
                log::warn!("Cannot remove {}: {error}", path.display());
            }
        }
    }
}

/// A snapshot that is being written. It is removed unless it is finished.
pub(super) struct NewSnapshot<'a> {
    files: NewFiles<'a>,
    config: (File, PathBuf),
}

impl<'a> NewSnapshot<'a> {
    /// Begins a snapshot in `folder`.
    ///
    /// # Errors
    /// The folder has such files, or they cannot be created.
    pub(super) fn create(folder: &'a Path) -> Result<Self, SnapshotError> {
        let path = folder.join(STATE);
        if path.exists() {
            return Err(SnapshotError::Exists { path });
        }
        let mut files = NewFiles {
            folder,
            paths: Vec::new(),
        };
        let config = files.create(CONFIG)?;
        Ok(Self { files, config })
    }

    /// Creates the file for the content of a zone.
    ///
    /// # Errors
    /// The folder has such a file, or it cannot be created.
    pub(super) fn memory_file(&mut self, zone: usize) -> Result<File, SnapshotError> {
        self.files.create(&memory_name(zone)).map(|(file, _)| file)
    }

    /// The same for all zones.
    ///
    /// # Errors
    /// As for one.
    pub(super) fn memory_files(
        &mut self,
        memory: &GuestMemory,
    ) -> Result<Vec<File>, SnapshotError> {
        let zones = 0..memory.zones().len();
        zones.map(|at| self.memory_file(at)).collect()
    }

    /// Writes the rest and syncs the folder. `tables` describe the memory files, which are complete and synced.
    ///
    /// # Errors
    /// A file cannot be written.
    pub(super) fn finish(
        mut self,
        config: &VmConfig,
        state: &SnapshotState,
        tables: &[ZoneContentState],
    ) -> Result<(), SnapshotError> {
        let (mut file, path) = self.config;
        file.write_all(text_of(config).as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(SnapshotError::file("write", &path))?;
        let mut text = Saved::of(state).into_text() + "\n";
        for table in tables {
            text += &text_of(table);
            text += "\n";
        }
        text += &checksum_line(crc32fast::hash(text.as_bytes()));
        self.files.write(STATE_PARTIAL, &text)?;
        self.files.rename_last(STATE)?;
        self.files.keep()
    }
}

/// Writes the snapshot of a paused machine into `folder`: all of RAM, or the pages in `written`. Returns the number of
/// bytes of RAM in it.
///
/// # Errors
/// The folder has such files, the VM cannot be saved, or writing fails. In these cases the folder is unchanged.
pub fn write(
    folder: &Path,
    config: &VmConfig,
    state: &SnapshotState,
    memory: &GuestMemory,
    written: Option<&WrittenPages>,
    progress: &Progress,
) -> Result<u64, SnapshotError> {
    require_content_is_ours(config)?;
    let mut new = NewSnapshot::create(folder)?;
    let files = new.memory_files(memory)?;
    let content = ContentFiles::new(memory, files, written.is_some());
    let mut content = content.map_err(SnapshotError::Content)?;
    write_pass(memory, written, &mut content, progress, || false)?;
    let data_bytes = content.data_bytes();
    let tables = content.finish().map_err(SnapshotError::Content)?;
    new.finish(config, state, &tables)?;
    Ok(data_bytes)
}

fn text_of<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data is always JSON")
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
    /// When RAM is filled.
    pub filling: Filling,
    /// Its folder; none if a migration has brought it.
    folder: Option<PathBuf>,
    /// The memory files of each zone.
    pub(super) memory: Vec<SavedZone>,
}

impl Snapshot {
    /// Opens the snapshot in `folder`, and those that it is based on if `admit` allows their folders.
    ///
    /// # Errors
    /// A file is missing, damaged, or of another version, or a base is not the right one.
    pub fn open(folder: &Path, admit: &Admit<'_>) -> Result<Self, SnapshotError> {
        let mut newest = None;
        let mut zones: Vec<Vec<ZoneFile>> = Vec::new();
        chain::visit(folder, admit, |saved| {
            let name = saved.folder.file_name().unwrap_or_default();
            let name = name.to_string_lossy().into_owned();
            let SavedFiles {
                folder,
                config,
                pc,
                state,
                memory,
            } = saved;
            let is_alone = newest.is_none() && !state.is_difference();
            if newest.is_none() {
                zones.resize_with(memory.len(), Vec::new);
                newest = Some((config, pc, state));
            }
            if zones.len() != memory.len() {
                return Err(SnapshotError::Chain {
                    path: folder,
                    reason: "it has another number of memory zones",
                });
            }
            for (files, (file, table)) in zones.iter_mut().zip(memory) {
                let snapshot = (!is_alone).then(|| name.clone());
                files.push(ZoneFile {
                    snapshot,
                    file,
                    table,
                });
            }
            Ok(())
        })?;
        let (config, pc, state) = newest.expect("a chain has at least one snapshot");
        let oldest_first = |mut files: Vec<ZoneFile>| {
            files.reverse();
            SavedZone::new(files)
        };
        Ok(Self {
            config,
            pc,
            state,
            filling: Filling::default(),
            folder: Some(folder.to_owned()),
            memory: zones.into_iter().map(oldest_first).collect(),
        })
    }

    /// A machine whose RAM, with its content, is `memory`.
    ///
    /// # Errors
    /// The state is of an unsupported version.
    pub fn received(
        config: VmConfig,
        state: SnapshotState,
        received: Received,
    ) -> Result<Self, SnapshotError> {
        Ok(Self {
            config,
            pc: state.pc.read().map_err(SnapshotError::State)?,
            state,
            filling: Filling::Done(Box::new(received)),
            folder: None,
            memory: Vec::new(),
        })
    }

    /// The machine without devices that was created for this state, once.
    pub fn take_pc(&self) -> Option<BarePc> {
        match &self.filling {
            Filling::Done(received) => received.pc.lock().unpoisoned().take(),
            _ => None,
        }
    }

    /// True if the machine has moved here; false if it is a copy.
    pub fn is_moved(&self) -> bool {
        matches!(self.filling, Filling::Done(_))
    }

    /// The RAM of `config`, without content unless a migration has brought it.
    ///
    /// # Errors
    /// RAM cannot be created, or its zones differ from the saved ones.
    pub fn new_memory(&self, config: &VmConfig) -> Result<GuestMemory, SnapshotError> {
        let Filling::Done(received) = &self.filling else {
            return memory_of(config, &self.pc, ZoneFiles::New);
        };
        let memory = &received.memory;
        let map = self.pc.memory.read();
        map.and_then(|map| memory.check_state(&map))
            .map_err(SnapshotError::State)?;
        Ok(memory.clone())
    }

    /// Fills the new `memory` of `config` with the saved content, and reports the progress. If it is filled on demand,
    /// the caller must keep the result as long as RAM is in use.
    ///
    /// # Errors
    /// RAM cannot be filled in this way, or a memory file is damaged.
    pub fn fill(
        &self,
        memory: &GuestMemory,
        config: &VmConfig,
        context: &RestoreContext,
    ) -> Result<Option<OnDemand>, SnapshotError> {
        let thp = config.memory.thp;
        let progress = || Progress::of_restore(memory, Arc::clone(&context.events));
        match &self.filling {
            Filling::Done(received) => {
                let postponed = received.postponed.lock().unpoisoned().take();
                let Some((faults, content)) = postponed else {
                    return Ok(None);
                };
                let owner = context.owner(progress(), None);
                let at_once = Background::AtOnce;
                let on_demand = context.fill(memory, content, &faults, at_once, &[], owner)?;
                // Only now: the kernel leaves the gaps alone in which threads wait for pages.
                if thp {
                    memory.use_huge_pages();
                }
                Ok(Some(on_demand))
            }
            Filling::CopyOnWrite => {
                require_plain_zones(config)?;
                let progress = progress();
                memory
                    .show_files(&self.memory, thp, |bytes| progress.add(bytes))
                    .map_err(SnapshotError::CopyOnWrite)?;
                Ok(None)
            }
            Filling::OnDemand { faults, background } => self
                .on_demand(memory, faults, *background, progress(), context)
                .map(Some),
            Filling::Before => {
                let progress = progress();
                for (zone, saved) in memory.zones().iter().zip(&self.memory) {
                    let loaded = memory.load_zone(zone, saved, thp, |bytes| progress.add(bytes));
                    loaded.map_err(SnapshotError::Content)?;
                }
                if config.memory.prefault {
                    memory.populate().map_err(SnapshotError::Memory)?;
                }
                Ok(None)
            }
        }
    }

    fn on_demand(
        &self,
        memory: &GuestMemory,
        faults: &Faults,
        background: bool,
        progress: Progress,
        context: &RestoreContext,
    ) -> Result<OnDemand, SnapshotError> {
        let id = self.state.link.as_ref().map(|link| link.id.clone());
        let folder = self.folder.as_deref();
        let order = folder.and_then(|folder| read_order(folder, id.as_deref()));
        let first = order.unwrap_or_default();
        let record = folder.map(|folder| Record {
            folder: folder.to_owned(),
            id,
            known: first.clone(),
        });
        let owner = context.owner(progress, record);
        let files = self.memory.iter().map(SavedZone::try_clone);
        let files: Vec<_> = files
            .collect::<io::Result<_>>()
            .map_err(|error| SnapshotError::OnDemand(OnDemandError::Thread(error)))?;
        let content = Content::Files(files);
        let background = match background {
            true => Background::Later,
            false => Background::Never,
        };
        context.fill(memory, content, faults, background, &first, owner)
    }
}

/// Creates the RAM of `config` and `pc` from `files`, without content if they are new.
///
/// # Errors
/// RAM cannot be created, or its zones differ from those of the state.
pub fn memory_of(
    config: &VmConfig,
    pc: &PcState,
    files: ZoneFiles,
) -> Result<GuestMemory, SnapshotError> {
    let mut unpopulated = config.memory.clone();
    set_prefault(&mut unpopulated, false);
    let map = pc.memory.read().map_err(SnapshotError::State)?;
    let memory = GuestMemory::with_dimms(&unpopulated, config.cpus.max_phys_bits, &map, files);
    memory.map_err(|error| match error {
        RestoreError::Memory(error) => SnapshotError::Memory(error),
        RestoreError::State(error) => SnapshotError::State(error),
    })
}

/// Rejects settings of a mapping that its parts would lose when they are replaced.
fn require_plain_zones(config: &VmConfig) -> Result<(), SnapshotError> {
    let refused = |zone: &str, setting| {
        let zone = zone.to_owned();
        Err(SnapshotError::CopyOnWriteZone { zone, setting })
    };
    if config.memory.mergeable {
        return refused(DEFAULT_ZONE_ID, "mergeable=on");
    }
    if config.memory.hotplug_size.is_some_and(|bytes| bytes > 0) {
        return refused(DEFAULT_ZONE_ID, "hotplug_size");
    }
    for zone in config.memory.zones.iter().flatten() {
        if zone.mergeable {
            return refused(&zone.id, "mergeable=on");
        }
        if zone.host_numa_node.is_some() {
            return refused(&zone.id, "host_numa_node");
        }
        if zone.hotplug_size.is_some_and(|bytes| bytes > 0) {
            return refused(&zone.id, "hotplug_size");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_were_not_kept_are_removed_also_under_their_final_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut files = NewFiles {
            folder: folder.path(),
            paths: Vec::new(),
        };
        files.write(CONFIG, "{}").expect("written");
        files.write(STATE_PARTIAL, "{}").expect("written");
        files.rename_last(STATE).expect("renamed");
        assert!(folder.path().join(STATE).exists());
        // Simulates a folder that cannot be synced.
        drop(files);
        assert_eq!(folder.path().read_dir().expect("a folder").count(), 0);
    }
}
