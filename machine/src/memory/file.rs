//! Zones backed by a file (`--memory-zone file=`).
//!
//! | `file` is | `shared=on` | `shared=off` |
//! | --- | --- | --- |
//! | a file | mapped shared: guest writes go to the file | mapped private: the file is only read |
//! | a directory | a new file in it, without a name | private anonymous memory |
//! | a directory of huge pages | a new file in it, without a name | the same |
//!
//! No other process can open a file without a name. A private mapping of such a file would behave like private
//! anonymous memory, but cost more, because its zeros come from the file system.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use virtio_devices::file_system;

use super::error::ZoneError;
use super::layout::PAGE_BYTES;
use super::source::Source;

/// The file's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ZoneFile {
    pub(super) path: PathBuf,
    pub(super) shared: bool,
    /// Huge pages are configured.
    pub(super) huge_pages: bool,
    /// Their configured size.
    pub(super) huge_page_bytes: Option<u64>,
}

impl ZoneFile {
    /// Opens the file, or creates one in the directory.
    pub(super) fn open(&self, bytes: u64) -> Result<Source, ZoneError> {
        // Checked before opening, because opening a device can have side effects.
        let metadata = fs::metadata(&self.path).map_err(|source| self.open_error(source))?;
        let (file, shared) = if metadata.is_dir() {
            self.open_directory(bytes)?
        } else if metadata.is_file() {
            (Some(self.open_file(bytes)?), self.shared)
        } else {
            return Err(self.not_a_file());
        };
        let page_bytes = file.as_ref().and_then(file_system::huge_page_bytes);
        self.check_huge_pages(page_bytes)?;
        Ok(match file {
            None => Source::anonymous(),
            Some(file) => Source::file(file, shared, page_bytes),
        })
    }

    fn open_file(&self, bytes: u64) -> Result<File, ZoneError> {
        let file = OpenOptions::new()
            .read(true)
            .write(self.shared)
            .open(&self.path)
            .map_err(|source| self.open_error(source))?;
        // Another file may have taken the name in the meantime.
        let metadata = file.metadata().map_err(|source| self.open_error(source))?;
        if !metadata.is_file() {
            return Err(self.not_a_file());
        }
        if metadata.len() < bytes {
            return Err(ZoneError::FileTooSmall {
                path: self.path.clone(),
                file_bytes: metadata.len(),
                bytes,
            });
        }
        Ok(file)
    }

    /// A new file of `bytes` without a name, unless private anonymous memory suffices; always shared.
    fn open_directory(&self, bytes: u64) -> Result<(Option<File>, bool), ZoneError> {
        let directory = File::open(&self.path).map_err(|source| self.open_error(source))?;
        let page_bytes = file_system::huge_page_bytes(&directory);
        if !self.shared && page_bytes.is_none() {
            return Ok((None, false));
        }
        let page_bytes = page_bytes.unwrap_or(PAGE_BYTES);
        if !bytes.is_multiple_of(page_bytes) {
            return Err(ZoneError::NotPageMultiple { bytes, page_bytes });
        }
        let file = nameless_file(&self.path).map_err(|source| self.open_error(source))?;
        file.set_len(bytes)
            .map_err(|source| ZoneError::of_size(bytes, source))?;
        Ok((Some(file), true))
    }

    fn check_huge_pages(&self, page_bytes: Option<u64>) -> Result<(), ZoneError> {
        let path = || self.path.clone();
        match (self.huge_pages, page_bytes, self.huge_page_bytes) {
            (true, None, _) => Err(ZoneError::FileWithoutHugePages { path: path() }),
            (true, Some(page_bytes), Some(wanted_bytes)) if page_bytes != wanted_bytes => {
                Err(ZoneError::FileOfOtherHugePages {
                    path: path(),
                    page_bytes,
                    wanted_bytes,
                })
            }
            _ => Ok(()),
        }
    }

    fn open_error(&self, source: io::Error) -> ZoneError {
        ZoneError::Open {
            path: self.path.clone(),
            source,
        }
    }

    fn not_a_file(&self) -> ZoneError {
        ZoneError::NotAFile {
            path: self.path.clone(),
        }
    }
}

/// Creates a file in `directory` and removes its name.
///
/// `O_TMPFILE` is not used: some file systems do not support it, for example those of shared directories.
fn nameless_file(directory: &Path) -> io::Result<File> {
    /// Maximum number of names to try. If all of them are taken, it is deliberate.
    const ATTEMPTS_MAX: u32 = 100;
    // Not the process id, which is 1 for every VMM in a jail.
    let random = RandomState::new();
    for attempt in 0..ATTEMPTS_MAX {
        let path = directory.join(format!(".ch_ram-{:016x}", random.hash_one(attempt)));
        let made = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        match made {
            Ok(file) => {
                fs::remove_file(&path)?;
                return Ok(file);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::MIB;

    fn zone_file(path: &Path, shared: bool) -> ZoneFile {
        ZoneFile {
            path: path.to_owned(),
            shared,
            huge_pages: false,
            huge_page_bytes: None,
        }
    }

    #[test]
    fn open_file_is_read_only_unless_shared() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        File::create(&path).unwrap().set_len(MIB).unwrap();
        for shared in [false, true] {
            let source = zone_file(&path, shared).open(MIB).unwrap();
            let file = source.file.unwrap();
            assert_eq!(source.shared, shared);
            assert_eq!(source.page_bytes, PAGE_BYTES);
            assert_eq!(file.set_len(MIB).is_ok(), shared, "shared {shared}");
        }
    }

    #[test]
    fn open_directory_makes_a_file_without_a_name_if_it_is_shared() {
        let folder = tempfile::tempdir().unwrap();
        let private = zone_file(folder.path(), false).open(MIB).unwrap();
        assert!(private.file.is_none());
        let shared = zone_file(folder.path(), true).open(MIB).unwrap();
        assert_eq!(shared.file.unwrap().metadata().unwrap().len(), MIB);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn open_what_cannot_be_ram_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        let open = |path: &Path| zone_file(path, true).open(MIB).unwrap_err();
        assert!(matches!(open(&path), ZoneError::Open { .. }));
        File::create(&path).unwrap().set_len(MIB - 1).unwrap();
        assert!(matches!(
            open(&path),
            ZoneError::FileTooSmall { file_bytes, .. } if file_bytes == MIB - 1
        ));
        assert!(matches!(
            open(Path::new("/dev/null")),
            ZoneError::NotAFile { .. }
        ));
        let huge = ZoneFile {
            huge_pages: true,
            ..zone_file(folder.path(), true)
        };
        assert!(matches!(
            huge.open(2 * MIB),
            Err(ZoneError::FileWithoutHugePages { .. })
        ));
    }
}
