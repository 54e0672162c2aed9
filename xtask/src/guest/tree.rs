//! `cargo xtask guest apply` and `refresh`: convert the series to commits, and commits back to the series.
//!
//! ```text
//! guest-patches/{series,patches} ── apply ──→ TREE: tag `base`, then a commit for each patch
//!                                ←─ refresh ─ TREE, in which commits may be new, changed, moved
//! ```
//!
//! `--newest` does the same for Debian's newest source; `refresh` then writes only the parts in which its commits
//! differ from the patches to `patches-VERSION`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::cache::Lock;
use super::make::copy_tree;
use super::newest;
use super::series::{self, Patch, Series};
use super::series_file;
use super::source::Source;
use crate::apt::{self, Need};
use crate::paths;

const GIT: Need = Need {
    package: "git",
    why: "keeps the patch series as commits",
};
/// Tag of the commit of the unpatched source.
const BASE: &str = "base";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The working tree [default: target/guest/tree]
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Use the newest kernel source that Debian has
    #[arg(long)]
    newest: bool,
}

impl Options {
    fn dir(&self) -> Result<PathBuf> {
        match &self.dir {
            Some(dir) => std::path::absolute(dir).context("the working tree's path"),
            None if self.newest => Ok(paths::guest().join("tree-newest")),
            None => Ok(paths::guest().join("tree")),
        }
    }

    fn source(&self) -> Result<Source> {
        let base = Source::base()?;
        if !self.newest {
            return Ok(base);
        }
        newest::source(&base)?.with_context(|| format!("Debian has none newer than {}", base.name))
    }
}

