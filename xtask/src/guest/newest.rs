//! The newest kernels that Debian packages, as source and as binary, to detect problems early. Package lists are kept
//! in the cache, and the machine's own sources are unchanged.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};

use super::cache::key;
use super::make::quiet;
use super::source::{Source, parse_version};
use crate::apt::{self, Lists, Offer};
use crate::paths;

/// Suites in which the newest kernels appear.
const SUITES: [&str; 2] = ["unstable", "trixie-backports"];
const PREFIX: &str = "linux-source-";
const CLOUD: &str = "linux-image-cloud-amd64";
/// Maximum age of the lists.
const LISTS_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// The newest source; `None` if that is `base`.
pub(super) fn source(base: &Source) -> Result<Option<Source>> {
    let archive = Archive::open()?;
    let Some((version, package)) = archive.newest_package()? else {
        return Ok(None);
    };
    let full_version = archive.version_of(&package)?;
    if base.name.starts_with(&format!("{package} ")) {
        return Ok(None);
    }
    let source = Source {
        name: format!("{package} {full_version}"),
        key: key(&[&package, &full_version]),
        package_version: full_version,
        tarball: archive
            .dir
            .join(format!("unpacked/usr/src/{package}.tar.xz")),
        folder: format!("{PREFIX}{}.{}", version.0, version.1),
    };
    let unpacked = paths::cache()?.join(format!("source-{}", source.key));
    if !unpacked.exists() && !source.tarball.exists() {
        archive.download(&package)?;
    }
    Ok(Some(source))
}

/// The newest binary kernel for cloud guests.
pub(super) fn cloud_image() -> Result<Offer> {
    Archive::open()?.lists.newest(CLOUD)
}

/// As [`cloud_image`], from lists that are refreshed.
pub(super) fn fresh_cloud_image() -> Result<Offer> {
    let list = dir()?.join("sources.list");
    fs::remove_file(&list).with_context(|| format!("removing {}", list.display()))?;
    cloud_image()
}

fn dir() -> Result<PathBuf> {
    Ok(paths::cache()?.join("debian"))
}

/// Debian's archive, seen through a separate folder.
#[derive(Debug)]
struct Archive {
    dir: PathBuf,
    lists: Lists,
}

impl Archive {
    /// Refreshes the lists if they are old.
    fn open() -> Result<Self> {
        let dir = dir()?;
        for folder in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(dir.join(folder))
                .with_context(|| format!("creating {}", dir.display()))?;
        }
        let lists = Lists::in_folder(&dir);
        let archive = Self { dir, lists };
        let lines = SUITES.map(apt::archive_line).into_iter();
        let text: String = lines.collect::<Result<Vec<String>>>()?.join("\n");
        let list = archive.dir.join("sources.list");
        let fresh = fs::read_to_string(&list).is_ok_and(|old| old == text) && is_recent(&list);
        if !fresh {
            eprintln!("Reading what Debian has in {}", SUITES.join(" and "));
            fs::write(&list, &text).with_context(|| format!("writing {}", list.display()))?;
            apt::update_own(&archive.lists).inspect_err(|_| {
                // The next run must try again; a missing file does not matter.
                fs::remove_file(&list).ok();
            })?;
        }
        Ok(archive)
    }

    fn text(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = self
            .lists
            .command(program)
            .args(args)
            .output()
            .with_context(|| format!("starting {program}"))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn newest_package(&self) -> Result<Option<((u32, u32), String)>> {
        Ok(newest(&self.text("apt-cache", &["pkgnames", PREFIX])?))
    }

    fn version_of(&self, package: &str) -> Result<String> {
        let text = self.text("apt-cache", &["show", "--no-all-versions", package])?;
        text.lines()
            .find_map(|line| line.strip_prefix("Version: "))
            .map(str::to_string)
            .with_context(|| format!("no version of {package}"))
    }

    fn download(&self, package: &str) -> Result<()> {
        eprintln!("Downloading {package}");
        let fetched = self.dir.join("fetched");
        let unpacked = self.dir.join("unpacked");
        for dir in [&fetched, &unpacked] {
            if dir.exists() {
                fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))?;
            }
        }
        fs::create_dir_all(&fetched).with_context(|| format!("creating {}", fetched.display()))?;
        quiet(
            self.lists
                .command("apt-get")
                .args(["-qq", "download", package])
                .current_dir(&fetched),
        )?;
        let deb = fs::read_dir(&fetched)
            .context("reading the download")?
            .next()
            .context("apt-get downloaded nothing")?
            .context("reading the download")?
            .path();
        quiet(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&unpacked))?;
        fs::remove_dir_all(&fetched).with_context(|| format!("removing {}", fetched.display()))
    }
}

fn is_recent(path: &Path) -> bool {
    fs::metadata(path)
        .and_then(|meta| meta.modified())
        .is_ok_and(|time| {
            SystemTime::now()
                .duration_since(time)
                .is_ok_and(|age| age < LISTS_MAX)
        })
}

/// The highest version among names such as `linux-source-6.12`.
fn newest(names: &str) -> Option<((u32, u32), String)> {
    names
        .lines()
        .filter_map(|name| {
            let version = parse_version(name.strip_prefix(PREFIX)?)?;
            Some((version, name.to_string()))
        })
        .max()
}

#[cfg(test)]
mod tests {
    use super::newest;

    #[test]
    fn newest_is_by_number_and_not_by_letter() {
        let names = "linux-source-6.9\nlinux-source-6.12\nlinux-source-6.12-rt\nlinux-source\n";
        assert_eq!(newest(names).unwrap().1, "linux-source-6.12");
        assert_eq!(newest("linux-source\n"), None);
    }
}
