//! `cargo xtask guest check`: checks every prefix of the series.
//!
//! | Check | Of | Cached |
//! | --- | --- | --- |
//! | applies with exact context | every prefix, on each source | – (it takes no time) |
//! | `scripts/checkpatch.pl` finds nothing | every patch | by the patch |
//! | links without a warning and boots, small, options on, off and mixed | every prefix: see `prefixes.rs` | by the prefix |
//! | builds with the configuration of the test kernels | the series | by the series |
//! | applies to the base source | the rival in `guest-patches/rival`; patches 5xx alone | – |

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail};

use super::cache::Lock;
use super::kernel::Kernel;
use super::newest;
use super::prefixes::{Honoured, Prefixes};
use super::report::Report;
use super::series::{Patch, Series};
use super::source::Source;
use super::stamp::Stamp;
use super::variant::Variant;
use crate::apt::{self, Need};
use crate::paths;

const PERL: Need = Need {
    package: "perl",
    why: "runs the kernel's checkpatch",
};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Check only that the series applies to the base source, passes checkpatch and builds as a whole
    #[arg(long)]
    quick: bool,
    /// Check only that the series applies to the base and the newest source, and passes checkpatch
    #[arg(long, conflicts_with = "quick")]
    no_build: bool,
    /// Check only on the newest source that Debian has
    #[arg(long, conflicts_with = "quick")]
    newest: bool,
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
    if !options.newest {
        on_base(options, &series, &base, &mut report)?;
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

/// All checks, on the source of the test kernels.
fn on_base(options: &Options, series: &Series, base: &Source, report: &mut Report) -> Result<()> {
    let applies = every_prefix_applies(series, base, report)?;
    checkpatch(series, base, report)?;
    measured_series_apply(base, report)?;
    if applies && !options.no_build {
        if !options.quick {
            let prefixes = Prefixes::new(series, base, Honoured::All)?;
            for &variant in Variant::ALL {
                prefixes.check(variant, 1..=series.patches.len(), report)?;
            }
        }
        report.check("the whole series builds", whole_series_builds());
    }
    Ok(())
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

/// These are built for measurements only, so that nothing else would notice.
fn measured_series_apply(source: &Source, report: &mut Report) -> Result<()> {
    let tree = pristine(source)?;
    for (name, series) in [
        ("the rival applies", Series::rival()),
        ("patches 5xx apply alone", Series::inflation()),
    ] {
        let applied = series.and_then(|series| series.prefixes(&tree).map(drop));
        report.check(format!("{name} to {}", source.name), applied);
    }
    Ok(())
}

/// Runs the kernel's own script, one patch at a time.
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
    Kernel::patched()?.build(&paths::guest().join("patched"))
}

/// The newest kernel that Debian packages: every prefix with the options on, the whole series in
/// all variants.
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
    let count = series.patches.len();
    let prefixes = Prefixes::new(series, &newest, Honoured::Ours)?;
    for &variant in Variant::ALL {
        // The most important checks first; the others find faults of single patches.
        prefixes.check(variant, count..=count, report)?;
    }
    prefixes.check(Variant::On, 1..=count, report)
}
