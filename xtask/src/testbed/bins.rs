//! Provides our binaries in the PATH of the testbed's command.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::{cargo, paths};

/// Packages under `bin/`, each of which builds one binary of its name.
fn packages() -> Result<Vec<String>> {
    let dir = paths::workspace().join("bin");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry.with_context(|| format!("reading {}", dir.display()))?;
        if entry.path().join("Cargo.toml").exists() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Builds all of them, or only the named ones, with a cargo profile and returns their paths.
pub(crate) fn build(profile: &str, only: &[String]) -> Result<Vec<PathBuf>> {
    let packages = match only {
        [] => packages()?,
        some => some.to_vec(),
    };
    let mut arguments = vec!["build", "--quiet", "--profile", profile];
    for package in &packages {
        arguments.extend(["--package", package]);
    }
    cargo::run(arguments)?;
    Ok(built(profile, &packages))
}

/// Paths of these programs.
pub(crate) fn built(profile: &str, names: &[String]) -> Vec<PathBuf> {
    let dir = cargo::folder(profile);
    names.iter().map(|name| dir.join(name)).collect()
}
