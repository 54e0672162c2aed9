//! `cargo xtask package`: builds the Debian package of the four programs.
//!
//! ```text
//! bin/cloud-hypervisor/Cargo.toml          its contents and their paths
//! target/PROFILE/{cloud-hypervisor,…}      the programs
//! target/PROFILE/docs/                     manual pages and completions, written by the programs
//! target/package/NAME.deb                  the package, built twice and compared
//! ```

pub(crate) mod build;
pub(crate) mod clean_root;
mod lint;
mod twice;

use std::fs;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::apt::{self, Need};
use crate::testbed::bins;
use crate::{cargo, paths, tools};

use build::{Built, file_name, make};

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
    /// Also check completions and manual pages, install the package in a clean Debian root, check it there, and remove
    /// it
    #[arg(long)]
    check: bool,
    /// Also compile the last commit in another checkout, and compare the programs and the package bit by bit
    #[arg(long)]
    twice: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    apt::ensure(&NEEDS)?;
    let tool = tools::CARGO_DEB.program()?;
    let programs = bins::build(&options.profile, &[])?;
    let target = paths::target();
    let built = Built {
        checkout: paths::workspace(),
        target: &target,
        programs: &programs,
    };
    let folder = target.join("package");
    let mut made = Vec::new();
    for (number, environment) in BUILDS.iter().enumerate() {
        let place = folder.join(format!("build-{number}"));
        let package = make(&tool, &options.profile, &built, environment, &place)?;
        made.push(package);
    }
    let contents = made
        .iter()
        .map(|path| fs::read(path).with_context(|| format!("reading {}", path.display())))
        .collect::<Result<Vec<_>>>()?;
    ensure!(
        contents[0] == contents[1],
        "two packings of the same programs differ: compare {} and {}, with diffoscope for example",
        made[0].display(),
        made[1].display()
    );
    let name = made[0].file_name().context("a package has a name")?;
    let package = folder.join(name);
    fs::rename(&made[0], &package).with_context(|| format!("creating {}", package.display()))?;
    fs::remove_file(&made[1]).with_context(|| format!("removing {}", made[1].display()))?;
    println!(
        "{}: {} KiB, sha256 {:x}, packed twice alike",
        package.display(),
        contents[0].len() >> 10,
        Sha256::digest(&contents[0])
    );
    if options.check {
        lint::check(&cargo::folder(&options.profile).join("docs"))?;
        let names: Vec<&str> = programs.iter().filter_map(|path| file_name(path)).collect();
        clean_root::check(&package, &names)?;
    }
    if options.twice {
        twice::check(&tool, &options.profile, &built, &package)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeSet;
    use std::path::{Component, Path, PathBuf};

    use super::*;

    const DOCUMENTS: &str = "usr/share/doc/cloud-hypervisor-balloon/";

    /// The packaged documents, by their paths in the repository.
    fn documents() -> BTreeSet<PathBuf> {
        let root = paths::workspace();
        let manifest = fs::read_to_string(root.join("bin/cloud-hypervisor/Cargo.toml")).unwrap();
        let mut files = BTreeSet::new();
        for line in manifest.lines().filter(|line| line.contains(DOCUMENTS)) {
            let words: Vec<&str> = line.split('"').collect();
            let source = words[1].strip_prefix("../../").unwrap();
            let place = words[3].strip_prefix(DOCUMENTS).unwrap();
            let (folder, name) = source.rsplit_once('/').unwrap_or(("", source));
            assert_eq!(
                folder,
                place.trim_end_matches('/'),
                "{source} changes its folder"
            );
            let Some((_, end)) = name.split_once('*') else {
                files.insert(PathBuf::from(source));
                continue;
            };
            for entry in fs::read_dir(root.join(folder)).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                if name.ends_with(end) {
                    files.insert(Path::new(folder).join(name));
                }
            }
        }
        files
    }

    /// The path without `..`.
    fn normal(path: &Path) -> PathBuf {
        let mut normal = PathBuf::new();
        for part in path.components() {
            match part {
                Component::ParentDir => drop(normal.pop()),
                part => normal.push(part),
            }
        }
        normal
    }

    #[test]
    fn links_of_packaged_documents_lead_to_packaged_files() {
        let files = documents();
        let mut checked = 0;
        for document in files
            .iter()
            .filter(|file| file.extension().is_some_and(|it| it == "md"))
        {
            let text = fs::read_to_string(paths::workspace().join(document)).unwrap();
            for (line, target) in test_docs::links(&text) {
                let path = target.split('#').next().unwrap_or_default();
                if target.contains("://") || path.is_empty() {
                    continue;
                }
                let path = normal(&document.parent().unwrap().join(path));
                let is_there = files.iter().any(|file| file.starts_with(&path));
                assert!(
                    is_there,
                    "{}:{line}: {target} is not packaged",
                    document.display()
                );
                checked += 1;
            }
        }
        assert!(checked > 50, "only {checked} links were seen");
    }
}
