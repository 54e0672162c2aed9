//! Creates, checks and removes the files of a VM in standby.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use rustix::fs::{FlockOperation, flock};
use rustix::process::geteuid;
use serde::Deserialize;

use super::StandbyError;
use super::plain::open_plain;
use super::record::{Record, VERSION, check_name};
use crate::model::Bytes;
use crate::sample::VMS_MAX;
use crate::state_file::replace;

const RECORD: &str = "record.json";
const LOCK: &str = "lock";
const SNAPSHOT: &str = "snapshot";
/// A folder that is not complete yet.
const NEW: &str = ".new-";
/// A folder that is being removed.
const REMOVED: &str = ".removed-";
/// The user of the VMM must be able to traverse to the snapshot, and no other user may list the folders.
const FOLDER_MODE: u32 = 0o711;
const SNAPSHOT_MODE: u32 = 0o700;
/// The bits that let the group and others write.
const OTHERS_WRITE: u32 = 0o022;
/// A record has some hundred bytes and the paths of the VM's images.
const RECORD_BYTES_MAX: u64 = 1 << 20;
/// A VM has one file of memory per zone, and few others.
const FILES_MAX: usize = 1024;
/// Both are part of a complete snapshot, and the second is written last.
const REQUIRED: [&str; 2] = ["config.json", "state.json"];

/// The folder of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandbyFolder {
    path: PathBuf,
}

impl StandbyFolder {
    /// Creates the folder of a VM below `dir`, with its record and an empty folder for the snapshot.
    ///
    /// # Errors
    /// The name is unsuitable, the folder exists, or the system reports an error. Nothing is left then.
    pub fn create(dir: &Path, record: &Record) -> Result<Self, StandbyError> {
        check_name(&record.vm)?;
        let path = dir.join(&record.vm);
        if fs::symlink_metadata(&path).is_ok() {
            return Err(StandbyError::Exists { path });
        }
        make_folders(dir)?;
        let new = dir.join(format!("{NEW}{}", record.vm));
        // An agent that was killed may have left it.
        remove_all(&new)?;
        let made = Self { path: new.clone() };
        let created = made.fill(record).and_then(|()| {
            fs::rename(&new, &path).map_err(StandbyError::system(&path))?;
            sync_folder(dir)
        });
        if let Err(error) = created {
            for left in [new, path] {
                if let Err(error) = remove_all(&left) {
                    log::warn!("{}", api::error_line(&error));
                }
            }
            return Err(error);
        }
        Ok(Self { path })
    }

    fn fill(&self, record: &Record) -> Result<(), StandbyError> {
        make_folder(&self.path, FOLDER_MODE)?;
        let snapshot = self.snapshot();
        make_folder(&snapshot, SNAPSHOT_MODE)?;
        if record.uid != geteuid().as_raw() {
            chown(&snapshot, Some(record.uid), Some(record.gid))
                .map_err(StandbyError::system(&snapshot))?;
        }
        let lock = self.lock();
        let mut options = OpenOptions::new();
        let opened = options.write(true).create_new(true).mode(0o600).open(&lock);
        opened.map_err(StandbyError::system(&lock))?;
        self.write(record)
    }

    /// Opens the folder of a VM below `dir`.
    ///
    /// # Errors
    /// It is not a folder, or its record cannot be read.
    pub fn open(dir: &Path, name: &str) -> Result<(Self, Record), StandbyError> {
        check_name(name)?;
        let folder = Self::at(dir, name);
        require_folder(&folder.path)?;
        let path = folder.path.join(RECORD);
        let record = read_record(&path)?;
        if record.vm != name {
            let found = record.vm;
            return Err(StandbyError::OtherVm { path, found });
        }
        Ok((folder, record))
    }

