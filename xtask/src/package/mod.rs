//! `cargo xtask package`: the Debian package of the four programs.
//!
//! ```text
//! bin/cloud-hypervisor/Cargo.toml          its contents and their paths
//! target/PROFILE/{cloud-hypervisor,…}      the programs
//! target/PROFILE/docs/                     manual pages and completions, written by the programs
//! target/package/NAME.deb                  the package, built twice and compared
//! ```

mod clean_root;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::apt::{self, Need};
use crate::guest::make::quiet;
use crate::testbed::bins;
use crate::{cargo, paths, tools};

/// The cargo package whose manifest describes the Debian package.
const MANIFEST: &str = "cloud-hypervisor";

const NEEDS: [Need; 2] = [
    Need {
        package: "dpkg-dev",
        why: "finds the libraries that a package depends on",
    },
    Need {
        package: "xz-utils",
        why: "compresses the package",
    },
];

/// Environment that must not affect the package, one row per build: a time zone and a language.
const BUILDS: [[(&str, &str); 2]; 2] = [
    [("TZ", "UTC"), ("LC_ALL", "C.UTF-8")],
    [("TZ", "Pacific/Kiritimati"), ("LC_ALL", "C")],
];

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Cargo profile of the programs, which are built if they are out of date
    #[arg(long, value_name = "NAME", default_value = "release")]
    profile: String,
    /// Also install the package in a clean Debian root, check it there, and remove it
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    apt::ensure(&NEEDS)?;
    let tool = tools::CARGO_DEB.program()?;
    let programs = bins::build(&options.profile, &[])?;
    let folder = paths::target().join("package");
    let mut made = Vec::new();
    for (number, environment) in BUILDS.iter().enumerate() {
        let place = folder.join(format!("build-{number}"));
        let package = make(&tool, &options.profile, &programs, environment, &place)?;
        made.push(package);
    }
    let contents = made
        .iter()
        .map(|path| fs::read(path).with_context(|| format!("reading {}", path.display())))
        .collect::<Result<Vec<_>>>()?;
    ensure!(
        contents[0] == contents[1],
        "two builds of the package differ: compare {} and {}, with diffoscope for example",
        made[0].display(),
        made[1].display()
    );
    let name = made[0].file_name().context("a package has a name")?;
    let package = folder.join(name);
    fs::rename(&made[0], &package).with_context(|| format!("creating {}", package.display()))?;
    fs::remove_file(&made[1]).with_context(|| format!("removing {}", made[1].display()))?;
    println!(
        "{}: {} KiB, sha256 {:x}, the same from two builds",
        package.display(),
        contents[0].len() >> 10,
        Sha256::digest(&contents[0])
    );
    if options.check {
        let names: Vec<&str> = programs.iter().filter_map(|path| file_name(path)).collect();
        clean_root::check(&package, &names)?;
    }
    Ok(())
}

fn file_name(path: &Path) -> Option<&str> {
    path.file_name().and_then(OsStr::to_str)
}

/// Builds the package once, in the empty folder `place`.
fn make(
    tool: &Path,
    profile: &str,
    programs: &[PathBuf],
    environment: &[(&str, &str)],
    place: &Path,
) -> Result<PathBuf> {
    let docs = cargo::folder(profile).join("docs");
    for folder in [place, &docs] {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("removing {}", folder.display()))?;
        }
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    for program in programs {
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
        .current_dir(paths::workspace());
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
