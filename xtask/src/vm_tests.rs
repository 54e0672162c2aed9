//! `cargo xtask vm-tests`: the tests with Linux guests, in the testbed.
//!
//! An emulated host has one processor, because it is not reliable with more. So the tests are
//! dealt out to several of them, which run side by side. Tests that share a guest stay together.
//!
//! It is another program's work and has been seen to stand still for good. The tests have
//! deadlines of their own, but nothing has one in a machine without a clock: when no test has
//! ended for a long time, the tests that are left go on in a new machine.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, PipeReader};
use std::iter::Sum;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::process::{self, Tie};
use crate::test_programs;
use crate::testbed::{self, KernelChoice};

/// A test that fails slowly: to boot and to answer have two minutes each, and some tests boot
/// twice.
const SILENCE_MAX: Duration = Duration::from_secs(480);
/// How many machines a lane may use up.
const MACHINES_MAX: u32 = 3;
/// How many emulated hosts run at a time, where this machine has a processor for each.
const LANES_MAX: usize = 4;
/// How the names of those tests begin that boot what a distribution has made.
const DISTRIBUTIONS: &str = "debian_";
/// What tests boot that name no kernel: the one of ours that is built for all tests.
const KERNEL: KernelChoice = KernelChoice::Mainline;
/// Memory of an emulated host: with less it has no page of 1 GiB to give.
const HOST_MEMORY: &str = "5G";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Build profile of the VMM under test
    #[arg(long, default_value = "release")]
    profile: String,
    /// Only tests whose name contains one of these
    filters: Vec<String>,
}

/// Runs the tests and returns the status the program ends with.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let program = test_programs::build("vm-tests")?;
    let tests = list(&program, &options.filters)?;
    if needs_distributions(tests.iter().map(|test| &test.name)) {
        // Once, before several testbeds look for it at the same time.
        testbed::prepare_distributions()?;
    }
    let lanes = if testbed::emulates(&options.profile, KERNEL)? {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        processors.min(LANES_MAX)
    } else {
        // A real host runs several tests at a time itself.
        1
    };
    let tally = thread::scope(|scope| {
        let running: Vec<_> = deal(&tests, lanes)
            .into_iter()
            .map(|share| scope.spawn(|| run_lane(&program, options, share)))
            .collect();
        running
            .into_iter()
            .map(|lane| lane.join().expect("a lane does not panic"))
            .sum::<Result<Tally>>()
    })?;
    // The last lines are read by machines: they stand alone.
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    println!("{} retried", tally.retried);
    Ok(if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn needs_distributions<'a>(names: impl IntoIterator<Item = &'a String>) -> bool {
    let mut names = names.into_iter();
    names.any(|name| name.starts_with(DISTRIBUTIONS))
}

/// Shares of the tests for `lanes` lanes. Tests of a group stay together. Other neighbours do not, because they take about
/// as long as each other.
fn deal(tests: &[Listed], lanes: usize) -> Vec<BTreeSet<String>> {
    let mut shares = vec![BTreeSet::new(); lanes];
    for unit in tests.chunk_by(|one, next| one.group.is_some() && one.group == next.group) {
        if let Some(least) = shares.iter_mut().min_by_key(|share| share.len()) {
            least.extend(unit.iter().map(|test| test.name.clone()));
        }
    }
    shares.retain(|share| !share.is_empty());
    shares
}

/// Runs a share of the tests, in a new machine when one stands still.
fn run_lane(program: &Path, options: &Options, mut left: BTreeSet<String>) -> Result<Tally> {
    let mut tally = Tally::default();
    for machine in 1..=MACHINES_MAX {
        let ended = run_in_one_machine(program, options, &mut left, &mut tally)?;
        if left.is_empty() || ended == Ended::ByItself {
            break;
        }
        println!(
            "the emulated host stood still; {} tests are left{}",
            left.len(),
            if machine < MACHINES_MAX {
                " and go on in a new one"
            } else {
                ""
            }
        );
    }
    for name in &left {
        println!("FAIL {name}: its machine ended before it did");
        tally.failed += 1;
    }
    Ok(tally)
}

/// How many tests ended how.
#[derive(Debug, Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
    /// Of those, tried a second time.
    retried: u64,
}

impl Tally {
    fn count(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Pass => self.passed += 1,
            Verdict::Fail => self.failed += 1,
            Verdict::Skip => self.skipped += 1,
        }
    }
}

