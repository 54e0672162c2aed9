//! `cargo xtask guest kunit`: runs the unit tests of the series in a separate kernel, under emulation. The kernel
//! prints their results on its console in the KTAP format (Documentation/dev-tools/ktap.rst).

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::complaints::complaints;
use super::emulator::Machine;
use super::kernel::Kernel;
use crate::paths;

/// Time from power-on to power-off, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(900);
/// Lines of the console shown when the kernel ends before its tests.
const QUOTED_LINES: usize = 40;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run only suites whose names match (as kunit.filter_glob)
    #[arg(value_name = "GLOB")]
    filter: Option<String>,
    /// Show the kernel's complete output
    #[arg(long)]
    verbose: bool,
}

/// Builds the kernel, runs the tests and shows their results.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let dir = paths::guest().join("patched");
    Kernel::patched()?.build(&dir)?;
    let mut command_line = String::from(
        "console=ttyS0 panic=-1 no_timer_check kunit.enable=1 kunit_shutdown=poweroff",
    );
    if let Some(filter) = &options.filter {
        command_line.push_str(&format!(" kunit.filter_glob={filter}"));
    }
    let verbose = options.verbose;
    let ended = Machine {
        kernel: &dir.join("vmlinux"),
        initramfs: None,
        command_line: &command_line,
        cpus: 2,
        arguments: &["-m", "1G"],
        deadline: DEADLINE,
    }
    .run(move |line| {
        if verbose || is_result(line) {
            println!("{line}");
        }
    })?;
    let results = Results::read(&ended.console);
    for case in &results.failed {
        println!("FAIL  {case}");
    }
    let complaints = complaints(&ended.console);
    for line in &complaints {
        println!("FAIL  the kernel logged a warning or error: {line}");
    }
    let complete = ended.status.is_some() && Some(results.suites_ended) == results.suites_planned;
    if !complete {
        let lines: Vec<&str> = ended.console.lines().collect();
        for line in &lines[lines.len().saturating_sub(QUOTED_LINES)..] {
            eprintln!("  | {line}");
        }
    }
    // Machine-readable, so it is on a separate line.
    println!(
        "{} passed, {} failed, {} skipped",
        results.passed,
        results.failed.len() + complaints.len(),
        results.skipped
    );
    ensure!(
        complete,
        "the kernel ended after {} of {} suites",
        results.suites_ended,
        results.suites_planned.map_or("?".into(), |n| n.to_string())
    );
    ensure!(results.passed > 0, "no test has run");
    Ok(if results.failed.is_empty() && complaints.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The line without the kernel's time stamp, which may be missing; blanks count.
fn bare(line: &str) -> &str {
    match line
        .strip_prefix('[')
        .and_then(|rest| rest.split_once("] "))
    {
        Some((time, rest)) if time.trim().parse::<f64>().is_ok() => rest,
        _ => line,
    }
}

fn is_result(line: &str) -> bool {
    let line = bare(line).trim_start();
    line.starts_with("ok ") || line.starts_with("not ok ")
}

/// Results of tests from the console.
#[derive(Debug, Default, PartialEq, Eq)]
struct Results {
    passed: usize,
    skipped: usize,
    /// Names, with their suites.
    failed: Vec<String>,
    suites_planned: Option<u64>,
    suites_ended: u64,
}

impl Results {
    /// Parses KTAP: a result belongs to a test if no deeper results precede it; otherwise it summarises those. Each
    /// level is indented by four blanks.
    fn read(console: &str) -> Self {
        let mut results = Self::default();
        let mut suites: Vec<(usize, String)> = Vec::new();
        let mut deepest = 0;
        for line in console.lines().map(bare) {
            let text = line.trim_start();
            let indent = line.len() - text.len();
            if let Some(name) = text.strip_prefix("# Subtest: ") {
                suites.retain(|(depth, _)| *depth < indent);
                suites.push((indent, name.to_string()));
            } else if let Some(count) = text.strip_prefix("1..")
                && indent == 0
            {
                results.suites_planned = count.trim().parse().ok();
            } else if let Some((good, name)) = result(text) {
                results.suites_ended += u64::from(indent == 0);
                if indent >= deepest {
                    let path: Vec<&str> = suites
                        .iter()
                        .filter(|(depth, _)| *depth <= indent)
                        .map(|(_, suite)| suite.as_str())
                        .chain([name])
                        .collect();
                    results.add(good, name, path.join("."));
                }
                deepest = indent;
            }
        }
        results
    }

    fn add(&mut self, good: bool, name: &str, path: String) {
        if name.contains("# SKIP") {
            self.skipped += 1;
        } else if good {
            self.passed += 1;
        } else {
            self.failed.push(path);
        }
    }
}

/// `ok 3 name` or `not ok 3 - name`.
fn result(text: &str) -> Option<(bool, &str)> {
    let (good, rest) = match text.strip_prefix("not ") {
        Some(rest) => (false, rest),
        None => (true, text),
    };
    let (number, name) = rest.strip_prefix("ok ")?.split_once(' ')?;
    number.parse::<u64>().ok()?;
    Some((good, name.trim_start_matches("- ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "[    0.500000] Linux version 6.12\n\
        [    0.700000] KTAP version 1\n\
        [    0.700001] 1..2\n\
        [    0.700002]     KTAP version 1\n\
        [    0.700003]     # Subtest: index\n\
        [    0.700004]     1..3\n\
        [    0.700005]     ok 1 marks\n\
        [    0.700006]     # forgets: EXPECTATION FAILED at mm/x.c:3\n\
        [    0.700007]     not ok 2 forgets\n\
        [    0.700008]     ok 3 sparse # SKIP no hole\n\
        [    0.700009] # index: pass:1 fail:1 skip:1 total:3\n\
        [    0.700010] not ok 1 index\n\
        KTAP version 1\n\
        \x20   # Subtest: worker\n\
        \x20   1..1\n\
        \x20       KTAP version 1\n\
        \x20       # Subtest: delays\n\
        \x20       ok 1 0 ms\n\
        \x20       ok 2 100 ms\n\
        \x20   ok 1 delays\n\
        ok 2 worker\n\
        [    0.900000] reboot: Power down\n";

    #[test]
    fn results_are_counted_by_test_and_not_by_suite() {
        assert_eq!(
            Results::read(CONSOLE),
            Results {
                passed: 3,
                skipped: 1,
                failed: vec!["index.forgets".into()],
                suites_planned: Some(2),
                suites_ended: 2,
            }
        );
    }

    #[test]
    fn results_of_a_kernel_that_ends_early_are_incomplete() {
        let cut = CONSOLE
            .split("KTAP version 1\n    # Subtest: worker")
            .next()
            .unwrap();
        let results = Results::read(cut);
        assert_eq!((results.suites_planned, results.suites_ended), (Some(2), 1));
    }
}
