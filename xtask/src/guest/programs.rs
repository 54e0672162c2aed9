//! Our own programs inside guests: one static executable.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::{cargo, paths};

/// Named explicitly so that the flags below reach the program and not build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the static executable and returns its path.
pub(crate) fn build() -> Result<PathBuf> {
    let dir = paths::target().join("guest-programs");
    let status = cargo::command(["build", "--quiet", "--package", "guest-programs"])
        .args(["--profile", "guest", "--target", TARGET, "--target-dir"])
        .arg(&dir)
        .env(
            "RUSTFLAGS",
            "-C target-feature=+crt-static -C relocation-model=static",
        )
        // Set by an enclosing cargo, it would win over RUSTFLAGS.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("building the guest programs failed ({status})");
    }
    Ok(dir.join(TARGET).join("guest").join("guest"))
}
