//! The writable images of a VM in standby. If one changes, the saved memory is older than the disks.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::StandbyError;
use super::plain::open_plain;

/// As in the VMM.
const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// Bounds of the record: the VMM's user can change the configuration.
const IMAGES_MAX: usize = 128;
const PATH_BYTES_MAX: usize = 1024;

/// A writable image of a VM, as it was when its VMM had ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The file.
    pub path: PathBuf,
    /// Its inode.
    pub inode: u64,
    /// Its size, bytes.
    pub size: u64,
    /// When it was last modified: s and ns since the Unix epoch.
    pub modified: (i64, i64),
}

/// The relevant part of the configuration in a snapshot.
#[derive(Deserialize)]
struct Config {
    disks: Option<Vec<Disk>>,
    pmem: Option<Vec<Pmem>>,
}

#[derive(Deserialize)]
struct Disk {
    path: Option<PathBuf>,
    #[serde(default)]
    readonly: bool,
}

#[derive(Deserialize)]
struct Pmem {
    file: PathBuf,
    #[serde(default)]
    discard_writes: bool,
}

impl Image {
    /// A regular file with an absolute path; `None` for anything else.
    fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
        (path.is_absolute() && path.as_os_str().len() <= PATH_BYTES_MAX).then(|| Self {
            path: path.to_owned(),
            inode: found.ino(),
            size: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
        })
    }

    /// Whether the file is another one now, or was modified.
    pub(crate) fn has_changed(&self) -> bool {
        Self::of(&self.path).as_ref() != Some(self)
    }
}

/// The writable images that the configuration in a snapshot names.
///
/// # Errors
/// The configuration cannot be read.
pub(crate) fn images(snapshot: &Path) -> Result<Vec<Image>, StandbyError> {
    let path = snapshot.join("config.json");
    let mut text = String::new();
    let length = open_plain(&path)?
        .take(CONFIG_BYTES_MAX)
        .read_to_string(&mut text);
    length.map_err(StandbyError::system(&path))?;
    let config: Config = serde_json::from_str(&text)
        .map_err(io::Error::from)
        .map_err(StandbyError::system(&path))?;
    let disks = config.disks.into_iter().flatten();
    let disks = disks.filter(|disk| !disk.readonly);
    let pmem = config.pmem.into_iter().flatten();
    let pmem = pmem.filter(|pmem| !pmem.discard_writes);
    let paths = disks
        .filter_map(|disk| disk.path)
        .chain(pmem.map(|pmem| pmem.file));
    let images = paths.filter_map(|path| Image::of(&path));
    Ok(images.take(IMAGES_MAX).collect())
}
