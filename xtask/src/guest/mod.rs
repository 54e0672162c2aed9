//! `cargo xtask guest …`: what test guests boot, and the kernel patch series.
//!
//! ```text
//! linux-source package + stock.config ─→ cache/kernel-KEY/{vmlinux,bzImage} ─→ target/guest/stock/
//!   + guest-patches/{series,config}   ─→ cache/kernel-KEY/{vmlinux,bzImage} ─→ target/guest/patched/
//! busybox-static + tests/guest        ─→ target/guest/initramfs.cpio.gz
//! ```

mod boot;
mod cache;
pub(crate) mod check;
mod complaints;
mod config;
pub(crate) mod core;
pub(crate) mod cpio;
mod emulator;
mod initramfs;
mod kernel;
pub(crate) mod kunit;
mod make;
mod newest;
mod prefixes;
pub(crate) mod programs;
mod progress;
mod report;
pub(crate) mod sanitize;
mod series;
mod series_file;
mod source;
mod stamp;
mod stress_ng;
pub(crate) mod tree;
mod variant;
mod workshop;

use std::path::PathBuf;

use anyhow::Result;

use crate::paths;
use kernel::Kernel;

/// The finished files.
#[derive(Debug, Clone)]
pub(crate) struct Artefacts {
    pub(crate) vmlinux: PathBuf,
    pub(crate) bzimage: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// The patched kernel's, if there is one.
    pub(crate) patched: Option<Patched>,
}

/// The patched kernel in its two forms.
#[derive(Debug, Clone)]
pub(crate) struct Patched {
    pub(crate) vmlinux: PathBuf,
    pub(crate) bzimage: PathBuf,
}

/// Which kernels must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The stock kernel; the patched one if somebody has built it already.
    Stock,
    /// Both, as far as there is a patch series.
    Both,
}

/// Builds what is missing or out of date.
pub(crate) fn build(wanted: Wanted) -> Result<Artefacts> {
    let guest = paths::guest();
    let stock = guest.join("stock");
    Kernel::stock()?.build(&stock)?;
    let initramfs = guest.join("initramfs.cpio.gz");
    initramfs::build(&initramfs)?;
    Ok(Artefacts {
        vmlinux: stock.join("vmlinux"),
        bzimage: stock.join("bzImage"),
        initramfs,
        patched: patched(wanted)?,
    })
}

fn patched(wanted: Wanted) -> Result<Option<Patched>> {
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
    Ok(Some(Patched {
        vmlinux: dir.join("vmlinux"),
        bzimage: dir.join("bzImage"),
    }))
}
