//! `cargo xtask guest …`: what test guests boot, and the kernel patch series.
//!
//! ```text
//! linux-source package + stock.config ─→ cache/kernel-KEY/{vmlinux,bzImage} ─→ target/guest/stock/
//!   + guest-patches/{series,config}   ─→ cache/kernel-KEY/{vmlinux,bzImage} ─→ target/guest/patched/
//! busybox-static + tests/guest        ─→ target/guest/initramfs.cpio.gz
//! linux-image-cloud-amd64, unpacked   ─→ target/guest/debian/{vmlinuz,vmlinux,initramfs.cpio.gz}
//! as above, 6.1, 6.12 and the newest  ─→ target/guest/debian-SERIES/{vmlinuz,initramfs.cpio.gz}
//! mmdebstrap                          ─→ cache/debian-disk-KEY/disk.ext4
//! ```

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
mod make;
mod modules;
mod newest;
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
mod variant;

use std::path::PathBuf;

use anyhow::Result;

use crate::paths;
use debian::DebianKernel;
use kernel::Kernel;

/// The finished files.
#[derive(Debug, Clone)]
pub(crate) struct Artefacts {
    /// The initramfs of kernels whose drivers are built in.
    pub(crate) initramfs: PathBuf,
    pub(crate) stock: Option<Built>,
    /// The patched kernel's, if there is one.
    pub(crate) patched: Option<Built>,
    pub(crate) debian: Option<Unpacked>,
    /// What [`Artefacts::add_distributions`] has made: names under `/guest`, and the files.
    distributions: Vec<(String, PathBuf)>,
}

/// A kernel of ours in its two forms.
#[derive(Debug, Clone)]
pub(crate) struct Built {
    pub(crate) vmlinux: PathBuf,
    pub(crate) bzimage: PathBuf,
}

/// A kernel of Debian's, with an initramfs that has its modules.
#[derive(Debug, Clone)]
pub(crate) struct Unpacked {
    pub(crate) vmlinuz: PathBuf,
    /// Unpacked; it starts sooner.
    pub(crate) vmlinux: PathBuf,
    pub(crate) initramfs: PathBuf,
}

/// Which kernels must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Debian's binary kernel: nothing is compiled.
    Debian,
    /// The stock kernel; the patched one if somebody has built it already.
    Stock,
    /// Stock and patched, as far as there is a patch series.
    Both,
}

impl Artefacts {
    /// A kernel and the initramfs that goes with it.
    pub(crate) fn bootable(&self) -> Option<(&PathBuf, &PathBuf)> {
        let stock = self.stock.as_ref();
        let debian = self.debian.as_ref();
        stock
            .map(|kernel| (&kernel.vmlinux, &self.initramfs))
            .or_else(|| debian.map(|kernel| (&kernel.vmlinux, &kernel.initramfs)))
    }

    /// Adds Debian's kernels of several series, and a disk with Debian on it.
    pub(crate) fn add_distributions(&mut self) -> Result<()> {
        self.distributions = distributions::publish(&self.initramfs)?;
        Ok(())
    }

    /// What `/guest` of a testbed has: a name there and the file here.
    pub(crate) fn files(&self) -> Vec<(&str, &PathBuf)> {
        let mut files = vec![("initramfs.cpio.gz", &self.initramfs)];
        if let Some(stock) = &self.stock {
            files.push(("vmlinux", &stock.vmlinux));
            files.push(("bzImage", &stock.bzimage));
        }
        if let Some(patched) = &self.patched {
            files.push(("patched/vmlinux", &patched.vmlinux));
            files.push(("patched/bzImage", &patched.bzimage));
        }
        if let Some(debian) = &self.debian {
            files.push(("debian/vmlinuz", &debian.vmlinuz));
            files.push(("debian/vmlinux", &debian.vmlinux));
            files.push(("debian/initramfs.cpio.gz", &debian.initramfs));
        }
        let more = self.distributions.iter();
        files.extend(more.map(|(name, file)| (name.as_str(), file)));
        files
    }
}

/// Builds what is missing or out of date.
pub(crate) fn build(wanted: Wanted) -> Result<Artefacts> {
    let guest = paths::guest();
    let mut stock = None;
    if wanted != Wanted::Debian {
        let dir = guest.join("stock");
        Kernel::stock()?.build(&dir)?;
        stock = Some(Built {
            vmlinux: dir.join("vmlinux"),
            bzimage: dir.join("bzImage"),
        });
    }
    let initramfs = common_initramfs()?;
    Ok(Artefacts {
        stock,
        patched: patched(wanted)?,
        debian: match wanted {
            Wanted::Debian => Some(unpacked(debian::CLOUD, "debian", &initramfs)?),
            Wanted::Stock | Wanted::Both => None,
        },
        initramfs,
        distributions: Vec::new(),
    })
}

/// `cargo xtask guest build`: both kernels, and what of them came from a cache.
pub(crate) fn build_all() -> Result<()> {
    for (kernel, folder) in [
        (Some(Kernel::stock()?), "stock"),
        (Kernel::patched()?, "patched"),
    ] {
        let Some(kernel) = kernel else { continue };
        if let Some(place) = kernel.cached(&paths::guest().join(folder))? {
            println!("cache: {}: {}", kernel.what(), place.display());
        }
    }
    build(Wanted::Both).map(drop)
}

/// Makes sure that the Debian packages are there which [`build`] needs for [`Wanted::Debian`].
pub(crate) fn ensure_tools() -> Result<()> {
    debian::ensure_tools()?;
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
fn unpacked(packages: &[&str], folder: &str, initramfs: &std::path::Path) -> Result<Unpacked> {
    let kernel = DebianKernel::fetch(packages, |_, _| ())?;
    let dir = paths::guest().join(folder);
    debian::publish(&kernel, initramfs, &dir)?;
    Ok(Unpacked {
        vmlinuz: dir.join("vmlinuz"),
        vmlinux: dir.join("vmlinux"),
        initramfs: dir.join("initramfs.cpio.gz"),
    })
}

fn patched(wanted: Wanted) -> Result<Option<Built>> {
    if wanted == Wanted::Debian {
        return Ok(None);
    }
    let dir = paths::guest().join("patched");
    let Some(kernel) = Kernel::patched()? else {
        if wanted == Wanted::Both {
            eprintln!("No patched kernel: guest-patches/series lists no patch");
        }
        return Ok(None);
    };
    if wanted == Wanted::Both {
        kernel.build(&dir)?;
    } else if !kernel.take_if_built(&dir)? {
        eprintln!("The patched kernel is not built (cargo xtask guest build): left out");
        return Ok(None);
    }
    Ok(Some(Built {
        vmlinux: dir.join("vmlinux"),
        bzimage: dir.join("bzImage"),
    }))
}
