//! `cargo xtask guest …`: builds kernels and images of test guests, and works on the kernel patch series.
//!
//! ```text
//! linux-source package + stock.config ─→ cache/kernel-KEY/{vmlinux,bzImage} ─→ target/guest/stock/
//!   + guest-patches/{series,config}   ─→ cache/kernel-KEY/{vmlinux,bzImage} ─→ target/guest/patched/
//!   or guest-patches/rival            ─→ cache/kernel-KEY/{vmlinux,bzImage} ─→ target/guest/rival/
//! busybox-static + tests/guest        ─→ target/guest/initramfs.cpio.gz
//! linux-image-cloud-amd64, unpacked   ─→ target/guest/debian/{vmlinuz,vmlinux,initramfs.cpio.gz}
//!   6.12, another virtio_balloon.ko   ─→ target/guest/inflation/{vmlinuz,vmlinux,initramfs.cpio.gz}
//! as above, 6.1, 6.12 and the newest  ─→ target/guest/debian-SERIES/{vmlinuz,initramfs.cpio.gz}
//! mmdebstrap                          ─→ cache/debian-disk-KEY/disk.ext4
//! ```

mod balloon_module;
mod boot;
mod build_tree;
pub(crate) mod cache;
pub(crate) mod check;
mod complaints;
mod config;
pub(crate) mod core;
pub(crate) mod cpio;
pub(crate) mod debian;
mod debian_disk;
mod distributions;
mod emulator;
mod initramfs;
mod kernel;
pub(crate) mod kunit;
pub(crate) mod make;
mod modules;
mod newest;
pub(crate) mod package;
mod prefixes;
pub(crate) mod programs;
mod progress;
pub(crate) mod qemu_test;
mod report;
pub(crate) mod sanitize;
mod series;
mod series_file;
mod source;
mod stamp;
mod stress_ng;
pub(crate) mod tree;
mod unpack;
mod variant;

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::paths;
use debian::DebianKernel;
use kernel::Kernel;

/// Version of the kernel source that our kernels are built from.
pub(crate) fn source_version() -> Result<String> {
    Ok(source::Source::base()?.package_version)
}

/// Folder of the kernel that inflates by blocks.
const INFLATION: &str = "inflation";

/// The finished files.
#[derive(Debug, Clone)]
pub(crate) struct Artefacts {
    /// The initramfs of kernels whose drivers are built in.
    pub(crate) initramfs: PathBuf,
    /// The compiled kernel; if `None`, Debian's is used.
    pub(crate) ours: Option<Built>,
    pub(crate) debian: Option<Unpacked>,
    /// Additional files: names under `/guest`, and paths.
    more: Vec<(String, PathBuf)>,
}

/// Our kernel in its two formats.
#[derive(Debug, Clone)]
pub(crate) struct Built {
    is_patched: bool,
    pub(crate) vmlinux: PathBuf,
    pub(crate) bzimage: PathBuf,
}

/// A kernel of Debian's, with an initramfs that has its modules.
#[derive(Debug, Clone)]
pub(crate) struct Unpacked {
    pub(crate) vmlinuz: PathBuf,
    /// The unpacked kernel, which starts faster.
    pub(crate) vmlinux: PathBuf,
    pub(crate) initramfs: PathBuf,
}

/// A required kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Wanted {
    /// Debian's binary kernel for cloud guests, with its modules; nothing is compiled
    Debian,
    /// Debian's source, compiled with our small configuration
    Stock,
    /// The stock kernel with the series in guest-patches
    Patched,
    /// The stock kernel with guest-patches/rival, which the series is measured against
    Rival,
    /// Debian's 6.12 for cloud guests, also with a balloon driver that inflates by blocks (patches 5xx alone)
    Inflation,
}

impl Wanted {
    /// The kernel if it must be compiled, and its folder.
    fn compiled(self) -> Result<Option<(Kernel, PathBuf)>> {
        let (kernel, folder) = match self {
            Self::Debian | Self::Inflation => return Ok(None),
            Self::Stock => (Kernel::stock()?, "stock"),
            Self::Patched => (Kernel::patched()?, "patched"),
            Self::Rival => (Kernel::rival()?, "rival"),
        };
        Ok(Some((kernel, paths::guest().join(folder))))
    }
}

impl Artefacts {
    /// A kernel and the initramfs that goes with it.
    pub(crate) fn bootable(&self) -> Option<(&PathBuf, &PathBuf)> {
        let debian = self.debian.as_ref();
        let ours = self.ours.as_ref();
        ours.map(|kernel| (&kernel.vmlinux, &self.initramfs))
            .or_else(|| debian.map(|kernel| (&kernel.vmlinux, &kernel.initramfs)))
    }

