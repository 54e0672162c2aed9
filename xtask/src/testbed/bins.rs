//! Our binaries as the testbed's command finds them in PATH.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::paths;

/// Packages under `bin/`, each of which makes one binary of its name.
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

/// Builds them with a cargo profile and returns their paths.
pub(crate) fn build(profile: &str) -> Result<Vec<PathBuf>> {
    let packages = packages()?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--profile", profile]);
    for package in &packages {
        cargo.args(["--package", package]);
    }
    let status = cargo
        .current_dir(paths::workspace())
        // The result of the testbed's command alone goes to stdout.
        .stdout(std::io::stderr())
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("building {} failed ({status})", packages.join(", "));
    }
    // Cargo's name for the folder of the default profile.
    let folder = if profile == "dev" { "debug" } else { profile };
    let dir = paths::target().join(folder);
    Ok(packages.iter().map(|name| dir.join(name)).collect())
}
