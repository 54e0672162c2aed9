//! Builds the fuzz targets, and names the folder of their inputs.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::{cargo, paths};

pub(super) const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Builds programs in a folder of the target directory; returns their locations.
pub(super) fn build<'a>(
    folder: &str,
    flags: &str,
    optimize: bool,
    programs: impl Iterator<Item = &'a str>,
) -> Result<PathBuf> {
    let folder = paths::target().join(folder);
    let mut command = cargo::command(["build", "--target", TRIPLE]);
    command.args(optimize.then_some("--release"));
    for program in programs {
        command.args(["--bin", program]);
    }
    let status = command
        .arg("--manifest-path")
        .arg(paths::workspace().join("fuzz/Cargo.toml"))
        .arg("--target-dir")
        .arg(&folder)
        .env("RUSTFLAGS", flags)
        .status()
        .context("starting cargo")?;
    ensure!(status.success(), "the fuzz targets do not build");
    let profile = if optimize { "release" } else { "debug" };
    Ok(folder.join(TRIPLE).join(profile))
}

/// Removes what was compiled for the targets in `target/fuzz`; inputs stay.
pub(crate) fn remove_programs() -> Result<()> {
    let folder = paths::target().join("fuzz").join(TRIPLE);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// The folder with the inputs that runs on this machine have found.
pub(super) fn corpus(target: &str) -> Result<PathBuf> {
    let folder = paths::target().join("fuzz/corpus").join(target);
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    Ok(folder)
}
