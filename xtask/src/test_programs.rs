//! Starts the programs of the integration tests with the files that they need.

use std::path::PathBuf;

use anyhow::Result;

use crate::cargo;

/// All programs that other commands start.
pub(crate) const ALL: [&str; 6] = [
    "vm-tests",
    "vm-bench",
    "qemu-tests",
    "fleet-tests",
    "experiment",
    "demo",
];

/// A small test that is selected with the programs: only with a test does cargo enable the features of development
/// dependencies, as it does for the unit tests.
const WITH_TESTS: [&str; 2] = ["--test", "openapi"];

/// Selects programs like the unit tests do: a single package, or one without tests, has other features, and most
/// dependencies would be built twice.
pub(crate) fn selection(programs: &[&'static str]) -> Vec<&'static str> {
    let mut words = vec!["--workspace"];
    words.extend(WITH_TESTS);
    words.extend(programs.iter().flat_map(|program| ["--bin", program]));
    words
}

/// Builds a program of the integration tests and returns its path.
pub(crate) fn build(program: &'static str) -> Result<PathBuf> {
    let mut words = vec!["build", "--quiet"];
    words.extend(selection(&[program]));
    cargo::run(words)?;
    Ok(cargo::folder("dev").join(program))
}
