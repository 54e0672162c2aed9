//! `cargo xtask guest check`: what every prefix of the series promises.
//!
//! | Check | Of | Cached |
//! | --- | --- | --- |
//! | applies, no line around a change differing | every prefix, on each source | – (it takes no time) |
//! | `scripts/checkpatch.pl` finds nothing | every patch | by the patch |
//! | builds without a warning, options on and off | every prefix: folders that it touches | by the prefix |
//! | builds whole | the series | by the series |
//! | boots with each tracker | every prefix, with `--boot` | by the prefix |

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::boot;
use super::cache::{Lock, compiler, key};
use super::kernel::{self, Kernel};
use super::make::{Objects, Options as Kconfig};
use super::newest;
use super::report::Report;
use super::series::{Contents, Patch, Series};
use super::source::Source;
use super::workshop::Workshop;
use crate::apt::{self, Need};
use crate::paths;

const PERL: Need = Need {
    package: "perl",
    why: "runs the kernel's checkpatch",
};

/// Raised when a check gets stricter.
const CHECK_VERSION: &str = "1";

/// Always built, whatever a series touches: where its work is.
const FOLDERS: [&str; 2] = ["drivers/virtio", "mm"];
/// Parts of the source that no kernel configuration builds.
const NOT_BUILT: [&str; 5] = ["Documentation", "samples", "scripts", "tools", "usr"];

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only what is quick: applies to the base, checkpatch, and the whole series builds
    #[arg(long, conflicts_with = "boot")]
    quick: bool,
    /// Only what needs no compiler: applies to the base and to the newest source, checkpatch
    #[arg(long, conflicts_with_all = ["quick", "boot"])]
    no_build: bool,
    /// Boot every prefix with each tracker, too
    #[arg(long)]
    boot: bool,
}

