//! `cargo xtask ci`: runs all checks for a change, cheapest first. Steps that keep one processor busy run two at a
//! time; each of their lines begins with the step's name.
//!
//! Every step runs even if an earlier one has failed, so that one run shows everything to repair. A step is skipped,
//! and shown as skipped, only if it depends on a failed one. The summary line adds up the tests of all steps; a failed
//! step without tests counts as one failed test. The lines before it list the time of each step, the slowest tests,
//! cache hits, and skipped or retried tests with reasons.

mod count;
mod part;
mod since;
mod step;
mod tests_seen;

use std::collections::VecDeque;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use parking_lot::Mutex;

use count::Counts;
use step::{Ended, FUZZ, Kind, STEPS, Step, runs_beside};
use tests_seen::TestsSeen;

use crate::fuzz::remove_programs;
use crate::progress::note;
use crate::{cargo, disk, paths};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run only the steps whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Skip steps that need Linux guests
    #[arg(long)]
    quick: bool,
    /// Run only the steps that a change since this commit can affect, uncommitted changes included
    #[arg(long, value_name = "COMMIT")]
    since: Option<String>,
    /// Print the names of the selected steps instead of running them
    #[arg(long)]
    list: bool,
}

/// Size of a target folder after all steps, as measured, rounded up.
const TARGET_BYTES: u64 = 6 << 30;
/// What incremental compilation adds to it.
const INCREMENTAL_BYTES: u64 = 6 << 30;

/// What the steps after `fuzz` write, as measured, rounded up.
const LATER_BYTES: u64 = 3 << 30;

/// The result of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    /// A step on which this one depends has failed.
    LeftOut,
}

#[derive(Debug)]
struct Record {
    step: &'static Step,
    verdict: Verdict,
    took: Duration,
    counts: Counts,
}

/// Runs the steps and returns the status the program ends with.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let steps = match &options.since {
        Some(commit) => since::steps(commit)?,
        None => STEPS.iter().collect(),
    };
    let nothing_changed = steps.is_empty();
    let chosen: Vec<&'static Step> = steps
        .into_iter()
        .filter(|step| {
            let named = options.only.as_ref();
            named.is_none_or(|name| step.name.contains(name))
                && !(options.quick && step.kind == Kind::Guests)
        })
        .collect();
    if options.list {
        for step in &chosen {
            println!("{}", step.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    if nothing_changed {
        println!("nothing that a step depends on has changed");
        println!("\n{}", Counts::default());
        return Ok(ExitCode::SUCCESS);
    }
    let bytes = target_bytes(std::env::var("CARGO_INCREMENTAL").ok().as_deref());
    disk::require_in_all(&paths::target(), bytes, "building everything")?;
    let mut seen = TestsSeen::default();
    for line in compiled_before() {
        println!("{line}");
        seen.read(&line);
    }
    let mut results: Vec<Record> = Vec::new();
    for group in chosen.chunk_by(|one, next| runs_beside(one, next)) {
        run_group(group, &mut results, &mut seen);
        if group.iter().any(|step| step.name == FUZZ) {
            make_room()?;
        }
    }
    let good = summary(&results, seen);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Size of a target folder after all steps, with this value of `CARGO_INCREMENTAL`.
fn target_bytes(incremental: Option<&str>) -> u64 {
    match incremental {
        Some("0") => TARGET_BYTES,
        _ => TARGET_BYTES + INCREMENTAL_BYTES,
    }
}

/// Removes the largest files that no later step needs, if the later steps may lack the space.
fn make_room() -> Result<()> {
    if disk::free_bytes(&paths::target())? < LATER_BYTES {
        note("Removing the fuzz programs, because later steps need the space");
        remove_programs()?;
    }
    Ok(())
}

/// Number of concurrent steps, where steps may run concurrently.
const LANES: usize = 2;

/// Runs independent steps, two at a time.
fn run_group(group: &[&'static Step], results: &mut Vec<Record>, seen: &mut TestsSeen) {
    let (blocked, free): (Vec<&'static Step>, Vec<_>) =
        group.iter().partition(|step| is_blocked(step, results));
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let lanes = free.len().min(LANES).min(processors);
    let waiting = Mutex::new(VecDeque::from(free));
    let ended = Mutex::new(Vec::new());
    // The lock is not held while a step runs.
    let next = || waiting.lock().pop_front();
    thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(|| {
                while let Some(step) = next() {
                    let one = run_one(step, lanes > 1);
                    ended.lock().push((step, one));
                }
            });
        }
    });
    let mut ended = ended.into_inner();
    ended.sort_by_key(|(step, _)| group.iter().position(|other| other.name == step.name));
    for (step, one) in ended {
        seen.add(one.seen);
        results.push(Record {
            step,
            verdict: if one.passed {
                Verdict::Passed
            } else {
                Verdict::Failed
            },
            took: one.took,
            counts: one.counts,
        });
    }
    results.extend(blocked.into_iter().map(|step| Record {
        step,
        verdict: Verdict::LeftOut,
        took: Duration::ZERO,
        counts: Counts::default(),
    }));
}

/// Whether a step that this one needs has not passed.
fn is_blocked(step: &Step, results: &[Record]) -> bool {
    step.needs.iter().any(|need| {
        results
            .iter()
            .any(|done| done.step.name == *need && done.verdict != Verdict::Passed)
    })
}

/// The packages that are compiled already.
fn compiled_before() -> Vec<String> {
    ["dev", "release"]
        .into_iter()
        .filter_map(|profile| {
            let folder = cargo::folder(profile).join("deps");
            let count = std::fs::read_dir(&folder).ok()?.count();
            Some(format!(
                "cache: cargo, profile {profile}: {count} files in {}",
                folder.display()
            ))
        })
        .collect()
}

fn run_one(step: &Step, has_neighbours: bool) -> Ended {
    println!("\n=== {} ===", step.name);
    let ended = step.run(|line| {
        if has_neighbours {
            println!("{}: {line}", step.name);
        } else {
            println!("{line}");
        }
    });
    println!(
        "=== {}: {} in {:.1} s ===",
        step.name,
        if ended.passed { "passed" } else { "FAILED" },
        ended.took.as_secs_f64()
    );
    ended
}

/// Prints the table and the summary line; true if nothing failed.
fn summary(results: &[Record], seen: TestsSeen) -> bool {
    println!("\n{:<14} {:<8} {:>8}  tests", "step", "result", "seconds");
    let mut total = Counts::default();
    for result in results {
        let verdict = match result.verdict {
            Verdict::Passed => "passed",
            Verdict::Failed => "FAILED",
            Verdict::LeftOut => "left out",
        };
        let seconds = result.took.as_secs_f64();
        let tests = match result.counts {
            none if none == Counts::default() => String::from("-"),
            counts => counts.to_string(),
        };
        println!(
            "{:<14} {verdict:<8} {seconds:>8.1}  {tests}",
            result.step.name
        );
        total += result.counts;
        total.failed += u64::from(result.verdict == Verdict::Failed && result.counts.failed == 0);
    }
    let good = !results.is_empty() && results.iter().all(|r| r.verdict == Verdict::Passed);
    print!("{}", seen.summary(paths::workspace()));
    // The last line is machine-readable, so it stands alone.
    println!("\n{total}");
    good
}
