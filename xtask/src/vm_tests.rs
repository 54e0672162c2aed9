//! `cargo xtask vm-tests`: runs the tests with Linux guests, in the testbed.
//!
//! An emulated host has one processor, because it is not reliable with more. Therefore the tests are distributed to
//! several concurrent hosts. Tests that share a guest stay together.
//!
//! An emulated host can hang. The tests have their own deadlines, but these do not work in a machine whose clock has
//! stopped. If no test has ended for a long time, the remaining tests continue on a new host.

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

/// Time without a result after which a host counts as hung. It allows for slow failures: a boot and a response may take
/// two minutes each, and some tests boot twice.
const SILENCE_MAX: Duration = Duration::from_secs(480);
/// Maximum number of hosts per lane.
const MACHINES_MAX: u32 = 3;
/// Maximum number of concurrent emulated hosts, if this machine has a processor for each.
const LANES_MAX: usize = 4;
/// Prefix of the names of tests that boot a distribution's kernel or system.
const DISTRIBUTIONS: &str = "debian_";
/// Default kernel of tests: our kernel that is built for all tests.
const KERNEL: KernelChoice = KernelChoice::Mainline;
/// Memory of an emulated host: with less, it cannot provide a page of 1 GiB.
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
        // Done once, before several testbeds need it at the same time.
        testbed::prepare_distributions()?;
    }
    let lanes = if testbed::emulates(&options.profile, KERNEL)? {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        processors.min(LANES_MAX)
    } else {
        // A real host itself runs several tests at a time.
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
    // The last lines are machine-readable, so they are separate.
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

/// Shares of the tests for `lanes` lanes. Tests of a group stay together. Other neighbours do not, because they take
/// about as long as each other.
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

/// Runs a share of the tests, on a new host if one hangs.
fn run_lane(program: &Path, options: &Options, mut left: BTreeSet<String>) -> Result<Tally> {
    let mut tally = Tally::default();
    for machine in 1..=MACHINES_MAX {
        let ended = run_in_one_machine(program, options, &mut left, &mut tally)?;
        if left.is_empty() || ended == Ended::ByItself {
            break;
        }
        println!(
            "the emulated host stopped responding; {} tests remain{}",
            left.len(),
            if machine < MACHINES_MAX {
                " and go on in a new one"
            } else {
                ""
            }
        );
    }
    for name in &left {
        println!("FAIL {name}: the host ended before the test");
        tally.failed += 1;
    }
    Ok(tally)
}

/// Number of tests by result.
#[derive(Debug, Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
    /// Number of those that were retried.
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

/// How a host ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    ByItself,
    /// Killed, because it did not respond.
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

/// Runs the tests in `left` on a new host and removes those that have a result.
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
    // Only the child may hold the writing end.
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

/// The lines of a pipe, received with a timeout.
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

/// The summary lines of one host are not those of all.
fn is_closing(line: &str) -> bool {
    [" skipped", " retried"].iter().any(|it| line.ends_with(it)) || line.starts_with("ran for ")
}

/// `PASS [   1.23s] name`, with `: why` after the name for the other two results.
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
