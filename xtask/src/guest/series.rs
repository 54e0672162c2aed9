//! The patch series of `guest-patches`: its list, and its application to a source.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::cache::key;
use super::source::{self, Source};
use crate::apt::{self, Need};
use crate::paths;

const PATCH: Need = Need {
    package: "patch",
    why: "applies the patch series",
};

/// Files of a source that patches have changed; `None` is a file that is not there.
pub(super) type Contents = BTreeMap<String, Option<Vec<u8>>>;

/// One patch.
#[derive(Debug, Clone)]
pub(super) struct Patch {
    /// Its file's name, as the series lists it.
    pub(super) name: String,
    pub(super) text: String,
}

impl Patch {
    /// Every file that it names.
    pub(super) fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        for line in self.text.lines() {
            let Some((old, new)) = line
                .strip_prefix("diff --git a/")
                .and_then(|rest| rest.split_once(" b/"))
            else {
                continue;
            };
            files.extend([old.to_string(), new.to_string()]);
        }
        files.sort();
        files.dedup();
        files
    }

    /// The part of it that changes files selected by `wanted`.
    pub(super) fn part(&self, wanted: impl Fn(&str) -> bool) -> Option<Self> {
        let mut text = String::new();
        let mut inside = false;
        for line in self.text.lines() {
            if let Some(rest) = line.strip_prefix("diff --git a/") {
                inside = rest.split_once(" b/").is_some_and(|(_, new)| wanted(new));
            }
            if inside {
                text.push_str(line);
                text.push('\n');
            }
        }
        (!text.is_empty()).then(|| Self {
            name: self.name.clone(),
            text,
        })
    }

    /// The patch with `parts` in place of its own for the same files.
    fn with_parts(&self, parts: &str) -> Result<Self> {
        let parts = Self {
            name: self.name.clone(),
            text: parts.to_string(),
        };
        let (own, theirs) = (self.files(), parts.files());
        let unknown: Vec<&String> = theirs.iter().filter(|file| !own.contains(file)).collect();
        ensure!(unknown.is_empty(), "the patch does not change {unknown:?}");
        let text = self.part(|file| !theirs.iter().any(|other| other == file));
        Ok(Self {
            name: parts.name,
            text: text.map_or(String::new(), |part| part.text) + &parts.text,
        })
    }

    /// The parts of `other` that change a file differently from this patch; moved lines do not count.
    pub(super) fn differing_parts(&self, other: &Self) -> Result<Option<String>> {
        ensure!(
            self.files() == other.files(),
            "{} changes other files there",
            self.name
        );
        let differing: Vec<String> = self
            .files()
            .into_iter()
            .filter(|file| {
                let changes =
                    |patch: &Self| patch.part(|name| name == file).map(|part| part.bare());
                changes(self) != changes(other)
            })
            .collect();
        let parts = other.part(|file| differing.iter().any(|name| name == file));
        Ok(parts.map(|part| part.text))
    }

    /// Its lines without numbers and hashes.
    fn bare(&self) -> Vec<String> {
        let lines = self.text.lines().filter(|line| !line.starts_with("index "));
        lines
            .map(|line| if line.starts_with("@@ ") { "@@" } else { line })
            .map(str::to_string)
            .collect()
    }

    /// Its first line of the commit message, without the `[PATCH …]`.
    pub(super) fn subject(&self) -> Option<String> {
        let mut lines = self.text.lines();
        let mut subject = lines
            .find_map(|line| line.strip_prefix("Subject: "))?
            .to_string();
        // A long subject continues in lines that start with a blank.
        for more in lines.take_while(|line| line.starts_with(' ')) {
            subject.push_str(more);
        }
        let bare = match subject
            .strip_prefix('[')
            .and_then(|rest| rest.split_once("] "))
        {
            Some((_, bare)) => bare.to_string(),
            None => subject,
        };
        Some(bare)
    }
}

/// The patches in their order.
#[derive(Debug)]
pub(super) struct Series {
    pub(super) patches: Vec<Patch>,
}

/// The folder of the series.
pub(super) fn folder() -> PathBuf {
    paths::workspace().join("guest-patches")
}

