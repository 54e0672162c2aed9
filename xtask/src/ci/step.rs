//! The table of steps, and how a step is run.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::num::NonZero;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::count::{Counts, closing_line};
use super::part::Part;
use super::part::Part::{Fleet, Fuzz, GuestPatches, Shared, Tests, Text, Vmm, Xtask};
use super::tests_seen::TestsSeen;
use crate::{cargo, paths, test_programs};

/// The requirements of a step besides the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Runs anywhere.
    Host,
    /// Boots or builds Linux guests.
    Guests,
}

/// The load of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// All processors.
    All,
    /// About one, or it waits: another such step runs concurrently.
    One,
}

/// One step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(super) load: Load,
    /// Steps that must have passed.
    pub(crate) needs: &'static [&'static str],
    /// Parts of the project that can change the step's result.
    pub(super) parts: &'static [Part],
    /// Split at blanks; [`Step::words`] replaces the names in braces.
    command: &'static str,
}

const fn host(
    name: &'static str,
    needs: &'static [&'static str],
    parts: &'static [Part],
    command: &'static str,
) -> Step {
    Step {
        name,
        kind: Kind::Host,
        load: Load::All,
        needs,
        parts,
        command,
    }
}

const fn guests(
    name: &'static str,
    needs: &'static [&'static str],
    parts: &'static [Part],
    command: &'static str,
) -> Step {
    Step {
        name,
        kind: Kind::Guests,
        load: Load::All,
        needs,
        parts,
        command,
    }
}

/// A step that can run concurrently with another one.
const fn beside(step: Step) -> Step {
    Step {
        load: Load::One,
        ..step
    }
}

/// Steps that a Linux guest under our VMM needs.
const BUILT: &[&str] = &["build", "test programs", "guest"];

const CODE: &[Part] = &[Shared, Vmm, Fleet, Fuzz, Tests, Xtask];
const FUZZED: &[Part] = &[Shared, Vmm, Fleet, Fuzz, Xtask];
/// Steps that measure guests without a fleet agent.
const MEASURED: &[Part] = &[Shared, Vmm, GuestPatches, Tests, Xtask];

/// The step that runs the fuzz programs, which no later step needs.
pub(super) const FUZZ: &str = "fuzz";

