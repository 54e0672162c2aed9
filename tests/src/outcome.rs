//! Test programs: `libtest-mimic` selects, lists and runs the tests, a few at a time.
//!
//! The output format is our own. Each test prints one complete line with time and reason, which `cargo xtask` reads
//! while the others run. libtest instead completes a line after the test, and prints the reasons for failures after all
//! tests. If a host hangs, that output is lost.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::available_parallelism;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use libtest_mimic::{Completion, Failed, Trial};

use crate::shared;

/// Result of a test that did not fail.
#[derive(Debug)]
pub enum Outcome {
    /// The test passed.
    Passed,
    /// It could not run here, with the reason.
    Skipped(String),
}

/// One test.
#[expect(missing_debug_implementations, reason = "it is a function")]
pub struct Test {
    name: &'static str,
    /// Tests of one group share a guest; empty for a test that shares none.
    group: &'static str,
    run: Box<dyn Fn() -> Result<Outcome> + Send>,
}

impl Test {
    /// A test with a name of the form `subject_condition_outcome`.
    pub fn new(name: &'static str, run: impl Fn() -> Result<Outcome> + Send + 'static) -> Self {
        let run = Box::new(run);
        Self {
            name,
            group: "",
            run,
        }
    }
}

/// Marks tests that share a guest. `--list` shows the group, so that such tests can be given to the same host.
pub fn group<const N: usize>(group: &'static str, tests: [Vec<Test>; N]) -> Vec<Test> {
    let tests = tests.into_iter().flatten();
    tests.map(|test| Test { group, ..test }).collect()
}

/// Makes a [`Test`] of each function, named after it.
#[macro_export]
macro_rules! tests {
    ($($function:path),* $(,)?) => {
        vec![$($crate::outcome::Test::new(stringify!($function), $function)),*]
    };
}

/// The options of libtest, which also takes several filters.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    libtest: libtest_mimic::Arguments,
    /// Further filters; a test runs if its name contains any of them
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
}

/// Maximum number of concurrent tests: one per processor, because a guest's tests mostly wait, but not so many that
/// deadlines are missed.
const JOBS_MAX: usize = 4;

/// Runs the tests selected on the command line, a few at a time.
pub fn main(tests: Vec<Test>) -> ExitCode {
    main_with_jobs(tests, jobs_here(), is_host_emulated())
}

/// The same for tests whose guests QEMU emulates on this machine.
pub fn main_with_emulated_guests(tests: Vec<Test>) -> ExitCode {
    main_with_jobs(tests, jobs_here(), true)
}

fn jobs_here() -> usize {
    available_parallelism().map_or(1, usize::from).min(JOBS_MAX)
}

/// The same, one test after another.
pub fn main_in_order(tests: Vec<Test>) -> ExitCode {
    main_with_jobs(tests, 1, is_host_emulated())
}