impl Sum for Tally {
    fn sum<I: Iterator<Item = Self>>(tallies: I) -> Self {
        tallies.fold(Self::default(), |sum, tally| Self {
            passed: sum.passed + tally.passed,
            failed: sum.failed + tally.failed,
            skipped: sum.skipped + tally.skipped,
            retried: sum.retried + tally.retried,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Pass,
    Fail,
    Skip,
}

/// How a machine ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    ByItself,
    /// Killed, because nothing was heard of it.
    Silent,
}

/// A test as its program lists it.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    name: String,
    /// Tests of one group share a guest.
    group: Option<String>,
}

/// The tests that `filters` choose, in their order.
fn list(program: &Path, filters: &[String]) -> Result<Vec<Listed>> {
    let output = Command::new(program)
        .arg("--list")
        .args(filters)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {}", program.display()))?;
    let tests: Vec<Listed> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(listed)
        .collect();
    ensure!(!tests.is_empty(), "no test matches {filters:?}");
    Ok(tests)
}

/// `name: test`, or `[group] name: test`.
fn listed(line: &str) -> Option<Listed> {
    let test = line.strip_suffix(": test")?;
    let grouped = test
        .strip_prefix('[')
        .and_then(|rest| rest.split_once("] "));
    let (group, name) = grouped.map_or((None, test), |(group, name)| (Some(group), name));
    Some(Listed {
        name: name.into(),
        group: group.map(str::to_string),
    })
}

/// Runs what is `left` in a machine of its own and takes away what came to a verdict.
fn run_in_one_machine(
    program: &Path,
    options: &Options,
    left: &mut BTreeSet<String>,
    tally: &mut Tally,
) -> Result<Ended> {
    let (output, input) = std::io::pipe().context("making a pipe")?;
    let this = std::env::current_exe().context("finding this program")?;
    let mut command = Command::new(this);
    command
        .args(["testbed", "run", "--memory", HOST_MEMORY])
        .args(["--kernel", KERNEL.name()])
        .args(needs_distributions(&*left).then_some("--distributions"))
        .args(["--profile", &options.profile, "--"])
        .arg(program)
        .arg("--exact")
        .args(&*left)
        .stdout(input);
    let mut child = process::spawn_tied(&mut command, Tie::Terminate, Vec::new())?;
    // The child must be the only one that holds the writing end.
    drop(command);
    let lines = lines_of(output);
    let ended = loop {
        match lines.recv_timeout(SILENCE_MAX) {
            Ok(line) => match verdict(&line) {
                Some((name, verdict)) if left.remove(name) => {
                    println!("{line}");
                    tally.count(verdict);
                }
                _ if is_closing(&line) => {}
                _ => {
                    tally.retried += u64::from(line.starts_with("AGAIN "));
                    println!("{line}");
                }
            },
            Err(RecvTimeoutError::Disconnected) => break Ended::ByItself,
            Err(RecvTimeoutError::Timeout) => {
                child.kill().context("ending the testbed")?;
                break Ended::Silent;
            }
        }
    };
    child.wait().context("waiting for the testbed")?;
    Ok(ended)
}

/// The lines of a pipe, so that waiting for one can have a limit.
fn lines_of(output: PipeReader) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if sender
                .send(String::from_utf8_lossy(&line).into_owned())
                .is_err()
            {
                return;
            }
        }
    });
    receiver
}

/// The closing lines of one machine are not those of all.
fn is_closing(line: &str) -> bool {
    [" skipped", " retried"].iter().any(|it| line.ends_with(it)) || line.starts_with("ran for ")
}

/// `PASS [   1.23s] name`, with `: why` behind the name for the other two.
fn verdict(line: &str) -> Option<(&str, Verdict)> {
    let (word, rest) = line.split_once(" [")?;
    let verdict = match word {
        "PASS" => Verdict::Pass,
        "FAIL" => Verdict::Fail,
        "SKIP" => Verdict::Skip,
        _ => return None,
    };
    let (_, rest) = rest.split_once("s] ")?;
    Some((rest.split(':').next().unwrap_or(rest), verdict))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdict_of_each_kind_is_read() {
        assert_eq!(verdict("PASS [   1.23s] a_b"), Some(("a_b", Verdict::Pass)));
        assert_eq!(
            verdict("FAIL [ 120.00s] a_b: no: answer"),
            Some(("a_b", Verdict::Fail))
        );
        assert_eq!(
            verdict("SKIP [   0.00s] a_b: no tun"),
            Some(("a_b", Verdict::Skip))
        );
    }

    fn dealt(lines: &[&str], lanes: usize) -> Vec<String> {
        let tests: Vec<Listed> = lines.iter().filter_map(|line| listed(line)).collect();
        assert_eq!(tests.len(), lines.len());
        let shares = deal(&tests, lanes).into_iter();
        shares
            .map(|share| Vec::from_iter(share).join(" "))
            .collect()
    }

    #[test]
    fn every_test_is_dealt_to_one_lane_and_groups_stay_together() {
        let apart = ["a: test", "b: test", "c: test"];
        assert_eq!(dealt(&apart, 2), ["a c", "b"]);
        assert_eq!(dealt(&apart, 8), ["a", "b", "c"]);
        let grouped = [
            "[x] a: test",
            "[x] b: test",
            "[y] c: test",
            "d: test",
            "e: test",
        ];
        assert_eq!(dealt(&grouped, 2), ["a b e", "c d"]);
        assert_eq!(dealt(&grouped[..2], 2), ["a b"]);
    }

    #[test]
    fn other_line_is_no_verdict() {
        for line in ["", "PASS", "AGAIN           a_b: why", "  [ 1.0s] x"] {
            assert_eq!(verdict(line), None, "{line}");
        }
    }
}
