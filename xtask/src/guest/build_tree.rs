//! A source tree for kernel builds, in which any patches are applied and removed.
//!
//! ```text
//! cache/source-SOURCE/                unpacked, never written to
//! cache/build-tree-SOURCE/source/     hard links to it, except the files in `exchanged`
//! cache/build-tree-SOURCE/exchanged   names of files that may differ
//! cache/build-tree-SOURCE/NAME/       objects of one configuration
//! cache/check-SOURCE/                 another one, for `guest check`
//! cache/package-SOURCE/               another one, for `guest package`
//! ```
//!
//! Checks and packages have their own trees and locks, because they take long, and no test kernel should wait for them.
//! Checks also build all prefixes of the series, after which the next build of a test kernel would start from nothing.
//!
//! Kbuild stores the path of the source in every object. Objects can therefore be reused for another state of the
//! source only at the same path. A file is written, with the current time, only when its contents change. Make
//! therefore rebuilds only the objects that depend on it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::cache::Lock;
use super::make::{Objects, quiet};
use super::series::Contents;
use super::source::{self, Source};
use crate::paths;

/// Objects of the test kernels, which other configurations start from.
const MAIN: &str = "main";

/// The tree, held while this exists.
#[derive(Debug)]
pub(super) struct BuildTree {
    dir: PathBuf,
    /// The unpacked source.
    pub(super) pristine: PathBuf,
    _lock: Lock,
}

impl BuildTree {
    /// Opens the tree in which test kernels are built from a source; waits while another process uses it.
    pub(super) fn open(source: &Source) -> Result<Self> {
        let cache = paths::cache()?;
        let lock = Lock::take(&cache)?;
        let pristine = source.unpack(&lock)?;
        let dir = cache.join(format!("build-tree-{}", source.key));
        Self::open_in(dir, pristine, lock)
    }

    /// Opens the source's tree for work of one kind, which does not keep test kernels from being built; waits while
    /// another process does such work.
    pub(super) fn open_for(work: &str, source: &Source) -> Result<Self> {
        let cache = paths::cache()?;
        let pristine = source.unpack(&Lock::take(&cache)?)?;
        let dir = cache.join(format!("{work}-{}", source.key));
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let lock = Lock::take(&dir)?;
        Self::open_in(dir, pristine, lock)
    }

    fn open_in(dir: PathBuf, pristine: PathBuf, lock: Lock) -> Result<Self> {
        let tree = dir.join("source");
        if !tree.exists() {
            fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
            let beside = dir.join("source-linking");
            if beside.exists() {
                fs::remove_dir_all(&beside)
                    .with_context(|| format!("removing {}", beside.display()))?;
            }
            let mut link = Command::new("cp");
            link.arg("-al").arg(&pristine).arg(&beside);
            quiet(&mut link)?;
            fs::rename(&beside, &tree).with_context(|| format!("creating {}", tree.display()))?;
        }
        Ok(Self {
            dir,
            pristine,
            _lock: lock,
        })
    }

    fn tree(&self) -> PathBuf {
        self.dir.join("source")
    }

    /// Sets the tree to the pristine source with `contents` replacing its files.
    pub(super) fn put(&self, contents: &Contents) -> Result<()> {
        let record = self.dir.join("exchanged");
        let exchanged = match fs::read_to_string(&record) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).context("reading the names of exchanged files"),
        };
        let mut names: BTreeSet<&str> = exchanged.lines().collect();
        names.extend(contents.keys().map(String::as_str));
        // Written before files are exchanged, so that after an interruption every changed file is recorded.
        self.write_record(&record, names.iter().copied())?;
        for name in &names {
            let wanted = match contents.get(*name) {
                Some(wanted) => wanted.clone(),
                None => source::file(&self.pristine, name)?,
            };
            if source::file(&self.tree(), name)? != wanted {
                exchange(&self.tree().join(name), wanted.as_deref())?;
            }
        }
        self.write_record(&record, contents.keys().map(String::as_str))
    }

    fn write_record<'a>(&self, record: &Path, names: impl Iterator<Item = &'a str>) -> Result<()> {
        let text: String = names.map(|name| format!("{name}\n")).collect();
        let beside = self.dir.join("exchanged-new");
        fs::write(&beside, text).with_context(|| format!("writing {}", beside.display()))?;
        fs::rename(&beside, record).with_context(|| format!("writing {}", record.display()))
    }

    /// The objects of the test kernels.
    pub(super) fn main_objects(&self) -> Objects {
        self.objects_in(MAIN, None)
    }

    /// The objects of another configuration, built from nothing through ccache: another prefix, or the same with other
    /// options, shares most of them.
    pub(super) fn cached_objects(&self, name: &str) -> Result<Objects> {
        let ccache = paths::cache()?.join("ccache");
        Ok(self.objects_in(name, Some(ccache)))
    }

    fn objects_in(&self, name: &str, ccache: Option<PathBuf>) -> Objects {
        Objects {
            source: self.tree(),
            dir: self.dir.join(name),
            ccache,
        }
    }

    /// The objects of a configuration that has none in common with the test kernels.
    pub(super) fn separate_objects(&self, name: &str) -> Objects {
        self.objects_in(name, None)
    }
}

