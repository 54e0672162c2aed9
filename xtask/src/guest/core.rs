//! `cargo xtask guest core`: tests the core of the patches in user space against a model.
//!
//! The series adds the core's files, so they can be extracted from the patches without a kernel source.
//! `guest-patches/userspace` has the rest. Builds of the first series alone and of all patches run random traces.
//! Builds with a planted bug must fail with the expected message.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};

use super::report::Report;
use super::series::{self, Scratch, Series};
use crate::apt::{self, Need};
use crate::paths;

/// Files of the core.
const FILES: [&str; 2] = ["mm/page_reporting_bitmap.c", "mm/page_reporting_bitmap.h"];

const TOOLS: &[Need] = &[
    Need {
        package: "gcc",
        why: "compiles the core of the patches with its test",
    },
    Need {
        package: "make",
        why: "builds the core of the patches with its test",
    },
    Need {
        package: "patch",
        why: "takes the core out of the patches",
    },
];

/// Proportions of section, largest block and pageblock: as on x86-64, and with blocks as
/// large as a section, as on arm64 with large pages.
const GEOMETRIES: [(&str, &str); 2] = [
    ("small blocks", ""),
    (
        "large blocks",
        "-DSECTION_ORDER=12 -DBLOCK_ORDER_MAX=12 -DPAGEBLOCK_ORDER=6",
    ),
];

/// What is built: its name, the chapters of the series in it, and whether the model must do without what the later
/// chapters add.
const SERIES: [(&str, &[char], &str); 2] = [
    ("first series", &['0', '1'], "ALONE=1"),
    (
        "all patches",
        &['0', '1', '2', '3', '4', '8', '9'],
        "ALONE=",
    ),
];

/// Planted bugs, and the model's possible messages for each. A free that is not recorded is lost, or the record of an
/// earlier one has the wrong age.
const BUGS: [(&str, &[&str]); 4] = [
    ("LOST", &["is lost", "was freed in pass"]),
    ("TWICE", &["is reported twice"]),
    ("IN_USE", &["is in use"]),
    ("ZONE", &["is read without its zone's lock"]),
];
/// Number of traces within which a planted bug must be found.
const BUG_TRACES: u64 = 5;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seed of the first trace [default: a new one each time; in the environment: SEED]
    #[arg(long)]
    seed: Option<u64>,
    /// Traces of each build
    #[arg(long, default_value_t = 4)]
    traces: u64,
    /// Steps of each trace
    #[arg(long, default_value_t = 2000)]
    steps: u64,
}

/// Runs the traces.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let series = Series::read()?;
    apt::ensure(TOOLS)?;
    let seed = match options.seed {
        Some(seed) => seed,
        None => seed_of_environment()?.unwrap_or_else(new_seed),
    };
    println!("seeds from {seed} (to repeat: cargo xtask guest core --seed {seed})");
    let mut report = Report::default();
    for (part, chapters, alone) in SERIES {
        let Some(core) = extract(&series, part, chapters)? else {
            report.skip(part, format!("it has no {}", FILES[0]));
            continue;
        };
        for (name, geometry) in GEOMETRIES {
            let name = format!("{part}, {name}");
            let program = build(&core, &[&format!("GEOMETRY={geometry}"), alone], &name)?;
            for seed in seed..seed + options.traces {
                report.check(
                    format!("core, {name}, seed {seed}"),
                    holds(&program, seed, options.steps),
                );
            }
        }
    }
    let (part, chapters, _) = SERIES[SERIES.len() - 1];
    if let Some(core) = extract(&series, part, chapters)? {
        for (bug, words) in BUGS {
            let program = build(&core, &[&format!("BUG=-DBUG_{bug}")], bug)?;
            report.check(
                format!("core with the planted bug {bug} is found out"),
                fails(&program, seed, options.steps, words),
            );
        }
    }
    Ok(if report.close() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn seed_of_environment() -> Result<Option<u64>> {
    let Some(text) = std::env::var_os("SEED") else {
        return Ok(None);
    };
    let seed = text.to_string_lossy().parse();
    Ok(Some(
        seed.with_context(|| format!("SEED={}", text.display()))?,
    ))
}

/// A seed that differs from run to run.
fn new_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(1, |since| since.as_millis() as u64 % 1_000_000)
}

/// Writes the core's files as these chapters of the series leave them; `None` if they have none.
fn extract(series: &Series, part: &str, chapters: &[char]) -> Result<Option<PathBuf>> {
    let scratch = Scratch::new()?;
    let patches = series.patches.iter();
    for patch in patches.filter(|patch| patch.name.starts_with(chapters)) {
        if let Some(part) = patch.part(|file| FILES.contains(&file)) {
            scratch.patch(&part)?;
        }
    }
    let dir = paths::guest().join("core").join(part.replace(' ', "-"));
    for file in FILES {
        let Some(contents) = super::source::file(scratch.dir(), file)? else {
            return Ok(None);
        };
        let path = dir.join(file);
        let folder = path.parent().context("a file is in a folder")?;
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        // make compares times.
        if fs::read(&path).ok().as_ref() != Some(&contents) {
            fs::write(&path, contents).with_context(|| format!("writing {}", path.display()))?;
        }
    }
    Ok(Some(dir.join("mm")))
}

fn build(core: &Path, variables: &[&str], name: &str) -> Result<PathBuf> {
    let name = name.replace(", ", "-").replace(' ', "-");
    let program = paths::guest().join("core").join(format!("trace-{name}"));
    let mut make = Command::new("make");
    make.args(["--silent", "-C"])
        .arg(series::folder().join("userspace"))
        .arg(format!("CORE={}", core.display()))
        .arg(format!("OUT={}", program.display()))
        .args(variables)
        .env_remove("MAKEFLAGS")
        .stdin(Stdio::null());
    let status = make.status().context("starting make")?;
    ensure!(status.success(), "the core does not build ({status})");
    Ok(program)
}

fn trace(program: &Path, seed: u64, steps: u64) -> Result<(bool, String)> {
    let output = Command::new(program)
        .args([seed.to_string(), steps.to_string()])
        // Traces end without freeing memory.
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", program.display()))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).trim().to_string();
    Ok((output.status.success(), text))
}

fn holds(program: &Path, seed: u64, steps: u64) -> Result<()> {
    let (good, text) = trace(program, seed, steps)?;
    ensure!(good, "{text}");
    println!("      {text}");
    Ok(())
}

fn fails(program: &Path, seed: u64, steps: u64, words: &[&str]) -> Result<()> {
    let mut said = String::new();
    for seed in seed..seed + BUG_TRACES {
        let (good, text) = trace(program, seed, steps)?;
        if !good && words.iter().any(|words| text.contains(words)) {
            return Ok(());
        }
        said = text;
    }
    bail!("no check detected the fault; the last output was {said:?}")
}
