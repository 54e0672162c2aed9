//! `cargo xtask ci`: everything that a change must pass, cheapest first.
//!
//! Every step runs even when an earlier one has failed, so that one run tells all there is to
//! repair; only what cannot work without an earlier step is left out and shown as such. The
//! closing line sums up the tests of all steps; a failed step without tests of its own counts
//! as one failed test.

mod count;
mod step;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use count::Counts;
use step::{Kind, STEPS, Step};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run only the steps whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Leave out what needs Linux guests (minutes)
    #[arg(long)]
    quick: bool,
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
    let mut results: Vec<Record> = Vec::new();
    for step in STEPS {
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
            run_one(step)
        });
    }
    let good = summary(&results);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_one(step: &'static Step) -> Record {
    println!("\n=== {} ===", step.name);
    let started = std::time::Instant::now();
    let (passed, counts) = match step.run() {
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
fn summary(results: &[Record]) -> bool {
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
    // The last line is read by machines: it stands alone.
    println!("\n{total}");
    good
}