/// Replaces a file, which may have another link that must keep its contents.
fn exchange(path: &Path, wanted: Option<&[u8]>) -> Result<()> {
    let Some(bytes) = wanted else {
        return fs::remove_file(path).with_context(|| format!("removing {}", path.display()));
    };
    let folder = path.parent().context("a file is in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let beside = folder.join(".exchange");
    fs::write(&beside, bytes).with_context(|| format!("writing {}", beside.display()))?;
    if let Ok(old) = fs::metadata(path) {
        // Scripts stay executable.
        fs::set_permissions(&beside, old.permissions())
            .with_context(|| format!("permissions of {}", beside.display()))?;
    }
    fs::rename(&beside, path).with_context(|| format!("replacing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(files: &[(&str, Option<&str>)]) -> Contents {
        let owned = |(name, text): &(&str, Option<&str>)| {
            let bytes = text.map(|text| text.as_bytes().to_vec());
            ((*name).to_string(), bytes)
        };
        files.iter().map(owned).collect()
    }

    fn assert_holds(tree: &BuildTree, wanted: &[(&str, Option<&str>)]) {
        for (name, wanted) in contents(wanted) {
            let found = source::file(&tree.tree(), &name).unwrap();
            assert_eq!(found, wanted, "{name}");
        }
    }

    /// The process was killed after it had written the record and the first of the files.
    fn interrupt(tree: &BuildTree, patched: &Contents) {
        let names = patched.keys().map(String::as_str);
        tree.write_record(&tree.dir.join("exchanged"), names)
            .unwrap();
        let (name, bytes) = patched.iter().next().unwrap();
        exchange(&tree.tree().join(name), bytes.as_deref()).unwrap();
    }

    #[test]
    fn run_after_an_interrupted_one_completes_its_files_or_restores_them() {
        let cache = tempfile::tempdir().unwrap();
        let pristine = cache.path().join("source");
        fs::create_dir_all(pristine.join("mm")).unwrap();
        let stock = [
            ("mm/a.c", Some("a")),
            ("mm/b.c", Some("b")),
            ("mm/c.c", None),
        ];
        for (name, text) in stock {
            if let Some(text) = text {
                fs::write(pristine.join(name), text).unwrap();
            }
        }
        let patched = [
            ("mm/a.c", Some("A")),
            ("mm/b.c", None),
            ("mm/c.c", Some("C")),
        ];
        let lock = Lock::take(cache.path()).unwrap();
        let tree = BuildTree::open_in(cache.path().join("tree"), pristine.clone(), lock).unwrap();

        interrupt(&tree, &contents(&patched));
        assert_holds(&tree, &[("mm/a.c", Some("A")), ("mm/b.c", Some("b"))]);
        tree.put(&contents(&patched)).unwrap();
        assert_holds(&tree, &patched);

        tree.put(&Contents::new()).unwrap();
        interrupt(&tree, &contents(&patched));
        tree.put(&Contents::new()).unwrap();
        assert_holds(&tree, &stock);
        // The tree has links to the unpacked source, which no exchange changes.
        assert_eq!(fs::read(pristine.join("mm/a.c")).unwrap(), b"a");
    }
}
