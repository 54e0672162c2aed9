//! Chains of differential snapshots: opens the bases of a snapshot.
//!
//! ```text
//!   /var/lib/vm/            the parent folder
//!     monday/               id a, no base          all pages
//!     tuesday/              id b, base monday, a   the pages that differ from monday
//!     wednesday/            id c, base tuesday, b  the pages that differ from tuesday
//! ```
//! A snapshot names its base by folder name and random id. A base that is missing, damaged or replaced by another
//! snapshot is therefore rejected. The chain can be moved together with its parent folder.

use std::fs;
use std::path::{Component, Path, PathBuf};

use super::link::{Base, CHAIN_MAX};
use super::saved_files::SavedFiles;
use super::{SnapshotError, SnapshotState};

/// Decides whether the folder of a base may be opened.
pub type Admit<'a> = dyn Fn(&Path) -> Result<(), SnapshotError> + 'a;

/// A snapshot to which writes have been recorded since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SavedBase {
    /// Its id.
    pub(super) id: String,
    /// Its folder, without symbolic links.
    pub(super) folder: PathBuf,
    /// Number of snapshots in its chain.
    pub(super) length: usize,
}

impl SavedBase {
    /// The base of a new snapshot in `folder`.
    ///
    /// # Errors
    /// The folders have different parents, the chain is too long, or the base has changed.
    pub(super) fn of_new(&self, folder: &Path) -> Result<Base, SnapshotError> {
        let broken = |reason| SnapshotError::Chain {
            path: self.folder.clone(),
            reason,
        };
        if self.length >= CHAIN_MAX {
            return Err(SnapshotError::ChainTooLong);
        }
        let name = self.folder.file_name().and_then(|name| name.to_str());
        let name = name.filter(|_| real(folder).parent() == self.folder.parent());
        let name =
            name.ok_or_else(|| broken("it is not in the same folder as the new snapshot"))?;
        let base = Base {
            id: self.id.clone(),
            folder: name.to_owned(),
        };
        check(&self.folder, &base, &SavedFiles::open(&self.folder)?.state)?;
        Ok(base)
    }
}

/// The path without symbolic links. A path that does not exist is rejected where it is opened.
pub(super) fn real(folder: &Path) -> PathBuf {
    fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned())
}

/// The folders of the chain that ends with `folder`, which is the first.
///
/// # Errors
/// A snapshot cannot be read, or is not the one that the next one is based on.
pub fn folders(folder: &Path, admit: &Admit<'_>) -> Result<Vec<PathBuf>, SnapshotError> {
    let mut folders = Vec::new();
    visit(folder, admit, |saved| {
        folders.push(saved.folder);
        Ok(())
    })?;
    Ok(folders)
}

/// Opens the snapshots of the chain that ends with `folder`, the newest first.
///
/// # Errors
/// As for [`folders`], or `each` failed.
pub(super) fn visit(
    folder: &Path,
    admit: &Admit<'_>,
    mut each: impl FnMut(SavedFiles) -> Result<(), SnapshotError>,
) -> Result<(), SnapshotError> {
    let mut saved = SavedFiles::open(folder)?;
    for _ in 1..CHAIN_MAX {
        let link = saved.state.link.as_ref();
        let Some(base) = link.and_then(|link| link.base.clone()) else {
            return each(saved);
        };
        let folder = beside(&saved.folder, &base)?;
        admit(&folder)?;
        let next = SavedFiles::open(&folder)?;
        check(&folder, &base, &next.state)?;
        each(saved)?;
        saved = next;
    }
    match saved
        .state
        .link
        .as_ref()
        .is_some_and(|it| it.base.is_some())
    {
        true => Err(SnapshotError::ChainTooLong),
        false => each(saved),
    }
}

/// The folder of `base`, in the parent folder of `folder`.
fn beside(folder: &Path, base: &Base) -> Result<PathBuf, SnapshotError> {
    let invalid = || SnapshotError::Chain {
        path: folder.to_owned(),
        reason: "the name of its base is not that of another snapshot in the same folder",
    };
    let mut parts = Path::new(&base.folder).components();
    let (Some(Component::Normal(name)), None) = (parts.next(), parts.next()) else {
        return Err(invalid());
    };
    let real = real(folder);
    let parent = real.parent().ok_or_else(invalid)?;
    Ok(parent.join(name))
}

fn check(folder: &Path, expected: &Base, found: &SnapshotState) -> Result<(), SnapshotError> {
    match &found.link {
        Some(link) if link.id == expected.id => Ok(()),
        _ => Err(SnapshotError::Chain {
            path: folder.to_owned(),
            reason: "it is not the snapshot on which the next one is based",
        }),
    }
}
