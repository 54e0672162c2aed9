//! The steps, as a table, and how one is run.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::count::{Counts, closing_line};
use super::since::Part;
use super::since::Part::{Fleet, Fuzz, GuestPatches, Tests, Text, Vmm, Xtask};
use super::tests_seen::TestsSeen;
use crate::{cargo, paths};

/// What a step needs besides the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Runs anywhere.
    Host,
    /// Boots Linux guests or builds them.
    Guests,
}

/// One step.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// Steps that must have passed.
    pub(crate) needs: &'static [&'static str],
    /// Parts of the project whose change can change the step's result.
    pub(super) parts: &'static [Part],
    /// Split at blanks; [`Step::words`] fills in what is in braces.
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
        needs,
        parts,
        command,
    }
}

/// What a Linux guest under our VMM needs.
const BUILT: &[&str] = &["build", "test programs", "guest"];

const CODE: &[Part] = &[Vmm, Fleet, Fuzz, Tests, Xtask];
const GUESTS: &[Part] = &[Vmm, Fleet, GuestPatches, Tests, Xtask];

/// The steps in their order.
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
        &[Vmm, Fleet],
        "cargo build --release --package cloud-hypervisor --package ch-remote --package ch-fleet \
         --package ch-fleet-adapter",
    ),
    host(
        "unit tests",
        &[],
        &[Vmm, Fleet, GuestPatches, Tests, Xtask, Text],
        "cargo {test} --workspace --lib --bins --tests --no-fail-fast",
    ),
    // The agent's page in Chromium, its metrics and rules in Prometheus, its host in placement.
    host("fleet page", &[], &[Fleet, Vmm], "cargo xtask fleet-page"),
    host(
        "doc tests",
        &[],
        &[Vmm, Fleet],
        "cargo test --workspace --doc",
    ),
    // Each once, without measuring: that they still run at all.
    host(
        "benchmarks",
        &[],
        &[Vmm],
        "cargo test --package virtio-devices --features test-utils --bench balloon --bench rates --bench block",
    ),
    // The canary from nothing, then each target; an input that fails is kept in target/fuzz.
    host(
        "fuzz",
        &[],
        &[Vmm, Fuzz, Xtask],
        "cargo xtask fuzz --seconds 30",
    ),
    // Linked by the unit tests already: selected as there, so that nothing is built twice.
    host(
        "test programs",
        &[],
        &[Vmm, Tests],
        "cargo build --workspace {test programs}",
    ),
    // Three members and five agents, killed, stopped and cut off; about a minute and a half.
    host(
        "fleet store",
        &["build", "test programs"],
        &[Fleet, Vmm, Tests, Xtask],
        "cargo xtask fleet-store",
    ),
    host(
        "guest core",
        &[],
        &[GuestPatches, Xtask],
        "cargo xtask guest core",
    ),
    // Debian's kernels: nothing of a kernel is compiled.
    guests("demo", &[], GUESTS, "cargo xtask demo"),
    guests(
        "guest",
        &[],
        &[GuestPatches, Tests, Xtask],
        "cargo xtask guest build",
    ),
    // Builds nothing that the step before has not built.
    guests(
        "guest series",
        &["guest"],
        &[GuestPatches, Xtask],
        "cargo xtask guest check --quick",
    ),
    // The patched kernel with QEMU as its host: nothing is built. Two minutes.
    guests(
        "qemu tests",
        &["test programs", "guest"],
        &[GuestPatches, Tests, Xtask],
        "cargo xtask guest qemu-test",
    ),
    // The tests take a few minutes; a guest that hangs costs its test's own deadline.
    guests("vm tests", BUILT, GUESTS, "cargo xtask vm-tests"),
    guests("vm bench", BUILT, GUESTS, "cargo xtask bench"),
    // Without reporting two guests fit. Small and few, to show that it works.
    guests(
        "experiment",
        BUILT,
        GUESTS,
        "cargo xtask experiment overcommit --reporting mainline --scale 0.1 --max 5 --expect 4 --timeout 900",
    ),
];

/// Programs of the integration tests that steps start.
const TEST_PROGRAMS: [&str; 6] = [
    "vm-tests",
    "vm-bench",
    "qemu-tests",
    "fleet-tests",
    "experiment",
    "demo",
];

impl Step {
    /// Runs the step and shows its output: whether it passed, and its tests.
    pub(super) fn run(&self, seen: &mut TestsSeen) -> Result<(bool, Counts)> {
        let words = self.words();
        let (program, args) = words.split_first().context("a step has a command")?;
        // One pipe for both, in order: nextest tells its counts on standard error.
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
        let mut counts = Counts::default();
        for line in BufReader::new(output).split(b'\n') {
            let line = line.context("reading the step's output")?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            seen.read(&line);
            if let Some(more) = closing_line(&line) {
                counts += more;
            }
        }
        let status = child.wait().context("waiting for the step")?;
        let skips = fs::read_to_string(skips.path()).context("reading which tests were skipped")?;
        counts.move_to_skipped(seen.read_skips(&skips));
        Ok((status.success(), counts))
    }

    fn words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        let command = self.command.replace(
            "{test programs}",
            &TEST_PROGRAMS.map(|name| format!("--bin {name}")).join(" "),
        );
        for word in command.split_whitespace() {
            match word {
                "cargo" => words.push(cargo::program()),
                // Tests that are skipped are named.
                "{test}" if has_nextest() => {
                    words.extend(["nextest", "run", "--status-level=skip"].map(OsString::from));
                }
                "{test}" => words.push("test".into()),
                word => words.push(word.into()),
            }
        }
        words
    }
}

/// nextest is quicker and kills a test that hangs, but is not part of Rust.
fn has_nextest() -> bool {
    cargo::command(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::STEPS;

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
}