/// The steps in order. Concurrent steps are adjacent, the longest first, so that they end at about the same time.
pub(crate) const STEPS: &[Step] = &[
    host("format", &[], CODE, "cargo fmt --all --check"),
    host(
        "clippy",
        &[],
        CODE,
        "cargo clippy --workspace --all-targets -- -D warnings",
    ),
    // All of bin/, as the testbed builds it: the same selection has the same features, so that
    // nothing is built twice.
    host(
        "build",
        &[],
        &[Shared, Vmm, Fleet],
        "cargo build --release --package cloud-hypervisor --package ch-remote --package ch-fleet \
         --package ch-fleet-adapter",
    ),
    // Tests that use them are skipped without.
    host(
        "test tools",
        &[],
        &[Shared, Vmm, Tests, Xtask],
        "cargo xtask test-tools --if-possible",
    ),
    host(
        "unit tests",
        &[],
        &[Shared, Vmm, Fleet, GuestPatches, Tests, Xtask, Text],
        "cargo {test} --workspace --lib --bins --tests --no-fail-fast",
    ),
    // Already compiled for the unit tests: the same selection, so that nothing is built twice.
    host(
        "test programs",
        &[],
        &[Shared, Vmm, Tests],
        "cargo build {test programs}",
    ),
    // Uses all processors, like other builds: while it runs, tests of the fleet store would miss their deadlines.
    host("fuzz programs", &[], FUZZED, "cargo xtask fuzz --no-run"),
    // One kernel for all steps.
    guests(
        "guest",
        &[],
        &[GuestPatches, Tests, Xtask],
        "cargo xtask guest build patched",
    ),
    // The patched kernel with QEMU as its host; builds nothing.
    beside(guests(
        "qemu tests",
        &["test programs", "guest"],
        &[GuestPatches, Tests, Xtask],
        "cargo xtask guest qemu-test",
    )),
    // Debian's kernels; no kernel is compiled.
    beside(guests(
        "demo",
        &[],
        &[Shared, Vmm, Tests, Xtask],
        "cargo xtask demo",
    )),
    // The canary of each target, then the target, from the committed inputs and a fixed seed: no commit fails by
    // chance. A failing input is kept in target/fuzz.
    beside(host(
        FUZZ,
        &["fuzz programs"],
        FUZZED,
        "cargo xtask fuzz --seconds 8 --seed 1",
    )),
    // Runs each once, without measuring, to check that they still work.
    beside(host(
        "benchmarks",
        &[],
        &[Shared, Vmm],
        "cargo test --workspace --features virtio-devices/test-utils --bench balloon --bench rates --bench block --bench iommu --bench pause --bench save",
    )),
    // Three members and five agents, killed, stopped and disconnected.
    beside(host(
        "fleet store",
        &["build", "test programs"],
        &[Shared, Fleet, Tests, Xtask],
        "cargo xtask fleet-store",
    )),
    beside(guests(
        "vm bench",
        BUILT,
        MEASURED,
        "cargo xtask bench --kernel mainline",
    )),
    // Packages the programs that the step `build` has built.
    beside(host(
        "package",
        &["build"],
        &[Shared, Vmm, Fleet, Xtask],
        "cargo xtask package --check",
    )),
    // The agent's page in Chromium, its metrics and rules in Prometheus, its host in placement.
    beside(host(
        "fleet page",
        &[],
        &[Shared, Fleet, Xtask],
        "cargo xtask fleet-page",
    )),
    // Without reporting, two guests fit. Few and small guests, to show that it works.
    beside(guests(
        "experiment",
        BUILT,
        MEASURED,
        "cargo xtask experiment overcommit --reporting mainline --kernel mainline --scale 0.1 --max 5 --expect 4 --timeout 900",
    )),
    // A fixed seed: a trace fails because of the commit, not by chance. Runs by hand take a new seed each time.
    beside(host(
        "guest core",
        &[],
        &[GuestPatches, Xtask],
        "cargo xtask guest core --seed 1",
    )),
    beside(host(
        "doc tests",
        &[],
        &[Shared, Vmm, Fleet],
        "cargo test --workspace --doc",
    )),
    // Compiles `api` as other projects would: its package, without the rest of the workspace.
    beside(host(
        "crate",
        &[],
        &[Shared],
        "cargo package --offline --allow-dirty --locked --package cloud-hypervisor-balloon-byte-size \
         --package device-facts --package cloud-hypervisor-balloon-api-macros --package cloud-hypervisor-balloon-api",
    )),
    // The unit tests of the series are in the kernel that all tests boot.
    beside(guests(
        "kunit",
        &["guest"],
        &[GuestPatches, Xtask],
        "cargo xtask guest kunit",
    )),
    // Builds nothing, because the guests' step has built everything.
    beside(guests(
        "guest series",
        &["guest"],
        &[GuestPatches, Xtask],
        "cargo xtask guest check --quick",
    )),
    // The tests take a few minutes; a guest that hangs costs its test's own deadline.
    guests(
        "vm tests",
        BUILT,
        &[Shared, Vmm, Fleet, GuestPatches, Tests, Xtask],
        "cargo xtask vm-tests",
    ),
];

/// Number of lines shown of a step that failed without a failed test.
const LAST_LINES: usize = 20;

/// The result of a step that has run.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) passed: bool,
    pub(super) counts: Counts,
    pub(super) took: Duration,
    pub(super) seen: TestsSeen,
}

