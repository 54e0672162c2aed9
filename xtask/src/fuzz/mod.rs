//! `cargo xtask fuzz`: fuzzes the devices and parsers for a limited time.
//!
//! The project's own compiler suffices, because the flags by which LLVM reports code coverage to libFuzzer are stable.
//! Only sanitizers need nightly (see `fuzz/Cargo.toml`). The targets themselves check that memory around the guest's is
//! untouched, which finds most errors without sanitizers.
//!
//! A canary runs before each target: a false assertion about the same code, with the same committed inputs. If the
//! fuzzer does not refute it, the target reaches too little code, and a run without failures proves nothing.

mod build;
mod coverage;
mod seeds;
mod targets;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use crate::apt::{self, Need};
use crate::paths;
pub(crate) use build::remove_programs;
use build::{build, corpus};
use targets::{TARGETS, Target};

/// The flags of cargo-fuzz, except those that need nightly. Debug assertions are enabled, because they are checks as
/// well.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1 -Cdebug-assertions";
const CANARY: &str = "canary";
/// The message of the canary's assertion.
const CANARY_FOUND: &str = "canary: found";
/// Time limit for a canary, which is found within seconds.
const CANARY_SECONDS_MAX: u32 = 120;
/// Room for a whole migration; libFuzzer makes no longer inputs.
const INPUT_BYTES_MAX: u32 = 8192;
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
    /// Print the coverage of the inputs that are there, without fuzzing
    #[arg(long, conflicts_with_all = ["no_run", "seed", "minimize"])]
    coverage: bool,
    /// Reduce the committed inputs and those of earlier runs to the fewest with the same coverage, to be committed
    #[arg(long, conflicts_with_all = ["no_run", "seed"])]
    minimize: bool,
    /// Only targets whose name contains this
    target: Option<String>,
}

/// Fuzzes and returns the status the program ends with.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    apt::ensure(&[Need {
        package: "g++",
        why: "libFuzzer comes as source",
    }])?;
    let wanted = |target: &&Target| {
        let part = options.target.as_ref();
        part.is_none_or(|part| target.name.contains(part))
    };
    let targets: Vec<&Target> = TARGETS.iter().filter(wanted).collect();
    ensure!(!targets.is_empty(), "no target matches the given name");
    if options.coverage {
        coverage::print(&targets)?;
        return Ok(ExitCode::SUCCESS);
    }
    let started = Instant::now();
    let names = targets.iter().map(|target| target.name);
    let programs = build("fuzz", FLAGS, true, names.chain([CANARY]))?;
    println!("built in {:.1} s", started.elapsed().as_secs_f64());
    if options.no_run {
        return Ok(ExitCode::SUCCESS);
    }
    if options.minimize {
        for target in &targets {
            let folders = [seeds::unpack(target.name)?, corpus(target.name)?];
            seeds::minimize(&programs.join(target.name), target.name, &folders)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (mut passed, mut failed) = (0, 0);
    let mut count = |name: &str, good: bool| {
        println!("{} {name}", if good { "PASS" } else { "FAIL" });
        *(if good { &mut passed } else { &mut failed }) += 1;
    };
    let mut executions = 0;
    for target in &targets {
        let canary = format!("{CANARY} of {}", target.name);
        count(
            &canary,
            canary_is_found(&programs.join(CANARY), target.name)?,
        );
        let run = fuzz_target(&programs.join(target.name), target.name, options)?;
        println!("{} executions, {} edges", run.executions, run.edges);
        executions += run.executions;
        count(target.name, run.good);
    }
    println!("{executions} executions in all");
    println!("{passed} passed, {failed} failed, 0 skipped");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Whether the false assertion was refuted, from the committed inputs and for the right reason.
fn canary_is_found(program: &Path, target: &str) -> Result<bool> {
    let mut command = Command::new(program);
    command
        .env("CANARY", target)
        .arg(format!("-max_total_time={CANARY_SECONDS_MAX}"))
        .arg(seeds::unpack(target)?);
    let run = fuzz(&mut command, CANARY)?;
    Ok(run.has_canary && !run.good)
}

/// Fuzzes a target from the committed inputs and, unless there is a seed, those of earlier runs.
fn fuzz_target(program: &Path, name: &str, options: &Options) -> Result<Run> {
    let mut command = Command::new(program);
    command.arg(format!("-max_total_time={}", options.seconds));
    let seeds = seeds::unpack(name)?;
    match options.seed {
        // New inputs go where the committed ones were unpacked, and are lost with the next run.
        Some(seed) => command.arg(format!("-seed={seed}")),
        None => command.arg(corpus(name)?),
    };
    fuzz(command.arg(seeds), name)
}

/// The result of a run.
#[derive(Debug, Default)]
struct Run {
    /// No assertion failed.
    good: bool,
    /// The canary's assertion failed.
    has_canary: bool,
    executions: u64,
    /// Edges covered, of the code of our crates and of their dependencies.
    edges: u64,
}

impl Run {
    /// Takes the figures from a line of libFuzzer; returns whether the line is only progress.
    fn read(&mut self, line: &str) -> bool {
        self.has_canary |= line.contains(CANARY_FOUND);
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("stat::number_of_executed_units:") => {
                let figure = words.next().and_then(|word| word.parse().ok());
                self.executions = figure.unwrap_or_default();
                false
            }
            Some(first) if first.starts_with('#') => {
                let mut words = words.skip_while(|word| *word != "cov:").skip(1);
                let figure = words.next().and_then(|word| word.parse().ok());
                self.edges = figure.unwrap_or(self.edges);
                true
            }
            _ => false,
        }
    }
}

/// Runs libFuzzer and shows its output without the progress.
fn fuzz(command: &mut Command, name: &str) -> Result<Run> {
    let artifacts = paths::target().join("fuzz").join(format!("{name}-"));
    let mut child = command
        .arg(format!("-max_len={INPUT_BYTES_MAX}"))
        .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
        .arg(format!("-artifact_prefix={}", artifacts.display()))
        .args(["-print_final_stats=1", "-print_funcs=0"])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {command:?}"))?;
    let output = child
        .stderr
        .take()
        .context("the fuzzer's output is piped")?;
    let mut run = Run::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("reading the output of the fuzzer")?;
        let line = String::from_utf8_lossy(&line);
        if !run.read(&line) {
            println!("{line}");
        }
    }
    let status = child.wait().context("waiting for the fuzzer")?;
    run.good = status.success();
    Ok(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_the_fuzzers_output() {
        let mut run = Run::default();
        for (line, is_progress) in [
            (
                "INFO: seed corpus: files: 3 min: 1b max: 9b total: 12b rss: 40Mb",
                false,
            ),
            (
                "#4\tINITED cov: 301 ft: 412 corp: 3/12b exec/s: 0 rss: 41Mb",
                true,
            ),
            (
                "#912\tNEW    cov: 355 ft: 500 corp: 4/20b lim: 9 exec/s: 0",
                true,
            ),
            ("#2048\tpulse  corp: 4/20b", true),
            ("stat::number_of_executed_units: 20480", false),
            ("stat::average_exec_per_sec:     1000", false),
        ] {
            assert_eq!(run.read(line), is_progress, "{line}");
        }
        assert_eq!((run.executions, run.edges), (20480, 355));
        assert!(!run.has_canary);
        run.read("canary: found, as it must be");
        assert!(run.has_canary);
    }
}
