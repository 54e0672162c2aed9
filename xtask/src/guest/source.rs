//! Linux as packaged by Debian, unpacked once for every checkout on the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::cache::{Lock, key};
use super::make::quiet;
use crate::apt::{self, Need};
use crate::{disk, paths};

const PACKAGE: Need = Need {
    package: "linux-source-6.12",
    why: "source of the test kernel",
};
const COMPILER: Need = Need {
    package: "gcc",
    why: "compiles the test kernel",
};
const XZ: Need = Need {
    package: "xz-utils",
    why: "unpacks the kernel source",
};
const TARBALL: &str = "/usr/src/linux-source-6.12.tar.xz";
/// The folder inside the tarball.
const FOLDER: &str = "linux-source-6.12";

/// Size of the unpacked source, objects of one configuration, and the kernels, as measured, rounded up.
const BUILT_BYTES: u64 = 2300 << 20;

/// A kernel source that is packaged but perhaps not unpacked yet.
#[derive(Debug, Clone)]
pub(super) struct Source {
    /// Its name, for messages.
    pub(super) name: String,
    /// The version of its Debian package.
    pub(super) package_version: String,
    /// Its name in the cache.
    pub(super) key: String,
    pub(super) tarball: PathBuf,
    /// The folder inside the tarball.
    pub(super) folder: String,
}

impl Source {
    /// The source that test kernels are built from; its package is installed if it is missing.
    pub(super) fn base() -> Result<Self> {
        apt::ensure(&[PACKAGE, COMPILER])?;
        let version =
            apt::version(PACKAGE.package).context("the kernel source was just installed")?;
        let tarball_bytes = fs::metadata(TARBALL)
            .with_context(|| format!("{} has no {TARBALL}", PACKAGE.package))?
            .len();
        Ok(Self {
            name: format!("{} {version}", PACKAGE.package),
            key: key(&[&version, &tarball_bytes.to_string()]),
            package_version: version,
            tarball: TARBALL.into(),
            folder: FOLDER.into(),
        })
    }

    /// One of its files, without unpacking the others.
    pub(super) fn read(&self, name: &str) -> Result<Vec<u8>> {
        apt::ensure(&[XZ])?;
        let mut tar = Command::new("tar");
        tar.arg("xfO").arg(&self.tarball);
        // The rest of the archive is not read.
        tar.arg("--occurrence")
            .arg(format!("{}/{name}", self.folder));
        let output = tar.output().context("starting tar")?;
        ensure!(
            output.status.success() && !output.stdout.is_empty(),
            "{} has no {name}: {}",
            self.tarball.display(),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(output.stdout)
    }

    /// Version and patch level of the kernel, by the name of its folder.
    pub(super) fn version(&self) -> Option<(u32, u32)> {
        let (_, version) = self.folder.rsplit_once('-')?;
        parse_version(version)
    }

    /// The unpacked source, which must not be modified. The caller holds the cache's lock.
    pub(super) fn unpack(&self, _lock: &Lock) -> Result<PathBuf> {
        let cache = paths::cache()?;
        let source = cache.join(format!("source-{}", self.key));
        if source.exists() {
            return Ok(source);
        }
        apt::ensure(&[XZ])?;
        let task = format!("unpacking {} and building kernels from it", self.name);
        disk::require(&cache, BUILT_BYTES, &task)?;
        eprintln!("Unpacking {}", self.name);
        let beside = cache.join("source-unpacking");
        if beside.exists() {
            fs::remove_dir_all(&beside)
                .with_context(|| format!("removing {}", beside.display()))?;
        }
        fs::create_dir_all(&beside).with_context(|| format!("creating {}", beside.display()))?;
        let mut tar = Command::new("tar");
        tar.arg("xf").arg(&self.tarball).arg("-C").arg(&beside);
        quiet(&mut tar)?;
        fs::rename(beside.join(&self.folder), &source)
            .with_context(|| format!("{} has no {}", self.tarball.display(), self.folder))?;
        fs::remove_dir(&beside).with_context(|| format!("removing {}", beside.display()))?;
        Ok(source)
    }
}

/// `7.3` as two numbers.
pub(super) fn parse_version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A file of the source; `None` if it has none of that name.
pub(super) fn file(tree: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let path = tree.join(name);
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}
