//! Builds the package from compiled programs.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::guest::make::quiet;
use crate::{cargo, paths};

/// The cargo package whose manifest describes the Debian package.
const MANIFEST: &str = "cloud-hypervisor";

/// Compiled programs.
pub(super) struct Built<'a> {
    /// The root of the source tree.
    pub(super) checkout: &'a Path,
    /// Cargo's target directory.
    pub(super) target: &'a Path,
    pub(super) programs: &'a [PathBuf],
}

/// The name of a program.
pub(super) fn file_name(path: &Path) -> Option<&str> {
    path.file_name().and_then(OsStr::to_str)
}

/// Builds the package once, in the empty folder `place`.
pub(super) fn make(
    tool: &Path,
    profile: &str,
    built: &Built<'_>,
    environment: &[(&str, &str)],
    place: &Path,
) -> Result<PathBuf> {
    let docs = built.target.join(cargo::folder_name(profile)).join("docs");
    for folder in [place, &docs] {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("removing {}", folder.display()))?;
        }
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    for program in built.programs {
        let mut generate = Command::new(program);
        generate.arg("--generate-docs").arg(&docs);
        quiet(generate.envs(environment.iter().copied()))?;
    }
    let mut package = Command::new(tool);
    package
        .args(["--no-build", "--locked", "--package", MANIFEST])
        .args(["--profile", profile, "--output"])
        .arg(place)
        .envs(environment.iter().copied())
        .env("SOURCE_DATE_EPOCH", source_date(None)?)
        .env("CARGO_TARGET_DIR", built.target)
        .current_dir(built.checkout);
    quiet(&mut package)?;
    let mut packages = fs::read_dir(place)
        .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
        .with_context(|| format!("reading {}", place.display()))?;
    ensure!(
        packages.len() == 1,
        "cargo-deb created {} files in {} instead of one",
        packages.len(),
        place.display()
    );
    Ok(packages.remove(0).path())
}

/// The time of every file in a package: the caller's, or that of the last commit, in `folder` if one is given.
pub(crate) fn source_date(folder: Option<&str>) -> Result<String> {
    if let Ok(given) = std::env::var("SOURCE_DATE_EPOCH") {
        return Ok(given);
    }
    let output = Command::new("git")
        .args(["log", "-1", "--format=%ct"])
        .args(folder)
        .current_dir(paths::workspace())
        .output()
        .context("starting git")?;
    let date = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(
        output.status.success() && date.parse::<u64>().is_ok(),
        "cannot determine the time of the last commit: set SOURCE_DATE_EPOCH"
    );
    Ok(date)
}
