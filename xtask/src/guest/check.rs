//! `cargo xtask guest check`: what every prefix of the series promises.
//!
//! | Check | Of | Cached |
//! | --- | --- | --- |
//! | applies, no line around a change differing | every prefix, on each source | – (it takes no time) |
//! | `scripts/checkpatch.pl` finds nothing | every patch | by the patch |
//! | builds without a warning, options on, off and mixed | every prefix: objects of the series | by the prefix |
//! | builds whole | the series | by the series |
//! | links and boots | every prefix with the options on, with `--boot`: see `boot.rs` | by the prefix |

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
const CHECK_VERSION: &str = "2";

/// Built besides what a series touches: they use what it changes in headers.
const OBJECTS: [&str; 3] = ["mm/compaction.o", "mm/page_isolation.o", "mm/sparse.o"];
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
            for variant in Variant::ALL {
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

/// The series' own options: all on, all off, or on where much of what they work with is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Variant {
    On,
    Off,
    Mixed,
}

/// Options of the stock kernel that the series can do without.
const MIXED: &str = "CONFIG_NUMA=n\nCONFIG_MEMORY_HOTPLUG=n\nCONFIG_VM_EVENT_COUNTERS=n\n\
                     CONFIG_DEBUG_FS=n\n";

impl Variant {
    const ALL: [Self; 3] = [Self::On, Self::Off, Self::Mixed];

    /// Names its tree of objects, too.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
            Self::Mixed => "mixed",
        }
    }

    pub(super) fn fragment(self) -> Result<String> {
        let with = kernel::patched_fragment()?;
        Ok(match self {
            Self::On => with,
            // The last word counts.
            Self::Mixed => format!("{with}\n{MIXED}"),
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
    let mut bad = false;
    for index in missing {
        let name = format!(
            "{index}/{count} {} builds, options {}",
            series.patches[index - 1].name,
            variant.name()
        );
        let result = prefix_builds(&workshop, &objects, &prefixes[index], variant);
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
    variant: Variant,
) -> Result<()> {
    workshop.put(contents)?;
    objects.configure(&variant.fragment()?, Kconfig::KnownOnly)?;
    let is_new = |file: &str| !workshop.pristine.join(file).exists();
    let targets = targets(contents, variant, is_new);
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    let warnings = objects.build("Prefix", &targets, None)?;
    ensure!(
        warnings.is_empty(),
        "the build warns:\n  {}",
        warnings.join("\n  ")
    );
    Ok(())
}

/// Objects of the files that patches have changed. New ones are the options' own; those of
/// unit tests are built by `cargo xtask guest kunit`.
fn targets(
    contents: &Contents,
    variant: Variant,
    is_new: impl Fn(&str) -> bool,
) -> BTreeSet<String> {
    let mut targets: BTreeSet<String> = contents
        .iter()
        .filter(|(_, bytes)| bytes.is_some())
        .filter_map(|(file, _)| Some((file, file.strip_suffix(".c")?)))
        .filter(|(_, stem)| {
            let top = stem.split('/').next().unwrap_or(stem);
            !NOT_BUILT.contains(&top) && !stem.ends_with("_kunit")
        })
        .filter(|(file, _)| variant != Variant::Off || !is_new(file))
        .map(|(_, stem)| format!("{stem}.o"))
        .collect();
    targets.extend(OBJECTS.map(str::to_string));
    targets
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
    let series = &series.for_source(&newest)?;
    if !every_prefix_applies(series, &newest, report)? || no_build {
        return Ok(());
    }
    for variant in Variant::ALL {
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
    prefix_builds(&workshop, &objects, &contents, variant)?;
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
    fn targets_are_what_the_options_build() {
        let bytes = Some(Vec::new());
        let files = [
            "lib/x.c",
            "mm/new.c",
            "mm/new_kunit.c",
            "mm/y.h",
            "tools/z.c",
        ];
        let mut contents: Contents = files.map(|file| (file.to_string(), bytes.clone())).into();
        contents.insert("mm/later.c".into(), None);
        let of = |variant| {
            let mut all = targets(&contents, variant, |file| file == "mm/new.c");
            all.retain(|target| !OBJECTS.contains(&target.as_str()));
            Vec::from_iter(all)
        };
        assert_eq!(of(Variant::On), ["lib/x.o", "mm/new.o"]);
        assert_eq!(of(Variant::Off), ["lib/x.o"]);
    }
}