    /// The folder of a VM, whatever is in it.
    pub(crate) fn at(dir: &Path, name: &str) -> Self {
        let path = dir.join(name);
        Self { path }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of the snapshot.
    pub fn snapshot(&self) -> PathBuf {
        self.path.join(SNAPSHOT)
    }

    /// Who wakes the VM holds a lock (`flock`) on this file, and so does the VMM.
    pub fn lock(&self) -> PathBuf {
        self.path.join(LOCK)
    }

    /// Replaces the record.
    ///
    /// # Errors
    /// It cannot be written. The old one is unchanged then.
    pub fn write(&self, record: &Record) -> Result<(), StandbyError> {
        let path = self.path.join(RECORD);
        serde_json::to_vec_pretty(record)
            .map_err(io::Error::from)
            .and_then(|bytes| replace(&path, &bytes))
            .map_err(StandbyError::system(path))
    }

    /// Checks that the snapshot is complete and has no links. Returns the disk space that it takes.
    ///
    /// # Errors
    /// It is not complete, or is not a folder of regular files.
    pub fn check(&self) -> Result<Bytes, StandbyError> {
        let files = snapshot_files(&self.snapshot())?;
        let blocks = |path: &PathBuf| fs::symlink_metadata(path).map_or(0, |file| file.blocks());
        Ok(files.iter().map(|path| Bytes(blocks(path) * 512)).sum())
    }

    /// Whether a process holds the lock.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn is_locked(&self) -> Result<bool, StandbyError> {
        let path = self.lock();
        let file = open_plain(&path)?;
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            // It is released at the end of this function.
            Ok(()) => Ok(false),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
            Err(errno) => Err(StandbyError::system(path)(errno.into())),
        }
    }

    /// Whether a process has the lock's file open, as the VMM that `ch-fleet wake` starts.
    pub(crate) fn is_open_in(&self, proc: &Path, pid: i32) -> bool {
        let Ok(lock) = fs::canonicalize(self.lock()) else {
            return false;
        };
        let descriptors = fs::read_dir(proc.join(pid.to_string()).join("fd"));
        let mut descriptors = descriptors.into_iter().flatten().flatten();
        // The files themselves are not touched: a process may have one whose file system does not respond.
        descriptors.any(|entry| fs::read_link(entry.path()).is_ok_and(|path| path == lock))
    }

    /// Removes the VM. Its name is free immediately; a large snapshot takes longer to remove.
    ///
    /// # Errors
    /// The folder cannot be renamed.
    pub fn remove(&self) -> Result<(), StandbyError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let name = self.path.file_name().unwrap_or_default().display();
        let (pid, number) = (process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let removed = dir.join(format!("{REMOVED}{pid}-{number}-{name}"));
        fs::rename(&self.path, &removed).map_err(StandbyError::system(&self.path))?;
        sync_folder(dir)?;
        remove_in_background(vec![removed]).map_err(StandbyError::system(&self.path))
    }
}

/// Creates the folder of all VMs if it does not exist.
///
/// # Errors
/// It cannot be created, or users other than root and the agent's could change records.
pub(crate) fn prepare(dir: &Path) -> Result<(), StandbyError> {
    make_folders(dir)?;
    let found = fs::metadata(dir).map_err(StandbyError::system(dir))?;
    let is_own = found.uid() == 0 || found.uid() == geteuid().as_raw();
    match is_own && found.mode() & OTHERS_WRITE == 0 {
        true => Ok(()),
        false => Err(StandbyError::Exposed {
            path: dir.to_owned(),
        }),
    }
}

/// The names of all folders below `dir`; none if it does not exist.
///
/// # Errors
/// It cannot be read.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>, StandbyError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(StandbyError::system(dir))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(StandbyError::system(dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if check_name(&name).is_ok() && names.len() < VMS_MAX {
            names.push(name);
        } else if !name.starts_with('.') {
            log::warn!("{} is ignored", entry.path().display());
        }
    }
    Ok(names)
}

/// Removes what a killed agent has left unfinished below `dir`.
///
/// # Errors
/// It cannot be read.
pub(crate) fn clean(dir: &Path) -> Result<(), StandbyError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(StandbyError::system(dir))?,
    };
    let mut left = Vec::new();
    for entry in entries {
        let entry = entry.map_err(StandbyError::system(dir))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(NEW) || name.starts_with(REMOVED) {
            left.push(entry.path());
        }
    }
    remove_in_background(left).map_err(StandbyError::system(dir))
}

