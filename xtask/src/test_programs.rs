//! Programs of the integration tests, which other commands start with what they need.

use std::path::PathBuf;

use anyhow::Result;

use crate::cargo;

/// Builds a program of the integration tests and tells where it is. It is selected from the whole
/// workspace, as the unit tests are: a package alone has other features, and all that it depends on
/// would be built twice.
pub(crate) fn build(program: &str) -> Result<PathBuf> {
    cargo::run(["build", "--quiet", "--workspace", "--bin", program])?;
    Ok(cargo::folder("dev").join(program))
}