impl Step {
    /// Runs the step and passes on each line of its output.
    pub(super) fn run(&self, show: impl FnMut(&str)) -> Ended {
        let started = Instant::now();
        let mut ended = Ended {
            passed: false,
            counts: Counts::default(),
            took: Duration::ZERO,
            seen: TestsSeen::default(),
        };
        let mut last = VecDeque::new();
        if let Err(error) = self.run_into(&mut ended, &mut last, show) {
            ended.passed = false;
            let error = format!("error: {}: {error:#}", self.name);
            eprintln!("{error}");
            last.push_back(error);
        }
        if !ended.passed {
            ended.seen.step_failed(self.name, last);
        }
        ended.took = started.elapsed();
        ended
    }

    fn run_into(
        &self,
        ended: &mut Ended,
        last: &mut VecDeque<String>,
        mut show: impl FnMut(&str),
    ) -> Result<()> {
        let words = self.words();
        let (program, args) = words.split_first().context("a step has a command")?;
        // One pipe for both, in order: nextest prints its counts to standard error.
        let (output, input) = std::io::pipe().context("making a pipe")?;
        let skips = tempfile::NamedTempFile::new().context("making a file for skipped tests")?;
        let mut child = Command::new(program)
            .args(args)
            .env(test_skip::SKIPS_FILE, skips.path())
            .current_dir(paths::workspace())
            .stdin(Stdio::null())
            .stdout(input.try_clone().context("doubling a pipe")?)
            .stderr(input)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        for line in BufReader::new(output).split(b'\n') {
            let line = line.context("reading the step's output")?;
            let line = String::from_utf8_lossy(&line);
            show(&line);
            ended.seen.read(&line);
            if last.len() == LAST_LINES {
                last.pop_front();
            }
            last.push_back(line.to_string());
            if let Some(more) = closing_line(&line) {
                ended.counts += more;
            }
        }
        let status = child.wait().context("waiting for the step")?;
        let skips = fs::read_to_string(skips.path()).context("reading which tests were skipped")?;
        let marked = ended.seen.read_skips(&skips);
        ended.counts.move_to_skipped(marked);
        ended.passed = status.success();
        Ok(())
    }

    fn words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        let programs = test_programs::selection(&test_programs::ALL).join(" ");
        let command = self.command.replace("{test programs}", &programs);
        for word in command.split_whitespace() {
            match word {
                "cargo" => words.push(cargo::program()),
                // Skipped tests are listed by name.
                "{test}" if has_nextest() => {
                    words.extend(["nextest", "run", "--status-level=skip"].map(OsString::from));
                    // A test that passes then is counted and named: its deadline may have met a busy machine.
                    words.push("--retries=1".into());
                    words.push(format!("--test-threads={}", tests_at_once()).into());
                }
                "{test}" => words.push("test".into()),
                word => words.push(word.into()),
            }
        }
        words
    }
}

/// Number of concurrent tests; most tests mostly wait for a guest, a deadline or a response.
fn tests_at_once() -> usize {
    4 * std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// Whether adjacent steps of the list run concurrently.
pub(super) fn runs_beside(one: &Step, next: &Step) -> bool {
    one.load == Load::One && next.load == Load::One
}

/// nextest is faster and kills a test that hangs, but is not part of Rust.
fn has_nextest() -> bool {
    cargo::command(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::{STEPS, runs_beside};

    #[test]
    fn step_needs_only_earlier_steps() {
        for (index, step) in STEPS.iter().enumerate() {
            for need in step.needs {
                assert!(
                    STEPS[..index].iter().any(|earlier| earlier.name == *need),
                    "{need}"
                );
            }
        }
    }

    #[test]
    fn step_needs_none_of_those_that_it_runs_beside() {
        for group in STEPS.chunk_by(runs_beside) {
            for step in group {
                let inside = |need: &&str| group.iter().any(|other| other.name == *need);
                assert!(!step.needs.iter().any(inside), "{}", step.name);
            }
        }
    }
}