/// Freeing the blocks of a large file takes long. If the process ends before, [`clean`] continues.
fn remove_in_background(paths: Vec<PathBuf>) -> io::Result<()> {
    let thread = thread::Builder::new().name("standby-removal".to_owned());
    let spawned = thread.spawn(move || {
        for error in paths.iter().filter_map(|path| remove_all(path).err()) {
            log::error!("{}", api::error_line(&error));
        }
    });
    spawned.map(drop)
}

/// Syncs a complete snapshot to disk. A VMM that has done this itself makes it cheap.
///
/// # Errors
/// It is not complete, or cannot be synced.
pub(crate) fn sync_snapshot(folder: &Path) -> Result<(), StandbyError> {
    for path in snapshot_files(folder)? {
        let file = open_plain(&path)?;
        file.sync_all().map_err(StandbyError::system(&path))?;
    }
    sync_folder(folder)
}

/// The files of a complete snapshot. They belong to the user of the VMM, so nothing is followed there.
fn snapshot_files(folder: &Path) -> Result<Vec<PathBuf>, StandbyError> {
    require_folder(folder)?;
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(StandbyError::system(folder))? {
        let path = entry.map_err(StandbyError::system(folder))?.path();
        let found = fs::symlink_metadata(&path).map_err(StandbyError::system(&path))?;
        if !found.is_file() {
            return Err(StandbyError::NotAFile { path });
        }
        if files.len() == FILES_MAX {
            let (path, max) = (folder.to_owned(), FILES_MAX);
            return Err(StandbyError::TooMany { path, max });
        }
        files.push(path);
    }
    let missing = REQUIRED.iter().map(|name| folder.join(name));
    match missing.into_iter().find(|path| !files.contains(path)) {
        Some(path) => Err(StandbyError::Incomplete { path }),
        None => Ok(files),
    }
}

fn read_record(path: &Path) -> Result<Record, StandbyError> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let form = |source| StandbyError::Form {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let limited = open_plain(path)?.take(RECORD_BYTES_MAX + 1);
    let length = { limited }.read_to_string(&mut text);
    if length.map_err(StandbyError::system(path))? as u64 > RECORD_BYTES_MAX {
        let (path, max) = (path.to_owned(), RECORD_BYTES_MAX);
        return Err(StandbyError::Long { path, max });
    }
    // Another version may have other fields.
    let Versioned { version } = serde_json::from_str(&text).map_err(form)?;
    if version != VERSION {
        let (path, found, only) = (path.to_owned(), version, VERSION);
        return Err(StandbyError::Version { path, found, only });
    }
    serde_json::from_str(&text).map_err(form)
}

fn require_folder(path: &Path) -> Result<(), StandbyError> {
    let found = fs::symlink_metadata(path).map_err(StandbyError::system(path))?;
    match found.is_dir() {
        true => Ok(()),
        false => Err(StandbyError::NotAFolder {
            path: path.to_owned(),
        }),
    }
}

fn make_folder(path: &Path, mode: u32) -> Result<(), StandbyError> {
    let made = DirBuilder::new().mode(mode).create(path);
    made.map_err(StandbyError::system(path))
}

fn make_folders(path: &Path) -> Result<(), StandbyError> {
    let made = DirBuilder::new()
        .recursive(true)
        .mode(FOLDER_MODE)
        .create(path);
    made.map_err(StandbyError::system(path))
}

fn sync_folder(path: &Path) -> Result<(), StandbyError> {
    let synced = File::open(path).and_then(|folder| folder.sync_all());
    synced.map_err(StandbyError::system(path))
}

fn remove_all(path: &Path) -> Result<(), StandbyError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(StandbyError::system(path)(error))
        }
        _ => Ok(()),
    }
}
