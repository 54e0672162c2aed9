//! Running a list of tests one after another and counting how they end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::Result;

/// How a test ended when it did not fail.
#[derive(Debug)]
pub enum Outcome {
    /// Everything held.
    Passed,
    /// It could not be run here, and why.
    Skipped(String),
}

/// One test.
#[derive(Debug, Clone, Copy)]
pub struct Test {
    /// `subject_condition_outcome`.
    pub name: &'static str,
    /// The test itself.
    pub run: fn() -> Result<Outcome>,
}

/// Makes a [`Test`] of a function, named after it.
#[macro_export]
macro_rules! tests {
    ($($function:path),* $(,)?) => {
        vec![$($crate::outcome::Test { name: stringify!($function), run: $function }),*]
    };
}

/// Runs the tests whose name contains one of `filters` (all when there is
/// none), prints one line each and a closing line. True when none failed.
pub fn run(tests: &[Test], filters: &[String]) -> bool {
    let chosen = tests.iter().filter(|test| {
        filters.is_empty()
            || filters
                .iter()
                .any(|filter| test.name.contains(filter.as_str()))
    });
    let (mut passed, mut failed, mut skipped) = (0u32, 0u32, 0u32);
    for test in chosen {
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(test.run));
        let seconds = start.elapsed().as_secs_f32();
        match result {
            Ok(Ok(Outcome::Passed)) => {
                passed += 1;
                println!("PASS [{seconds:7.2}s] {}", test.name);
            }
            Ok(Ok(Outcome::Skipped(why))) => {
                skipped += 1;
                println!("SKIP [{seconds:7.2}s] {}: {why}", test.name);
            }
            Ok(Err(error)) => {
                failed += 1;
                println!("FAIL [{seconds:7.2}s] {}: {error:#}", test.name);
            }
            Err(_) => {
                failed += 1;
                println!("FAIL [{seconds:7.2}s] {}: panicked", test.name);
            }
        }
    }
    if passed + failed + skipped == 0 {
        println!("no test matches {filters:?}");
        failed = 1;
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    failed == 0
}
