//! `cargo xtask ci`: everything that a change must pass, cheapest first.
//!
//! Every step runs even when an earlier one has failed, so that one run tells all there is to
//! repair; only what cannot work without an earlier step is left out and shown as such. The
//! closing line sums up the tests of all steps; a failed step without tests of its own counts
//! as one failed test. In front of it stand the time of each step, the slowest tests, what came from
//! caches, and which tests were skipped or tried twice, and why.

mod count;
mod since;
mod step;
mod tests_seen;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use count::Counts;
use step::{Kind, STEPS, Step};
use tests_seen::TestsSeen;

use crate::{cargo, paths};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run only the steps whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Leave out what needs Linux guests (minutes)
    #[arg(long)]
    quick: bool,
    /// Run only the steps that a change since this commit can affect, uncommitted changes included
    #[arg(long, value_name = "COMMIT")]
    since: Option<String>,
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    /// An earlier step that it needs has failed.
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
    if steps.is_empty() {
        println!("nothing that a step depends on has changed");
        println!("\n{}", Counts::default());
        return Ok(ExitCode::SUCCESS);
    }
    let mut seen = TestsSeen::default();
    for line in compiled_before() {
        println!("{line}");
        seen.read(&line);
    }
    let mut results: Vec<Record> = Vec::new();
    for step in steps {
        let named = options
            .only
            .as_ref()
            .is_none_or(|name| step.name.contains(name));
        if !named || (options.quick && step.kind == Kind::Guests) {
            continue;
        }
        let blocked = step.needs.iter().any(|need| {
            results
                .iter()
                .any(|done| done.step.name == *need && done.verdict != Verdict::Passed)
        });
        results.push(if blocked {
            Record {
                step,
                verdict: Verdict::LeftOut,
                took: Duration::ZERO,
                counts: Counts::default(),
            }
        } else {
            run_one(step, &mut seen)
        });
    }
    let good = summary(&results, seen);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What cargo finds compiled already.
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

fn run_one(step: &'static Step, seen: &mut TestsSeen) -> Record {
    println!("\n=== {} ===", step.name);
    let started = std::time::Instant::now();
    let (passed, counts) = match step.run(seen) {
        Ok(outcome) => outcome,
        Err(error) => {
            println!("error: {error:#}");
            (false, Counts::default())
        }
    };
    let took = started.elapsed();
    let verdict = if passed {
        Verdict::Passed
    } else {
        Verdict::Failed
    };
    println!(
        "=== {}: {verdict:?} in {:.1} s ===",
        step.name,
        took.as_secs_f64()
    );
    Record {
        step,
        verdict,
        took,
        counts,
    }
}

/// Prints the table and the closing line; true if nothing failed.
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
    // The last line is read by machines: it stands alone.
    println!("\n{total}");
    good
}
