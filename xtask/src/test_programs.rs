//! Starts the programs of the integration tests with the files that they need.

use std::path::PathBuf;

use anyhow::Result;

use crate::cargo;

/// All that other commands start.
pub(crate) const ALL: [&str; 6] = [
    "vm-tests",
    "vm-bench",
    "qemu-tests",
    "fleet-tests",
    "experiment",
    "demo",
];

/// A small test that is selected with the programs: only where there are tests does cargo count in the features that
/// development dependencies ask for, as it does for the unit tests.
const WITH_TESTS: [&str; 2] = ["--test", "openapi"];

/// Selects programs as the unit tests select everything: a package alone, or without tests, has other features, and
/// most of what it depends on would be built twice.
pub(crate) fn selection(programs: &[&'static str]) -> Vec<&'static str> {
    let mut words = vec!["--workspace"];
    words.extend(WITH_TESTS);
    words.extend(programs.iter().flat_map(|program| ["--bin", program]));
    words
}

/// Builds a program of the integration tests and tells where it is.
pub(crate) fn build(program: &'static str) -> Result<PathBuf> {
    let mut words = vec!["build", "--quiet"];
    words.extend(selection(&[program]));
    cargo::run(words)?;
    Ok(cargo::folder("dev").join(program))
}