/// One of the kernel configurations next to the series.
pub(super) fn config(name: &str) -> Result<String> {
    let path = folder().join(format!("config/{name}.config"));
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

impl Series {
    /// Reads the series; a missing one is empty.
    pub(super) fn read() -> Result<Self> {
        Self::read_from(&folder())
    }

    /// The series that ours is measured against.
    pub(super) fn rival() -> Result<Self> {
        let series = Self::read_from(&folder().join("rival"))?;
        ensure!(!series.is_empty(), "guest-patches/rival lists no patch");
        Ok(series)
    }

    /// The patches of the series that need no other patch: inflation by blocks.
    pub(super) fn inflation() -> Result<Self> {
        let mut series = Self::read()?;
        series.patches.retain(|patch| patch.name.starts_with('5'));
        ensure!(
            !series.is_empty(),
            "guest-patches/series lists no 5xx patch"
        );
        Ok(series)
    }

    fn read_from(folder: &Path) -> Result<Self> {
        let list = folder.join("series");
        if !list.exists() {
            return Ok(Self {
                patches: Vec::new(),
            });
        }
        let text =
            fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
        let mut patches: Vec<Patch> = Vec::new();
        for name in names(&text) {
            ensure!(
                patches.iter().all(|patch| patch.name != name),
                "{} lists {name} twice",
                list.display()
            );
            let path = folder.join("patches").join(name);
            patches.push(Patch {
                name: name.to_string(),
                text: fs::read_to_string(&path)
                    .with_context(|| format!("reading {}", path.display()))?,
            });
        }
        Ok(Self { patches })
    }

    /// The series for `source`: for some files, parts of the newest `patches-VERSION` that is not newer than `source`
    /// replace the patches' own.
    pub(super) fn for_source(&self, source: &Source) -> Result<Self> {
        let mut patches = self.patches.clone();
        let folders = entries(&folder())?;
        let Some(parts) = parts_for(&folders, source.version()) else {
            return Ok(Self { patches });
        };
        for name in entries(&folder().join(parts))? {
            let path = folder().join(parts).join(&name);
            let text =
                fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let patch = patches
                .iter_mut()
                .find(|patch| patch.name == name)
                .with_context(|| format!("{} is for no patch of the series", path.display()))?;
            *patch = patch
                .with_parts(&text)
                .with_context(|| format!("putting {} into its patch", path.display()))?;
        }
        Ok(Self { patches })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.patches.is_empty()
    }

    /// A key that depends on the changes of the first `count` patches to the kernel. Messages and documentation do not
    /// count, so that no kernel is built again for an edited text.
    pub(super) fn prefix_key(&self, count: usize) -> String {
        let texts: Vec<String> = self.patches[..count]
            .iter()
            .filter_map(|patch| patch.part(|file| !file.starts_with("Documentation/")))
            .map(|changes| changes.text)
            .collect();
        key(&texts.iter().map(String::as_str).collect::<Vec<&str>>())
    }

    /// The result of the whole series on `tree`.
    pub(super) fn applied(&self, tree: &Path) -> Result<Contents> {
        let mut prefixes = self.prefixes(tree)?;
        prefixes.pop().context("there is the empty prefix at least")
    }

    /// The result of each prefix on `tree`, the empty one first.
    pub(super) fn prefixes(&self, tree: &Path) -> Result<Vec<Contents>> {
        apt::ensure(&[PATCH])?;
        let scratch = Scratch::new()?;
        let mut contents = Contents::new();
        for name in self.patches.iter().flat_map(Patch::files) {
            let bytes = source::file(tree, &name)?;
            if let Some(bytes) = &bytes {
                scratch.write(&name, bytes)?;
            }
            contents.insert(name, bytes);
        }
        let mut prefixes = vec![contents.clone()];
        for patch in &self.patches {
            scratch.patch(patch)?;
            for name in patch.files() {
                contents.insert(name.clone(), source::file(&scratch.dir, &name)?);
            }
            prefixes.push(contents.clone());
        }
        Ok(prefixes)
    }
}

/// Of folders, the `patches-VERSION` with the highest version up to `version`.
fn parts_for(folders: &[String], version: Option<(u32, u32)>) -> Option<&str> {
    let versions = folders.iter().filter_map(|name| {
        let own = source::parse_version(name.strip_prefix("patches-")?)?;
        (Some(own) <= version).then_some((own, name.as_str()))
    });
    versions.max().map(|(_, name)| name)
}

/// Names of the entries of a folder.
fn entries(folder: &Path) -> Result<Vec<String>> {
    fs::read_dir(folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .map(|entry| {
            let entry = entry.with_context(|| format!("reading {}", folder.display()))?;
            Ok(entry.file_name().to_string_lossy().into_owned())
        })
        .collect()
}

/// Names in a quilt series file.
pub(super) fn names(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(|line| {
            line.split_once('#')
                .map_or(line, |(before, _)| before)
                .trim()
        })
        .filter(|line| !line.is_empty())
}

/// A folder with the files that the series touches; removed when dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    dir: PathBuf,
}

impl Scratch {
    pub(super) fn new() -> Result<Self> {
        let dir = paths::guest().join(format!("applying-{}", std::process::id()));
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
        }
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(Self { dir })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.dir.join(name);
        let folder = path.parent().context("a file is in a folder")?;
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(&path, bytes))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Applies one patch: lines may have moved, but the context of each change must match.
    pub(super) fn patch(&self, patch: &Patch) -> Result<()> {
        let file = self.dir.join(".patch");
        fs::write(&file, &patch.text).with_context(|| format!("writing {}", file.display()))?;
        let output = Command::new("patch")
            .args(["-p1", "--fuzz=0", "--force", "--no-backup-if-mismatch"])
            .args(["--reject-file=-", "--input=.patch"])
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .output()
            .context("starting patch")?;
        if !output.status.success() {
            bail!(
                "{} does not apply:\n{}",
                patch.name,
                String::from_utf8_lossy(&output.stdout).trim_end()
            );
        }
        fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("note: removing {}: {error}", self.dir.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Patch, Series, names, parts_for};

    /// The maximum that a reviewer can read without a break.
    const PATCH_LINES_MAX: usize = 400;

    #[test]
    fn no_patch_is_too_long_to_review() {
        for series in [Series::read().unwrap(), Series::rival().unwrap()] {
            assert!(!series.is_empty());
            for patch in &series.patches {
                let lines = patch.text.lines().count();
                assert!(lines <= PATCH_LINES_MAX, "{}: {lines} lines", patch.name);
            }
        }
    }

    #[test]
    fn series_without_comments_and_blanks_is_the_order() {
        let text = "# 0xx preparation\n001-a.patch\n\n  101-b.patch  # why\n#102-c.patch\n";
        let all: Vec<&str> = names(text).collect();
        assert_eq!(all, ["001-a.patch", "101-b.patch"]);
    }

    #[test]
    fn parts_take_the_place_of_the_same_files_only() {
        let patch = |text: &str| Patch {
            name: "1.patch".into(),
            text: text.into(),
        };
        let old = "diff --git a/x.c b/x.c\n-1\ndiff --git a/y.c b/y.c\n-2\n";
        let both = patch(old)
            .with_parts("diff --git a/x.c b/x.c\n-3\n")
            .unwrap();
        assert_eq!(
            both.part(|file| file == "x.c").unwrap().text,
            "diff --git a/x.c b/x.c\n-3\n"
        );
        assert_eq!(
            both.part(|file| file == "y.c").unwrap().text,
            "diff --git a/y.c b/y.c\n-2\n"
        );
        patch(old)
            .with_parts("diff --git a/z.c b/z.c\n-3\n")
            .unwrap_err();
    }

    #[test]
    fn parts_differ_by_their_lines_and_not_by_their_numbers() {
        let patch = |text: &str| Patch {
            name: "1.patch".into(),
            text: text.into(),
        };
        let x = "diff --git a/x.c b/x.c\nindex 1..2\n@@ -1 +1 @@ a\n-1\n";
        let y = "diff --git a/y.c b/y.c\nindex 3..4\n@@ -1 +1 @@ a\n-2\n";
        let moved = "diff --git a/x.c b/x.c\nindex 5..6\n@@ -9 +9 @@ b\n-1\n";
        let other = "diff --git a/y.c b/y.c\nindex 3..4\n@@ -1 +1 @@ a\n-3\n";
        let old = patch(&format!("{x}{y}"));
        let parts = |new: &str| old.differing_parts(&patch(new));
        assert_eq!(parts(&format!("{moved}{y}")).unwrap(), None);
        assert_eq!(
            parts(&format!("{moved}{other}")).unwrap().as_deref(),
            Some(other)
        );
        parts(x).unwrap_err();
    }

    #[test]
    fn key_depends_on_the_changes_to_the_kernel_only() {
        let code = "diff --git a/mm/a.c b/mm/a.c\n@@ -1 +1 @@ a\n-1\n";
        let docs =
            "diff --git a/Documentation/mm/a.rst b/Documentation/mm/a.rst\n@@ -1 +1 @@ a\n-1\n";
        let key = |texts: &[String]| {
            let patch = |text: &String| Patch {
                name: "1.patch".into(),
                text: text.clone(),
            };
            let patches: Vec<Patch> = texts.iter().map(patch).collect();
            Series { patches }.prefix_key(texts.len())
        };
        let first = key(&[format!("Why.\n---\n{code}")]);
        assert_eq!(key(&[format!("Because.\n---\n{docs}{code}")]), first);
        assert_eq!(
            key(&[format!("Docs.\n---\n{docs}"), code.to_string()]),
            first
        );
        assert_ne!(key(&[code.replace("-1", "-2")]), first);
        assert_ne!(key(&[code.to_string(), code.to_string()]), first);
    }

    #[test]
    fn parts_are_those_of_the_highest_version_that_is_not_newer() {
        let folders = ["patches", "patches-6.18", "patches-7.3", "userspace"].map(String::from);
        assert_eq!(parts_for(&folders, Some((6, 12))), None);
        assert_eq!(parts_for(&folders, None), None);
        assert_eq!(parts_for(&folders, Some((7, 0))), Some("patches-6.18"));
        assert_eq!(parts_for(&folders, Some((7, 10))), Some("patches-7.3"));
    }

    #[test]
    fn patch_names_its_files_and_its_subject() {
        let patch = Patch {
            name: String::new(),
            text: "From 0 Mon\nSubject: [PATCH v2 3/9] mm: a subject that is so\n long that it wraps\n\n\
                   Why.\n---\ndiff --git a/mm/a.c b/mm/a.c\n--- a/mm/a.c\n+++ b/mm/a.c\n\
                   diff --git a/mm/b.h b/mm/b.h\nnew file mode 100644\n--- /dev/null\n+++ b/mm/b.h\n"
                .into(),
        };
        assert_eq!(patch.files(), ["mm/a.c", "mm/b.h"]);
        assert_eq!(
            patch.subject().unwrap(),
            "mm: a subject that is so long that it wraps"
        );
    }
}
