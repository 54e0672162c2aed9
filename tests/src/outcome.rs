//! Running a list of tests, a few at a time, and counting how they end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::available_parallelism;
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

/// How many tests run at a time: one for each processor, since a guest's tests
/// are as much waiting as work, but not so many that their deadlines suffer.
const JOBS_MAX: usize = 4;

/// Runs the tests, prints one line each and a closing line. True when none failed.
pub fn run(tests: &[Test]) -> bool {
    let start = Instant::now();
    let tally = Tally::default();
    let queue = Mutex::new(tests.iter());
    // A binding of its own, for the lock is not to be held while a test runs.
    let next = || {
        let mut queue = queue.lock().expect("taking the next test does not panic");
        queue.next()
    };
    let jobs = available_parallelism().map_or(1, usize::from).min(JOBS_MAX);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(test) = next() {
                    tally.run(test);
                }
            });
        }
    });
    let [passed, failed, skipped] =
        [tally.passed, tally.failed, tally.skipped].map(AtomicU32::into_inner);
    let seconds = start.elapsed().as_secs();
    let retried = tally.retried.into_inner();
    if retried > 0 {
        println!("{retried} tests were tried a second time");
    }
    println!("ran for {seconds} s");
    // Read by machines, so it stands alone.
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    failed == 0
}

/// How many tests ended how.
#[derive(Debug, Default)]
struct Tally {
    passed: AtomicU32,
    failed: AtomicU32,
    skipped: AtomicU32,
    retried: AtomicU32,
}

/// An emulated host loses interrupts and takes seconds for what a processor does in
/// milliseconds when the machine around it is busy. A failure there is shown and tried once
/// more; a fault of ours fails twice.
fn is_second_try_fair() -> bool {
    std::env::var("TESTBED").is_ok_and(|testbed| testbed == "emulated")
}

impl Tally {
    fn run(&self, test: &Test) {
        let start = Instant::now();
        let mut result = catch_unwind(AssertUnwindSafe(test.run));
        if let Ok(Err(error)) = &result
            && is_second_try_fair()
        {
            println!("AGAIN           {}: {error:#}", test.name);
            self.retried.fetch_add(1, Ordering::Relaxed);
            result = catch_unwind(AssertUnwindSafe(test.run));
        }
        let seconds = start.elapsed().as_secs_f32();
        let (verdict, count, more) = match result {
            Ok(Ok(Outcome::Passed)) => ("PASS", &self.passed, String::new()),
            Ok(Ok(Outcome::Skipped(why))) => ("SKIP", &self.skipped, format!(": {why}")),
            Ok(Err(error)) => ("FAIL", &self.failed, format!(": {error:#}")),
            Err(_) => ("FAIL", &self.failed, ": panicked".to_owned()),
        };
        count.fetch_add(1, Ordering::Relaxed);
        println!("{verdict} [{seconds:7.2}s] {}{more}", test.name);
    }
}