fn main_with_jobs(tests: Vec<Test>, jobs: usize, emulated: bool) -> ExitCode {
    let mut options = Options::parse();
    options.libtest.test_threads.get_or_insert(jobs);
    if options.libtest.list {
        let listed = listed(&mut options, &tests);
        return libtest_mimic::run(&options.libtest, listed).exit_code();
    }
    let start = Instant::now();
    let Tally {
        passed,
        failed,
        skipped,
        retried,
    } = run(options, tests, emulated);
    shared::end_idle();
    println!("ran for {} s", start.elapsed().as_secs());
    // Machine-readable, so it is on a separate line.
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    println!("{retried} retried");
    // A filter that matches nothing is a mistake.
    if failed > 0 || passed + skipped == 0 {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// The chosen tests, to be printed as `[GROUP] NAME: test`, or without the group if there is none.
fn listed(options: &mut Options, tests: &[Test]) -> Vec<Trial> {
    let groups: BTreeMap<_, _> = tests.iter().map(|test| (test.name, test.group)).collect();
    let trials = tests.iter().map(|test| Trial::test(test.name, || Ok(())));
    // Filters apply to names, so groups are added afterwards.
    let chosen = chosen(options, trials).into_iter();
    chosen
        .map(|trial| {
            let group = groups.get(trial.name()).copied();
            trial.with_kind(group.unwrap_or_default())
        })
        .collect()
}

/// Number of tests by result.
#[derive(Debug, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
    retried: u64,
}

fn run(mut options: Options, tests: Vec<Test>, second_try: bool) -> Tally {
    let retried = Arc::<AtomicU64>::default();
    let trials = tests
        .into_iter()
        .map(|test| trial(test, second_try, Arc::clone(&retried)));
    let trials = chosen(&mut options, trials);
    // Its lines would be mixed with ours.
    options.libtest.logfile = Some("/dev/null".to_owned());
    let ended = libtest_mimic::run(&options.libtest, trials);
    Tally {
        passed: ended.num_passed,
        failed: ended.num_failed,
        skipped: ended.num_ignored,
        retried: retried.load(Ordering::Relaxed),
    }
}

/// The trials that match one of the filters; `libtest-mimic` itself supports only one filter.
fn chosen(options: &mut Options, trials: impl Iterator<Item = Trial>) -> Vec<Trial> {
    let libtest = &mut options.libtest;
    let Some(first) = libtest.filter.take() else {
        return trials.collect();
    };
    let by_filter: Vec<_> = std::iter::once(first)
        .chain(options.filters.drain(..))
        .map(|filter| libtest_mimic::Arguments {
            filter: Some(filter),
            ..libtest.clone()
        })
        .collect();
    trials
        .filter(|trial| by_filter.iter().any(|it| !it.is_filtered_out(trial)))
        .collect()
}

/// If the machine around it is busy, an emulated machine loses interrupts and is slower by orders of magnitude. A failed
/// test there is shown and retried once; a real bug fails twice.
fn is_host_emulated() -> bool {
    std::env::var("TESTBED").is_ok_and(|testbed| testbed == "emulated")
}

/// Runs the test, prints its line and returns the result to `libtest-mimic`.
fn trial(test: Test, second_try: bool, retried: Arc<AtomicU64>) -> Trial {
    let Test { name, run, .. } = test;
    Trial::ignorable_test(name, move || {
        let start = Instant::now();
        let attempt = || catch_unwind(AssertUnwindSafe(&run));
        let mut result = attempt();
        // A panic is a data mismatch or a bug of the test, and is never retried.
        if let Ok(Err(error)) = &result
            && second_try
        {
            println!("AGAIN           {name}: {error:#}");
            retried.fetch_add(1, Ordering::Relaxed);
            result = attempt();
        }
        let failed = Err(Failed::without_message());
        let (verdict, ended, why) = match result {
            Ok(Ok(Outcome::Passed)) => ("PASS", Ok(Completion::Completed), String::new()),
            Ok(Ok(Outcome::Skipped(why))) => {
                ("SKIP", Ok(Completion::ignored()), format!(": {why}"))
            }
            Ok(Err(error)) => ("FAIL", failed, format!(": {error:#}")),
            Err(_) => ("FAIL", failed, ": panicked".to_owned()),
        };
        let seconds = start.elapsed().as_secs_f32();
        println!("{verdict} [{seconds:7.2}s] {name}{why}");
        ended
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use anyhow::{bail, ensure};

    use super::*;

    fn passes() -> Result<Outcome> {
        Ok(Outcome::Passed)
    }

    fn skips() -> Result<Outcome> {
        Ok(Outcome::Skipped("nothing to do".to_owned()))
    }

    fn fails() -> Result<Outcome> {
        bail!("no answer")
    }

    fn panics() -> Result<Outcome> {
        panic!("wrong byte")
    }

    /// Fails until it has failed once.
    fn flaky() -> Test {
        let failed = AtomicBool::new(false);
        Test::new("flaky", move || {
            ensure!(failed.swap(true, Ordering::Relaxed), "late");
            Ok(Outcome::Passed)
        })
    }

    fn tally(second_try: bool, words: &[&str]) -> Tally {
        let mut tests = tests![passes, skips, fails, panics];
        tests.push(flaky());
        let words = ["program"].iter().chain(words);
        run(Options::parse_from(words), tests, second_try)
    }

    #[test]
    fn failure_but_no_panic_is_tried_twice_where_that_is_fair() {
        let fair = Tally {
            passed: 2,
            failed: 2,
            skipped: 1,
            retried: 2,
        };
        assert_eq!(tally(true, &[]), fair);
        let unfair = Tally {
            passed: 1,
            failed: 3,
            skipped: 1,
            retried: 0,
        };
        assert_eq!(tally(false, &["--test-threads", "1"]), unfair);
    }

    #[test]
    fn listed_tests_have_their_group_and_are_chosen_by_name() {
        let mut tests = tests![passes];
        tests.extend(group("passing", [tests![skips], tests![fails]]));
        let listed = |words: &[&str]| {
            let words = ["program"].iter().chain(words);
            let listed = listed(&mut Options::parse_from(words), &tests);
            let kinds = listed
                .iter()
                .map(|it| (it.kind().to_owned(), it.name().to_owned()));
            kinds.collect::<Vec<_>>()
        };
        let all = [("", "passes"), ("passing", "skips"), ("passing", "fails")];
        assert_eq!(
            listed(&[]),
            all.map(|(kind, name)| (kind.to_owned(), name.to_owned()))
        );
        assert_eq!(listed(&["pass"]), [(String::new(), "passes".to_owned())]);
    }

    #[test]
    fn filters_and_skips_choose_as_those_of_libtest_do() {
        let names = |words: &[&str]| {
            let words = ["program"].iter().chain(words);
            let mut options = Options::parse_from(words);
            let all = ["pass", "pass_more", "fail"].map(|name| Trial::test(name, || Ok(())));
            let chosen = chosen(&mut options, all.into_iter());
            let left = chosen
                .iter()
                .filter(|it| !options.libtest.is_filtered_out(it));
            left.map(|it| it.name().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names(&[]), ["pass", "pass_more", "fail"]);
        assert_eq!(names(&["pass"]), ["pass", "pass_more"]);
        assert_eq!(names(&["ai", "more"]), ["pass_more", "fail"]);
        assert_eq!(names(&["--exact", "pass", "fail"]), ["pass", "fail"]);
        assert_eq!(names(&["pass", "--skip", "more"]), ["pass"]);
        assert_eq!(names(&["none"]), [""; 0]);
    }
}
