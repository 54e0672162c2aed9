//! `cargo xtask vm-tests`: the tests with Linux guests, in the testbed.
//!
//! The emulated host is another program's work and has been seen to stand still for good. Its
//! tests have deadlines of their own, but so does nothing in a machine without a clock: when no
//! test has ended for a long time, the tests that are left go on in a new machine.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, PipeReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::process::{self, Tie};
use crate::shows;

/// A test that fails slowly: to boot and to answer have two minutes each, and some tests boot
/// twice.
const SILENCE_MAX: Duration = Duration::from_secs(480);
/// How many machines the tests may use up.
const MACHINES_MAX: u32 = 3;
/// Memory of the testbed's host.
const HOST_MEMORY: &str = "4G";

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
    let program = shows::build("vm-tests")?;
    let mut left = list(&program, &options.filters)?;
    let mut tally = Tally::default();
    for machine in 1..=MACHINES_MAX {
        let ended = run_in_one_machine(&program, options, &mut left, &mut tally)?;
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
    // The last line is read by machines: it stands alone.
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    Ok(if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// How many tests ended how.
#[derive(Debug, Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
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

/// The names of the tests that `filters` choose.
fn list(program: &Path, filters: &[String]) -> Result<BTreeSet<String>> {
    let output = Command::new(program)
        .arg("--list")
        .args(filters)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {}", program.display()))?;
    let names: BTreeSet<String> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(str::to_owned)
        .collect();
    ensure!(!names.is_empty(), "no test matches {filters:?}");
    Ok(names)
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
        .args(["--profile", &options.profile, "--"])
        .arg(program)
        .arg("--exactly")
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
                // The closing line of this machine is not that of all.
                _ if line.ends_with(" skipped") => {}
                _ => println!("{line}"),
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

    #[test]
    fn other_line_is_no_verdict() {
        for line in ["", "PASS", "AGAIN           a_b: why", "  [ 1.0s] x"] {
            assert_eq!(verdict(line), None, "{line}");
        }
    }
}