    /// Adds Debian's kernels of several series, and a disk with Debian on it.
    pub(crate) fn add_distributions(&mut self) -> Result<()> {
        self.more.extend(distributions::publish(&self.initramfs)?);
        Ok(())
    }

    /// Content of a testbed's `/guest`: names there and files here.
    pub(crate) fn files(&self) -> Vec<(&str, &PathBuf)> {
        let mut files = vec![("initramfs.cpio.gz", &self.initramfs)];
        if let Some(ours) = &self.ours {
            files.push(("vmlinux", &ours.vmlinux));
            files.push(("bzImage", &ours.bzimage));
        }
        if let Some(patched) = self.ours.as_ref().filter(|ours| ours.is_patched) {
            files.push(("patched/vmlinux", &patched.vmlinux));
            files.push(("patched/bzImage", &patched.bzimage));
        }
        if let Some(debian) = &self.debian {
            files.push(("debian/vmlinuz", &debian.vmlinuz));
            files.push(("debian/vmlinux", &debian.vmlinux));
            files.push(("debian/initramfs.cpio.gz", &debian.initramfs));
        }
        let more = self.more.iter();
        files.extend(more.map(|(name, file)| (name.as_str(), file)));
        files
    }
}

/// Builds what is missing or out of date.
pub(crate) fn build(wanted: Wanted) -> Result<Artefacts> {
    let ours = match wanted.compiled()? {
        Some((kernel, folder)) => Some(built(wanted, &kernel, &folder)?),
        None => None,
    };
    let initramfs = common_initramfs()?;
    let debian = match wanted {
        Wanted::Debian => Some(unpacked(debian::CLOUD, "debian", &initramfs)?),
        Wanted::Inflation => Some(unpacked(debian::CLOUD_6_12, "debian-6.12", &initramfs)?),
        Wanted::Stock | Wanted::Patched | Wanted::Rival => None,
    };
    let more = match wanted {
        Wanted::Inflation => inflating(&initramfs)?,
        _ => Vec::new(),
    };
    Ok(Artefacts {
        initramfs,
        ours,
        debian,
        more,
    })
}

/// Debian's kernel with a driver that inflates by blocks: names under `/guest`, and paths.
fn inflating(initramfs: &Path) -> Result<Vec<(String, PathBuf)>> {
    let kernel = DebianKernel::fetch(debian::CLOUD_6_12, |_, _| ())?;
    let dir = paths::guest().join(INFLATION);
    debian::publish_with(&kernel, initramfs, &dir, &balloon_module::build(&kernel)?)?;
    let names = ["vmlinux", "initramfs.cpio.gz"];
    Ok(names
        .map(|name| (format!("{INFLATION}/{name}"), dir.join(name)))
        .into())
}

/// Makes Debian's kernels of several series, and a disk with Debian on it.
pub(crate) fn build_distributions() -> Result<()> {
    distributions::publish(&common_initramfs()?).map(drop)
}

fn built(wanted: Wanted, kernel: &Kernel, folder: &Path) -> Result<Built> {
    kernel.build(folder)?;
    Ok(Built {
        is_patched: wanted == Wanted::Patched,
        vmlinux: folder.join("vmlinux"),
        bzimage: folder.join("bzImage"),
    })
}

/// Makes the kernels, with an initramfs, and prints which of them came from a cache.
pub(crate) fn build_kernels(kernels: &[Wanted]) -> Result<()> {
    for &wanted in kernels {
        if let Some((kernel, folder)) = wanted.compiled()?
            && let Some(place) = kernel.cached(&folder)?
        {
            println!("cache: {}: {}", kernel.what(), place.display());
        }
        build(wanted)?;
    }
    Ok(())
}

/// Ensures that the Debian packages are installed that [`build`] needs for [`Wanted::Debian`].
pub(crate) fn ensure_tools() -> Result<()> {
    unpack::ensure_tools()?;
    initramfs::ensure_tools()
}

/// The initramfs without modules.
pub(crate) fn common_initramfs() -> Result<PathBuf> {
    let guest = paths::guest();
    std::fs::create_dir_all(&guest)?;
    let initramfs = guest.join("initramfs.cpio.gz");
    initramfs::build(&initramfs)?;
    Ok(initramfs)
}

/// The kernel of the first of these Debian packages as guests boot it, in `target/guest/FOLDER`.
fn unpacked(packages: &[&str], folder: &str, initramfs: &Path) -> Result<Unpacked> {
    let kernel = DebianKernel::fetch(packages, |_, _| ())?;
    let dir = paths::guest().join(folder);
    debian::publish(&kernel, initramfs, &dir)?;
    Ok(Unpacked {
        vmlinuz: dir.join("vmlinuz"),
        vmlinux: dir.join("vmlinux"),
        initramfs: dir.join("initramfs.cpio.gz"),
    })
}
