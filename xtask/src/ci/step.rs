//! The steps, as a table, and how one is run.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::count::{Counts, closing_line};
use crate::paths;

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
    /// Split at blanks; [`Step::words`] fills in what is in braces.
    command: &'static str,
}

const fn host(name: &'static str, command: &'static str) -> Step {
    Step {
        name,
        kind: Kind::Host,
        needs: &[],
        command,
    }
}

const fn guests(name: &'static str, needs: &'static [&'static str], command: &'static str) -> Step {
    Step {
        name,
        kind: Kind::Guests,
        needs,
        command,
    }
}

/// What a Linux guest under our VMM needs.
const BUILT: &[&str] = &["build", "test programs", "guest"];

/// The steps in their order.
pub(crate) const STEPS: &[Step] = &[
    host("format", "cargo fmt --all --check"),
    host(
        "clippy",
        "cargo clippy --workspace --all-targets -- -D warnings",
    ),
    host(
        "build",
        "cargo build --release --package cloud-hypervisor --package ch-remote --package ch-fleet",
    ),
    host(
        "unit tests",
        "cargo {test} --workspace --lib --bins --tests --no-fail-fast",
    ),
    // The agent's page in Chromium, its metrics and rules in Prometheus, its host in placement.
    host("fleet page", "cargo xtask fleet-page"),
    host("doc tests", "cargo test --workspace --doc"),
    // Each once, without measuring: that they still run at all.
    host(
        "benchmarks",
        "cargo test --package virtio-devices --features test-utils --bench balloon --bench rates --bench block",
    ),
    // The canary from nothing, then each target; an input that fails is kept in target/fuzz.
    host("fuzz", "cargo xtask fuzz --seconds 30"),
    host(
        "test programs",
        "cargo build --package integration-tests --bins",
    ),
    // Three members and five agents, killed, stopped and cut off; about a minute and a half.
    Step {
        name: "fleet store",
        kind: Kind::Host,
        needs: &["build", "test programs"],
        command: "cargo xtask fleet-store",
    },
    host("guest core", "cargo xtask guest core"),
    guests("guest", &[], "cargo xtask guest build"),
    // Builds nothing that the step before has not built.
    guests(
        "guest series",
        &["guest"],
        "cargo xtask guest check --quick",
    ),
    // The patched kernel with QEMU as its host: nothing is built. Two minutes.
    guests(
        "qemu tests",
        &["test programs", "guest"],
        "cargo xtask guest qemu-test",
    ),
    // The tests take a few minutes; a guest that hangs costs its test's own deadline.
    guests("vm tests", BUILT, "cargo xtask vm-tests"),
    guests("vm bench", BUILT, "cargo xtask bench"),
    // Without reporting two guests fit. Small and few, to show that it works.
    guests(
        "experiment",
        BUILT,
        "cargo xtask experiment overcommit --reporting mainline --scale 0.1 --max 5 --expect 4 --timeout 900",
    ),
];

impl Step {
    /// Runs the step and shows its output: whether it passed, and its tests.
    pub(crate) fn run(&self) -> Result<(bool, Counts)> {
        let words = self.words();
        let (program, args) = words.split_first().context("a step has a command")?;
        // One pipe for both, in order: nextest tells its counts on standard error.
        let (output, input) = std::io::pipe().context("making a pipe")?;
        let mut child = Command::new(program)
            .args(args)
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
            if let Some(more) = closing_line(&line) {
                counts += more;
            }
        }
        let status = child.wait().context("waiting for the step")?;
        Ok((status.success(), counts))
    }

    fn words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        for word in self.command.split_whitespace() {
            match word {
                "cargo" => words.push(cargo()),
                "{test}" if has_nextest() => words.extend(["nextest".into(), "run".into()]),
                "{test}" => words.push("test".into()),
                word => words.push(word.into()),
            }
        }
        words
    }
}

fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// nextest is quicker and kills a test that hangs, but is not part of Rust.
fn has_nextest() -> bool {
    Command::new(cargo())
        .args(["nextest", "--version"])
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