/// Makes a working tree with a commit for each patch.
pub(crate) fn apply(options: &Options) -> Result<()> {
    ensure_git()?;
    let dir = options.dir()?;
    ensure!(
        !dir.exists(),
        "{} already exists: refresh the series from it, then remove it",
        dir.display()
    );
    let source = options.source()?;
    let series = Series::read()?.for_source(&source)?;
    let beside = dir.with_extension("new");
    if beside.exists() {
        fs::remove_dir_all(&beside).with_context(|| format!("removing {}", beside.display()))?;
    }
    let folder = dir.parent().context("the working tree is in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    eprintln!("Copying {}", source.name);
    {
        let lock = Lock::take(&paths::cache()?)?;
        copy_tree(&source.unpack(&lock)?, &beside)?;
    }
    eprintln!("Committing it (a minute or two)");
    commit_base(&beside, &source)?;
    fs::rename(&beside, &dir).with_context(|| format!("creating {}", dir.display()))?;
    for (index, patch) in series.patches.iter().enumerate() {
        eprintln!("{}/{} {}", index + 1, series.patches.len(), patch.name);
        let path = dir.join(".git").join(&patch.name);
        fs::write(&path, &patch.text).with_context(|| format!("writing {}", path.display()))?;
        let mut am = git(&dir);
        // Equal patches yield equal commits.
        am.args(["am", "--quiet", "--committer-date-is-author-date"]);
        text(am.arg(&path)).with_context(|| {
            format!(
                "{} does not apply; the tree is left in the middle of `git am`: {}",
                patch.name,
                dir.display()
            )
        })?;
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    println!("{}", dir.display());
    Ok(())
}

fn commit_base(dir: &Path, source: &Source) -> Result<()> {
    text(git(dir).args(["init", "--quiet", "--initial-branch=patches"]))?;
    for (key, value) in [
        ("user.name", "guest-patches"),
        ("user.email", "guest-patches@localhost"),
        ("core.compression", "1"),
        ("gc.auto", "0"),
    ] {
        text(git(dir).args(["config", key, value]))?;
    }
    // The kernel's ignore rules match some files of its source.
    text(git(dir).args(["add", "--all", "--force"]))?;
    let message = format!("{}\n", source.name);
    text(git(dir).args(["commit", "--quiet", "--no-verify", "--message", &message]))?;
    text(git(dir).args(["tag", BASE]))?;
    Ok(())
}

/// Converts the tree's commits back to the series.
pub(crate) fn refresh(options: &Options) -> Result<()> {
    ensure_git()?;
    let dir = options.dir()?;
    ensure!(
        dir.join(".git").exists(),
        "{} was not created by `cargo xtask guest apply`",
        dir.display()
    );
    let pending = text(git(&dir).args(["status", "--porcelain", "--untracked-files=no"]))?;
    ensure!(
        pending.is_empty(),
        "{} has uncommitted changes:\n{pending}",
        dir.display()
    );
    let commits = format_patches(&dir)?;
    let old = Series::read()?;
    let names = series_file::assign(&old.patches, &commits)?;
    if options.newest {
        return write_parts(&old, &commits, &names, &options.source()?);
    }
    let written = write(&old, &commits, &names)?;
    println!("{} patches, {written} of them changed", names.len());
    Ok(())
}

/// Every commit since the base as a patch, with git's name.
fn format_patches(dir: &Path) -> Result<Vec<Patch>> {
    let out = paths::guest().join(format!("refreshing-{}", std::process::id()));
    fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    let result = (|| {
        let mut format = git(dir);
        format.args(["format-patch", "--quiet", "--zero-commit", "--no-signature"]);
        format.args([
            "--no-numbered",
            "--no-renames",
            "--abbrev=9",
            "-p",
            "--stat",
            "--output-directory",
        ]);
        format.arg(&out).arg(format!("{BASE}..HEAD"));
        text(&mut format)?;
        let mut patches = BTreeMap::new();
        for entry in fs::read_dir(&out).context("reading git's patches")? {
            let path = entry.context("reading git's patches")?.path();
            let name = path.file_name().context("a patch has a name")?;
            let contents =
                fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            patches.insert(name.to_string_lossy().into_owned(), contents);
        }
        Ok(patches
            .into_iter()
            .map(|(name, text)| Patch {
                name,
                text: plain_header(&text),
            })
            .collect())
    })();
    fs::remove_dir_all(&out).with_context(|| format!("removing {}", out.display()))?;
    result
}

/// Removes irrelevant fields that differ between trees, and puts each field on one line.
fn plain_header(text: &str) -> String {
    let (header, rest) = text.split_once("\n\n").unwrap_or((text, ""));
    let header = header.replace("\n ", " ");
    let lines: Vec<&str> = header
        .lines()
        .filter(|line| !line.starts_with("From 0000") && !line.starts_with("Date: "))
        .collect();
    format!("{}\n\n{}\n", lines.join("\n"), rest.trim_end_matches('\n'))
}

/// Writes the parts of `commits` that differ from the patches of the same names.
fn write_parts(old: &Series, commits: &[Patch], names: &[String], source: &Source) -> Result<()> {
    let listed: Vec<&String> = old.patches.iter().map(|patch| &patch.name).collect();
    ensure!(
        listed == names.iter().collect::<Vec<_>>(),
        "the patches of the tree differ from those of the series"
    );
    let (major, minor) = source
        .version()
        .with_context(|| format!("{} has no version", source.name))?;
    let folder = series::folder().join(format!("patches-{major}.{minor}"));
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let mut written = 0;
    for (patch, commit) in old.patches.iter().zip(commits) {
        if let Some(parts) = patch.differing_parts(commit)? {
            let path = folder.join(&patch.name);
            fs::write(&path, parts).with_context(|| format!("writing {}", path.display()))?;
            written += 1;
        }
    }
    println!("parts of {written} patches in {}", folder.display());
    Ok(())
}

/// Writes patches that differ; returns their number.
fn write(old: &Series, commits: &[Patch], names: &[String]) -> Result<usize> {
    let folder = series::folder();
    let patches = folder.join("patches");
    fs::create_dir_all(&patches).with_context(|| format!("creating {}", patches.display()))?;
    let mut written = 0;
    for (commit, name) in commits.iter().zip(names) {
        let path = patches.join(name);
        if fs::read_to_string(&path).is_ok_and(|text| text == commit.text) {
            continue;
        }
        fs::write(&path, &commit.text).with_context(|| format!("writing {}", path.display()))?;
        println!("  {name}");
        written += 1;
    }
    for gone in old
        .patches
        .iter()
        .filter(|patch| !names.contains(&patch.name))
    {
        let path = patches.join(&gone.name);
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        println!("  {} was removed", gone.name);
    }
    let list = folder.join("series");
    let text = fs::read_to_string(&list).unwrap_or_default();
    fs::write(&list, series_file::rewrite(&text, names))
        .with_context(|| format!("writing {}", list.display()))?;
    Ok(written)
}

fn ensure_git() -> Result<()> {
    let found = Command::new("git")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if found { Ok(()) } else { apt::ensure(&[GIT]) }
}

/// git in `dir`, independent of the user's configuration.
fn git(dir: &Path) -> Command {
    let mut git = Command::new("git");
    git.arg("-C").arg(dir);
    for setting in [
        "commit.gpgSign=false",
        "core.fsync=none",
        "core.autocrlf=false",
        "core.hooksPath=/dev/null",
        "diff.algorithm=myers",
        "diff.noprefix=false",
        "format.subjectPrefix=PATCH",
        "am.threeWay=false",
    ] {
        git.args(["-c", setting]);
    }
    git.env_remove("GIT_DIR").env_remove("GIT_WORK_TREE");
    git.env("LC_ALL", "C").env("TZ", "UTC");
    git
}

fn text(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .context("starting git")?;
    if !output.status.success() {
        bail!(
            "git failed ({}):\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_string())
}
