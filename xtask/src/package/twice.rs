//! `cargo xtask package --twice`: compiles the programs again, from another checkout and into another target folder, and
//! compares programs and packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::build::{Built, file_name, make};
use crate::guest::make::{output, quiet};
use crate::{cargo, disk, paths};

/// The programs' objects, and the checkout, as measured, rounded up.
const SPACE_BYTES: u64 = 3 << 30;

/// Builds the last commit again and compares it with `first`, whose package is `package`.
pub(super) fn check(tool: &Path, profile: &str, first: &Built<'_>, package: &Path) -> Result<()> {
    let folder = paths::target().join("package");
    disk::require(&folder, SPACE_BYTES, "compiling the programs a second time")?;
    let mut status = Command::new("git");
    status.args(["status", "--porcelain", "--untracked-files=no"]);
    let changed = output(status.current_dir(paths::workspace()))?;
    ensure!(
        changed.is_empty(),
        "the second build is made from the last commit, but files have changed since:\n{changed}"
    );
    // Its path has another length, too.
    let place = tempfile::Builder::new()
        .prefix("another-checkout-")
        .tempdir_in(&folder)
        .with_context(|| format!("making a folder in {}", folder.display()))?;
    let checkout = place.path().join("source");
    let mut clone = Command::new("git");
    clone.args(["clone", "--quiet", "--shared"]);
    quiet(clone.arg(paths::workspace()).arg(&checkout))?;
    let target = place.path().join("objects");
    let names: Vec<&str> = first
        .programs
        .iter()
        .filter_map(|it| file_name(it))
        .collect();
    let programs = compile(profile, &checkout, &target, &names)?;
    let second = Built {
        checkout: &checkout,
        target: &target,
        programs: &programs,
    };
    let again = make(tool, profile, &second, &[], &place.path().join("package"))?;
    let firsts = first.programs.iter().map(PathBuf::as_path);
    let seconds = programs.iter().map(PathBuf::as_path);
    let pairs = firsts.zip(seconds).chain([(package, again.as_path())]);
    for (one, other) in pairs {
        if read(one)? != read(other)? {
            // Kept, so that the difference can be examined.
            let _ = place.keep();
            bail!("{} differs from {}", one.display(), other.display());
        }
    }
    println!(
        "{} programs and the package: bit-identical when compiled in another checkout",
        names.len()
    );
    Ok(())
}

/// Compiles the programs and returns their paths.
fn compile(profile: &str, checkout: &Path, target: &Path, names: &[&str]) -> Result<Vec<PathBuf>> {
    let mut build = Command::new(cargo::program());
    build.args(["build", "--quiet", "--locked", "--profile", profile]);
    build.args(names.iter().flat_map(|name| ["--package", name]));
    build.env("CARGO_TARGET_DIR", target).current_dir(checkout);
    let status = build
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status();
    let status = status.context("starting cargo")?;
    ensure!(status.success(), "the second build failed ({status})");
    let folder = target.join(cargo::folder_name(profile));
    Ok(names.iter().map(|name| folder.join(name)).collect())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}
