//! `cargo xtask fuzz`: fuzzes the devices for a limited time.
//!
//! It works with the project's compiler: the flags by which LLVM reports code coverage to libFuzzer are stable; only
//! sanitizers need nightly (see `fuzz/Cargo.toml`). The targets themselves check that memory around the guest's is
//! untouched, which finds most errors without sanitizers.
//!
//! The canary runs first: a target with a false assertion. If the fuzzer does not refute it, it reaches no code, and
//! its silence about the other targets means nothing.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use crate::apt::{self, Need};
use crate::{cargo, paths};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// The flags of cargo-fuzz, except those that need nightly. Debug assertions are enabled, because they are checks as
/// well.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1 -Cdebug-assertions";
const TARGETS: &[&str] = &[
    "back_end",
    "balloon",
    "boot",
    "devices",
    "discard",
    "fleet",
    "http",
    "legacy",
    "options",
    "pci",
    "registers",
    "saved_state",
];
const CANARY: &str = "canary";
/// The message of the canary's assertion.
const CANARY_FOUND: &str = "canary: found";
/// Time limit for the canary, which is found within seconds on an idle machine.
const CANARY_SECONDS_MAX: u32 = 300;
/// Longer inputs are cut by the targets.
const INPUT_BYTES_MAX: u32 = 4096;
/// Timeout of one input: thousands are tried per second.
const INPUT_SECONDS_MAX: u32 = 60;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds for each target
    #[arg(long, default_value_t = 30)]
    seconds: u32,
    /// Try the same inputs each time: this seed, and no inputs of earlier runs
    #[arg(long)]
    seed: Option<u32>,
    /// Build the targets only
    #[arg(long)]
    no_run: bool,
    /// Only targets whose name contains this
    target: Option<String>,
}

/// Fuzzes and returns the status the program ends with.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    apt::ensure(&[Need {
        package: "g++",
        why: "libFuzzer comes as source",
    }])?;
    let started = Instant::now();
    let programs = build()?;
    println!("built in {:.1} s", started.elapsed().as_secs_f64());
    if options.no_run {
        return Ok(ExitCode::SUCCESS);
    }
    let wanted = |name: &str| {
        options
            .target
            .as_ref()
            .is_none_or(|part| name.contains(part))
    };
    let (mut passed, mut failed) = (0, 0);
    let mut count = |name: &str, good: bool| {
        println!("{} {name}", if good { "PASS" } else { "FAIL" });
        *(if good { &mut passed } else { &mut failed }) += 1;
    };
    if wanted(CANARY) {
        count(CANARY, canary_is_found(&programs.join(CANARY))?);
    }
    for name in TARGETS.iter().filter(|name| wanted(name)) {
        count(name, holds(&programs.join(name), name, options)?);
    }
    ensure!(passed + failed > 0, "no target matches the given names");
    println!("{passed} passed, {failed} failed, 0 skipped");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Builds all targets; returns their locations.
fn build() -> Result<PathBuf> {
    let target = paths::target().join("fuzz");
    let status = cargo::command(["build", "--release", "--target", TRIPLE])
        .arg("--manifest-path")
        .arg(paths::workspace().join("fuzz/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", FLAGS)
        .status()
        .context("starting cargo")?;
    ensure!(status.success(), "the fuzz targets do not build");
    Ok(target.join(TRIPLE).join("release"))
}

/// Whether the false assertion was refuted, from an empty corpus and for the right reason.
fn canary_is_found(program: &Path) -> Result<bool> {
    let mut found = false;
    let good = fuzz(program, CANARY, None, CANARY_SECONDS_MAX, |line| {
        found |= line.contains(CANARY_FOUND);
    })?;
    Ok(found && !good)
}

/// Fuzzes a target, unless there is a seed with the corpus of earlier runs; returns whether no assertion failed.
fn holds(program: &Path, name: &str, options: &Options) -> Result<bool> {
    let from = match options.seed {
        Some(seed) => format!("-seed={seed}"),
        None => {
            let corpus = paths::target().join("fuzz/corpus").join(name);
            fs::create_dir_all(&corpus).with_context(|| format!("making {}", corpus.display()))?;
            corpus.display().to_string()
        }
    };
    fuzz(program, name, Some(&from), options.seconds, |_| ())
}

/// Runs one program from a seed or corpus, shows its output, and passes each line to `look`; returns whether it
/// succeeded.
fn fuzz(
    program: &Path,
    name: &str,
    from: Option<&str>,
    seconds: u32,
    mut look: impl FnMut(&str),
) -> Result<bool> {
    let artifacts = paths::target().join("fuzz").join(format!("{name}-"));
    let mut child = Command::new(program)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={INPUT_BYTES_MAX}"))
        .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
        .arg(format!("-artifact_prefix={}", artifacts.display()))
        // One line per new input would be too much output.
        .args(["-print_final_stats=1", "-verbosity=0"])
        .args(from)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let output = child
        .stderr
        .take()
        .context("the fuzzer's output is piped")?;
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("reading the output of the fuzzer")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        look(&line);
    }
    let status = child.wait().context("waiting for the fuzzer")?;
    Ok(status.success())
}