/// Runs the checks and prints their results.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let series = Series::read()?;
    if series.is_empty() {
        println!("guest-patches/series lists no patch: nothing to check");
        return Ok(ExitCode::SUCCESS);
    }
    let mut report = Report::default();
    let base = Source::base()?;
    let applies = every_prefix_applies(&series, &base, &mut report)?;
    checkpatch(&series, &base, &mut report)?;
    if applies && !options.no_build {
        if !options.quick {
            for variant in [Variant::On, Variant::Off] {
                every_prefix_builds(&series, &base, variant, &mut report)?;
            }
        }
        report.check("the whole series builds", whole_series_builds());
        if options.boot {
            boot::every_prefix(&series, &base, &mut report)?;
        }
    }
    if !options.quick {
        on_newest(&series, &base, options.no_build, &mut report)?;
    }
    Ok(if report.close() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn pristine(source: &Source) -> Result<PathBuf> {
    let lock = Lock::take(&paths::cache()?)?;
    source.unpack(&lock)
}

fn every_prefix_applies(series: &Series, source: &Source, report: &mut Report) -> Result<bool> {
    let count = series.patches.len();
    let name = format!("all {count} prefixes apply to {}", source.name);
    let applied = series.prefixes(&pristine(source)?).map(drop);
    Ok(report.check(name, applied))
}

/// Takes the word of the kernel's own script, one patch at a time.
fn checkpatch(series: &Series, base: &Source, report: &mut Report) -> Result<()> {
    apt::ensure(&[PERL])?;
    let tree = pristine(base)?;
    let mut bad = 0;
    for patch in &series.patches {
        let stamp = Stamp::new(&["checkpatch", &base.key, &patch.text])?;
        if stamp.is_set() {
            continue;
        }
        if report.check(
            format!("checkpatch {}", patch.name),
            checkpatch_one(&tree, patch),
        ) {
            stamp.set()?;
        } else {
            bad += 1;
        }
    }
    let count = series.patches.len();
    if bad == 0 {
        report.check(
            format!("checkpatch finds nothing in {count} patches"),
            Ok(()),
        );
    }
    Ok(())
}

fn checkpatch_one(tree: &Path, patch: &Patch) -> Result<()> {
    let path = super::series::folder().join("patches").join(&patch.name);
    let output = Command::new("perl")
        .arg(tree.join("scripts/checkpatch.pl"))
        .arg(format!("--root={}", tree.display()))
        .args(["--no-summary", "--show-types", "--color=never"])
        // New files belong to the maintainers of the folders they are in.
        .args(["--ignore", "FILE_PATH_CHANGES"])
        .arg(&path)
        .current_dir(tree)
        .stdin(Stdio::null())
        .output()
        .context("starting checkpatch")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let complains = said
        .lines()
        .any(|line| line.starts_with("ERROR:") || line.starts_with("WARNING:"));
    if complains || !output.status.success() {
        bail!(
            "\n{}{}",
            said.trim(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

fn whole_series_builds() -> Result<()> {
    let kernel = Kernel::patched()?.context("the series is not empty")?;
    kernel.build(&paths::guest().join("patched"))
}

/// The series' own options, all on or all off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Variant {
    On,
    Off,
}

impl Variant {
    /// Names its tree of objects, too.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
        }
    }

    pub(super) fn fragment(self) -> Result<String> {
        let with = kernel::patched_fragment()?;
        Ok(match self {
            Self::On => with,
            Self::Off => {
                let ours = with
                    .strip_prefix(kernel::FRAGMENT)
                    .context("the patched fragment goes on from the stock one")?;
                format!("{}{}", kernel::FRAGMENT, ours.replace("=y\n", "=n\n"))
            }
        })
    }
}

fn every_prefix_builds(
    series: &Series,
    source: &Source,
    variant: Variant,
    report: &mut Report,
) -> Result<()> {
    let fragment = variant.fragment()?;
    let compiler = compiler()?;
    let stamp = |count: usize| {
        let prefix = series.prefix_key(count);
        let parts = [
            "builds",
            CHECK_VERSION,
            &source.key,
            &prefix,
            &fragment,
            &compiler,
        ];
        Stamp::new(&parts)
    };
    let count = series.patches.len();
    let mut missing = Vec::new();
    for index in 1..=count {
        if !stamp(index)?.is_set() {
            missing.push(index);
        }
    }
    let all = format!(
        "all {count} prefixes build on {} with the options {}",
        source.name,
        variant.name()
    );
    if missing.is_empty() {
        report.check(all, Ok(()));
        return Ok(());
    }
    let workshop = Workshop::open(source)?;
    let prefixes = series.prefixes(&workshop.pristine)?;
    let objects = workshop.objects(variant.name())?;
    let folders = folders(series);
    let mut bad = false;
    for index in missing {
        let name = format!(
            "{index}/{count} {} builds, options {}",
            series.patches[index - 1].name,
            variant.name()
        );
        let result = prefix_builds(&workshop, &objects, &prefixes[index], &fragment, &folders);
        if report.check(&name, result) {
            stamp(index)?.set()?;
        } else {
            bad = true;
        }
    }
    if !bad {
        report.check(all, Ok(()));
    }
    Ok(())
}

fn prefix_builds(
    workshop: &Workshop,
    objects: &Objects,
    contents: &Contents,
    fragment: &str,
    folders: &BTreeSet<String>,
) -> Result<()> {
    workshop.put(contents)?;
    objects.configure(fragment, Kconfig::KnownOnly)?;
    let targets: Vec<String> = folders
        .iter()
        .filter(|folder| objects.source.join(folder).join("Makefile").exists())
        .map(|folder| format!("{folder}/"))
        .collect();
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    let warnings = objects.build("Prefix", &targets, None)?;
    ensure!(
        warnings.is_empty(),
        "the build warns:\n  {}",
        warnings.join("\n  ")
    );
    Ok(())
}

/// Folders that the series builds something in.
fn folders(series: &Series) -> BTreeSet<String> {
    let touched = series.patches.iter().flat_map(Patch::files);
    let mut folders: BTreeSet<String> = touched
        .filter(|file| file.ends_with(".c"))
        .filter_map(|file| Some(file.rsplit_once('/')?.0.to_string()))
        .filter(|folder| {
            let top = folder.split('/').next().unwrap_or(folder);
            !NOT_BUILT.contains(&top)
        })
        .collect();
    folders.extend(FOLDERS.map(str::to_string));
    folders
}

/// The newest kernel that Debian packages: the series applies and its folders build.
fn on_newest(series: &Series, base: &Source, no_build: bool, report: &mut Report) -> Result<()> {
    let newest = match newest::source(base) {
        Ok(Some(newest)) => newest,
        Ok(None) => {
            report.skip(
                "the newest Debian source",
                format!("{} is the only one that can be reached", base.name),
            );
            return Ok(());
        }
        Err(error) => {
            report.skip("the newest Debian source", format!("{error:#}"));
            return Ok(());
        }
    };
    if !every_prefix_applies(series, &newest, report)? || no_build {
        return Ok(());
    }
    for variant in [Variant::On, Variant::Off] {
        let name = format!(
            "the series builds on {}, options {}",
            newest.name,
            variant.name()
        );
        report.check(name, builds_on(series, &newest, variant));
    }
    Ok(())
}

fn builds_on(series: &Series, source: &Source, variant: Variant) -> Result<()> {
    let fragment = variant.fragment()?;
    let all = series.prefix_key(series.patches.len());
    let compiler = compiler()?;
    let parts = [
        "builds",
        CHECK_VERSION,
        &source.key,
        &all,
        &fragment,
        &compiler,
    ];
    let stamp = Stamp::new(&parts)?;
    if stamp.is_set() {
        return Ok(());
    }
    let workshop = Workshop::open(source)?;
    let contents = series.applied(&workshop.pristine)?;
    let objects = workshop.objects(variant.name())?;
    prefix_builds(&workshop, &objects, &contents, &fragment, &folders(series))?;
    stamp.set()
}

/// Remembers that a check has passed, for as long as nothing that it depends on changes.
#[derive(Debug)]
pub(super) struct Stamp {
    path: PathBuf,
}

impl Stamp {
    pub(super) fn new(parts: &[&str]) -> Result<Self> {
        let dir = paths::cache()?.join("checked");
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(Self {
            path: dir.join(key(parts)),
        })
    }

    pub(super) fn is_set(&self) -> bool {
        self.path.exists()
    }

    pub(super) fn set(&self) -> Result<()> {
        fs::write(&self.path, "").with_context(|| format!("writing {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_those_of_objects_and_where_the_work_is() {
        let text = "diff --git a/lib/x.c b/lib/x.c\ndiff --git a/include/linux/y.h b/include/linux/y.h\n\
                    diff --git a/tools/testing/z.c b/tools/testing/z.c\n";
        let series = Series {
            patches: vec![Patch {
                name: "1.patch".into(),
                text: text.into(),
            }],
        };
        let all: Vec<String> = folders(&series).into_iter().collect();
        assert_eq!(all, ["drivers/virtio", "lib", "mm"]);
    }
}
